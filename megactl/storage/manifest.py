"""manifest.json, schema 1: what a checkpoint folder holds, piece by piece, and whether its bytes are still the ones written.

The format is described in docs/checkpoint-format.md. Nothing in a manifest is trusted: it is parsed strictly, file names must be plain
names, every tensor must be covered exactly once, and every byte of the folder's files falls under some checksum.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megactl.errors import CheckpointError
from megactl.storage.pieces import Region, coverage_problem
from megactl.storage.strict_json import DAMAGED, Fields, loads
from megactl.storage.tensor_file import ALGORITHM, DTYPES, TensorFile, digest, threads

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"
KINDS = ("weight", "master", "exp_avg", "exp_avg_sq")
PRECISIONS = ("fp32", "fp64", "bf16", "fp16", "fp8")
LAYOUT = ("tp", "cp", "dp", "pp", "zero")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", re.ASCII)
_TENSOR_FILE = re.compile(r"rank-[0-9]{5,9}\.safetensors", re.ASCII)
_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)
# The last line of the file. Its length is fixed, so what it covers is "every byte before it" and needs no canonical form of JSON.
_SEAL = ',\n"checksum":{{"algorithm":"' + ALGORITHM + '","value":"{}"}}}}\n'
_SEAL_LENGTH = len(_SEAL.format("0" * 64))


@dataclass(frozen=True, kw_only=True)
class Header:
    """The run's side of a checkpoint. `layout` has the degrees tp, cp, dp, pp and the ZeRO stage; `model`, `tokenizer` and `state`
    are JSON objects that belong to the trainer; `created_at` is ISO 8601 in UTC."""

    schema_version: int
    megactl: str
    step: int
    consumed_samples: int
    precision: str
    layout: dict[str, int]
    model: dict[str, Any]
    tokenizer: dict[str, Any] | None
    state: dict[str, Any]
    created_at: str
    host: str


@dataclass(frozen=True)
class Entry:
    """One stored piece: which elements (`region`) of which tensor (`name`, `kind`, logical `shape`), and where its bytes are."""

    name: str
    kind: str
    shape: tuple[int, ...]
    region: Region
    dtype: str
    file: str
    key: str
    checksum: str


@dataclass(frozen=True)
class FileRecord:
    """One tensor file: name, size in bytes, checksum of its header (length and JSON)."""

    file: str
    size: int
    header: str


@dataclass(frozen=True)
class Manifest:
    """A parsed manifest. It has been validated: see `validate`."""

    header: Header
    files: tuple[FileRecord, ...]
    entries: tuple[Entry, ...]

    @cached_property
    def tensors(self) -> dict[tuple[str, str], list[Entry]]:
        """Pieces by (name, kind), in the order stored."""
        found: dict[tuple[str, str], list[Entry]] = {}
        for entry in self.entries:
            found.setdefault((entry.name, entry.kind), []).append(entry)
        return found

    @cached_property
    def by_file(self) -> dict[str, list[Entry]]:
        """Pieces by file name."""
        found: dict[str, list[Entry]] = {record.file: [] for record in self.files}
        for entry in self.entries:
            found[entry.file].append(entry)
        return found


@dataclass(frozen=True)
class Report:
    """What `verify` found. `problems` empty means good; `notes` are oddities that harm nothing."""

    directory: Path
    manifest: Manifest | None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    files_checked: int = 0
    bytes_checked: int = 0
    ok: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ok", not self.problems)


def render(manifest: Manifest) -> bytes:
    """The manifest as the bytes of manifest.json: one piece a line, sealed with its own checksum. Raises CheckpointError for values
    that are not JSON or that break the schema, so that what is written can always be read."""
    try:
        lines = [f"{_json(key)}:{_json(value)}" for key, value in vars(manifest.header).items()]
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint header: {error}", "put only JSON values into model, tokenizer and state") from None
    lines.append('"files":[\n' + ",\n".join(_json(_file_document(record)) for record in manifest.files) + "]")
    lines.append('"tensors":[\n' + ",\n".join(_json(_entry_document(entry)) for entry in manifest.entries) + "]")
    body = ("{" + ",\n".join(lines)).encode()
    sealed = body + _SEAL.format(digest(body)).encode()
    try:
        survived = parse(sealed, FILE_NAME).header == manifest.header
    except CheckpointError as error:
        raise CheckpointError(error.message, "correct what is given to save; nothing was written") from None
    # A tuple or a number as key parses back as something else, and a resumed run would see the difference.
    if not survived:
        raise CheckpointError("checkpoint header: changes when written as JSON", "use lists and string keys in model, tokenizer and state")
    return sealed


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _checksum_document(value: str) -> dict[str, str]:
    return {"algorithm": ALGORITHM, "value": value}


def _file_document(record: FileRecord) -> dict[str, Any]:
    return {"file": record.file, "size": record.size, "header_checksum": _checksum_document(record.header)}


def _entry_document(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "kind": entry.kind,
        "shape": entry.shape,
        "rectangle": entry.region.rectangle,
        "flat_range": entry.region.flat_range,
        "dtype": entry.dtype,
        "file": entry.file,
        "key": entry.key,
        "checksum": _checksum_document(entry.checksum),
    }


def parse(data: bytes, source: str) -> Manifest:
    """Check the seal and parse strictly. `source` names the file in messages. Raises CheckpointError and nothing else."""
    body, seal = data[:-_SEAL_LENGTH], data[-_SEAL_LENGTH:]
    document = loads(data, source)
    # The version comes first: a newer schema may be sealed in another way, and the useful message is to upgrade.
    _check_version(document, source)
    if seal != _SEAL.format(digest(body)).encode():
        raise CheckpointError(f"{source}: does not match its own checksum", DAMAGED)
    fields = Fields(document, source)
    fields.take("checksum")
    header = _parse_header(fields)
    files = tuple(_parse_file(Fields(item, f"{source}.files[{i}]")) for i, item in enumerate(fields.items("files")))
    entries = tuple(_parse_entry(Fields(item, f"{source}.tensors[{i}]")) for i, item in enumerate(fields.items("tensors")))
    fields.done()
    manifest = Manifest(header, files, entries)
    validate(manifest, source)
    return manifest


def _check_version(document: Any, source: str) -> None:
    version = Fields(document, source).integer("schema_version", 1)
    if version > SCHEMA_VERSION:
        rule = f"this megactl reads versions up to {SCHEMA_VERSION}"
        raise CheckpointError(f"{source}.schema_version = {version}: {rule}", "use the megactl that wrote it, or a newer one")


def _parse_header(fields: Fields) -> Header:
    layout = fields.section("layout")
    degrees = {key: layout.integer(key, 0 if key == "zero" else 1) for key in LAYOUT}
    layout.done()
    tokenizer = fields.take("tokenizer")
    if tokenizer is not None and not isinstance(tokenizer, dict):
        raise fields.error("tokenizer", tokenizer, "must be an object or null")
    return Header(
        schema_version=fields.integer("schema_version", 1),
        megactl=fields.text("megactl"),
        step=fields.integer("step"),
        consumed_samples=fields.integer("consumed_samples"),
        precision=fields.choice("precision", PRECISIONS),
        layout=degrees,
        model=fields.mapping("model"),
        tokenizer=tokenizer,
        state=fields.mapping("state"),
        created_at=fields.text("created_at"),
        host=fields.text("host"),
    )


def _parse_checksum(fields: Fields, key: str) -> str:
    section = fields.section(key)
    section.choice("algorithm", (ALGORITHM,))
    value = section.text("value")
    if not _HEX.fullmatch(value):
        raise section.error("value", value, "must be 64 lower-case hexadecimal digits")
    section.done()
    return value


def _parse_file(fields: Fields) -> FileRecord:
    record = FileRecord(fields.text("file"), fields.integer("size", 9), _parse_checksum(fields, "header_checksum"))
    fields.done()
    return record


def _range(fields: Fields, key: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or any(type(item) is not int for item in value):
        raise fields.error(key, value, "must be [start, stop]")
    return (value[0], value[1])


def _parse_entry(fields: Fields) -> Entry:
    shape = fields.integers("shape")
    rectangle = tuple(_range(fields, "rectangle", item) for item in fields.items("rectangle"))
    flat = fields.take("flat_range")
    entry = Entry(
        name=fields.text("name"),
        kind=fields.choice("kind", KINDS),
        shape=shape,
        region=Region(rectangle, None if flat is None else _range(fields, "flat_range", flat)),
        dtype=fields.choice("dtype", tuple(DTYPES)),
        file=fields.text("file"),
        key=fields.text("key"),
        checksum=_parse_checksum(fields, "checksum"),
    )
    fields.done()
    return entry


def validate(manifest: Manifest, source: str) -> None:
    """Raise CheckpointError unless names are plain, each piece lies in its tensor, and every tensor is covered exactly once, in one
    type and (over its kinds) one shape. `source` names the file in messages."""
    known: set[str] = set()
    for record in manifest.files:
        if not _TENSOR_FILE.fullmatch(record.file) or record.file in known:
            rule = "must be a plain name such as rank-00003.safetensors, given once"
            raise CheckpointError(f"{source}: file {record.file!r}: {rule}", DAMAGED)
        known.add(record.file)
    keys: set[tuple[str, str]] = set()
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in manifest.entries:
        problem = _entry_problem(entry, known, keys, shapes)
        if problem is not None:
            raise CheckpointError(f"{source}: {entry.kind} of {entry.name!r}: {problem}", DAMAGED)
        keys.add((entry.file, entry.key))
        shapes[entry.name] = entry.shape
    for (name, kind), entries in manifest.tensors.items():
        problem = _tensor_problem(entries)
        if problem is not None:
            raise CheckpointError(f"{source}: {kind} of {name!r}: {problem}", "every element must be saved by exactly one rank")


def _entry_problem(entry: Entry, files: set[str], keys: set[tuple[str, str]], shapes: dict[str, tuple[int, ...]]) -> str | None:
    if not _NAME.fullmatch(entry.name):
        return "the name must be letters, digits, '_', '.' and '-'"
    if entry.kind not in KINDS:
        return f"the kind must be one of {', '.join(KINDS)}"
    if entry.file not in files:
        return f"file {entry.file!r} is not in the list of files"
    if (entry.file, entry.key) in keys:
        return f"key {entry.key!r} of {entry.file} is used twice"
    if shapes.get(entry.name, entry.shape) != entry.shape:
        return f"shape {list(entry.shape)} differs from {list(shapes[entry.name])} given before"
    return entry.region.problem(entry.shape)


def _tensor_problem(entries: Sequence[Entry]) -> str | None:
    dtypes = {entry.dtype for entry in entries}
    if len(dtypes) > 1:
        return f"pieces of different types ({', '.join(sorted(dtypes))})"
    return coverage_problem(entries[0].shape, tuple(entry.region for entry in entries))


def read(directory: Path) -> Manifest:
    """Parse a checkpoint folder's manifest. Raises CheckpointError where there is none or it is damaged."""
    path = directory / FILE_NAME
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint folder", "give a folder such as RUN_DIR/checkpoints/step-00000100")
    if not path.is_file():
        raise CheckpointError(f"{directory}: has no {FILE_NAME}, so it is not a complete checkpoint", "use another checkpoint")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})", "use another checkpoint") from error
    return parse(data, str(path))


def open_file(directory: Path, record: FileRecord, entries: Iterable[Entry]) -> TensorFile:
    """Open a tensor file whose size, header and list of tensors agree with the manifest. Raises CheckpointError where they do not."""
    file = TensorFile(directory / record.file, size=record.size, header=record.header)
    stored = {key: (slot.dtype, slot.shape) for key, slot in file.slots.items()}
    expected = {entry.key: (DTYPES[entry.dtype][0], entry.region.shape) for entry in entries}
    if stored != expected:
        file.close()
        odd = sorted(key for key in stored.keys() | expected.keys() if stored.get(key) != expected.get(key))
        raise CheckpointError(f"{directory / record.file}: tensor {odd[0]!r} is not as the manifest says", DAMAGED)
    return file


def verify(directory: Path, *, share: tuple[int, int] = (0, 1)) -> Report:
    """Read back a checkpoint and compare every byte with its checksum. Damage is reported, not raised.

    `share` (i, n) limits the work to every n-th tensor file from the i-th, for n ranks that divide it; the manifest is always
    checked. Memory: 8 MiB a thread.
    """
    try:
        manifest = read(directory)
        present = sorted(path.name for path in directory.iterdir())
    except CheckpointError as error:
        return Report(directory, None, (error.message,))
    except OSError as error:
        return Report(directory, None, (f"{directory}: cannot be read ({error.strerror})",))
    records = manifest.files[share[0] :: share[1]]
    problems = [problem for record in records for problem in _file_problems(directory, record, manifest.by_file[record.file])]
    listed = {FILE_NAME, *(record.file for record in manifest.files)}
    notes = tuple(f"{name}: not part of the checkpoint" for name in present if name not in listed)
    return Report(directory, manifest, tuple(problems), notes, len(records), sum(record.size for record in records))


def _file_problems(directory: Path, record: FileRecord, entries: Sequence[Entry]) -> list[str]:
    try:
        # The pool is the inner one: its threads have ended before the file is closed, also where one of them failed.
        with open_file(directory, record, entries) as file, ThreadPoolExecutor(threads()) as pool:
            found = list(pool.map(file.checksum, [entry.key for entry in entries]))
    except CheckpointError as error:
        return [error.message]
    except OSError as error:
        return [f"{directory / record.file}: cannot be read ({error.strerror})"]
    return [mismatch(directory, entry) for entry, value in zip(entries, found, strict=True) if value != entry.checksum]


def mismatch(directory: Path, entry: Entry) -> str:
    """The sentence for a piece whose bytes are not the ones written."""
    return f"{directory / entry.file}: {entry.kind} of '{entry.name}' does not match its checksum"
