"""Reading a checkpoint's bytes back against the checksums it carries; and saying so where it carries none.

megactl's manifest and Megatron-LM's integrity.json (--verify-integrity) have a SHA-256 for every byte. torch.save writes a CRC-32 for each
record of its zip files, which torch itself does not look at when it maps a file into memory. safetensors, torch's older format and DCP's
shards have nothing: for them the structure is checked, which finds a file cut short and not a flipped bit.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megactl.errors import CheckpointError
from megactl.storage import manifest
from megactl.storage.foreign import Limits, OpenFile
from megactl.storage.foreign.torch_file import ZIP_MAGIC
from megactl.storage.foreign.zip_archive import Record, ZipArchive
from megactl.storage.layouts.detect import inspect
from megactl.storage.layouts.inventory import PROBLEM, FileRow, Finding, Inventory
from megactl.storage.strict_json import loads
from megactl.storage.tensor_file import threads

SHA256, CRC32, STRUCTURE = "sha256", "crc32", "structure"
INTEGRITY = "integrity.json"
_CHUNK = 8 * 1024 * 1024
_JSON_LIMIT = 64 * 1024 * 1024
_PLAIN = re.compile(r"[\w.-]{1,200}", re.ASCII)
_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)
_CHANGED = "its bytes are not the ones that were written"


@dataclass(frozen=True)
class FileCheck:
    """How far one file was checked: `method` is sha256, crc32 or structure, `nbytes` what was read back. `problem`: None where good."""

    name: str
    method: str
    nbytes: int
    problem: str | None


@dataclass(frozen=True)
class Verification:
    """What `verify` found: the inventory with its findings, and each file."""

    inventory: Inventory
    files: tuple[FileCheck, ...]

    @property
    def good(self) -> bool:
        """Whether nothing is damaged, missing or unsafe."""
        return self.inventory.good and all(check.problem is None for check in self.files)


def verify(path: Path, limits: Limits | None = None, progress: Callable[[str], None] = lambda name: None) -> Verification:
    """Inspect the checkpoint at `path`, then read every byte that has a checksum. Memory: 8 MiB a thread. `progress` gets each file's name.

    Damage is reported, not raised; CheckpointError where there is no checkpoint at all.
    """
    inventory = inspect(path, limits)
    root = inventory.path if inventory.path.is_dir() else inventory.path.parent
    recorded = _recorded(inventory, root)
    if inventory.system == "megactl":
        return Verification(inventory, _own(inventory, progress))

    def check(row: FileRow) -> FileCheck:
        progress(row.name)
        try:
            return _check(root / row.name, row, recorded.get(row.name))
        except CheckpointError as error:
            return FileCheck(row.name, STRUCTURE, 0, error.message.removeprefix(f"{root / row.name}: "))

    with ThreadPoolExecutor(threads()) as pool:
        checks = list(pool.map(check, inventory.files))
    return Verification(inventory, tuple(checks))


def _own(inventory: Inventory, progress: Callable[[str], None]) -> tuple[FileCheck, ...]:
    """By the manifest, whose own check knows everything there is."""
    progress(manifest.FILE_NAME)
    report = manifest.verify(inventory.path)
    known = {finding.message for finding in inventory.findings}
    for problem in report.problems:
        where, _, message = problem.removeprefix(f"{inventory.path}/").partition(": ")
        # What inspecting has said already (a missing or shortened file) is not said twice.
        if message not in known and where not in {finding.where for finding in inventory.findings} | set(inventory.missing):
            inventory.findings.append(Finding(PROBLEM, where, message))
    bad = {finding.where: finding.message for finding in inventory.findings if finding.severity == PROBLEM}
    rows = [row for row in inventory.files if row.role in ("tensors", "manifest")]
    return tuple(FileCheck(row.name, SHA256, row.size, bad.get(row.name)) for row in rows)


def _recorded(inventory: Inventory, root: Path) -> dict[str, str]:
    """File name -> SHA-256 of Megatron-LM's integrity.json; names that are no plain names are never opened."""
    if not (root / INTEGRITY).is_file():
        return {}
    try:
        with OpenFile(root / INTEGRITY) as file:
            document = loads(file.read(0, min(file.size, _JSON_LIMIT)), INTEGRITY)
    except CheckpointError as error:
        inventory.say(PROBLEM, INTEGRITY, error.message.removeprefix(f"{INTEGRITY}: "))
        return {}
    files = document.get("files") if isinstance(document, dict) and document.get("algorithm", SHA256) == SHA256 else None
    if not isinstance(files, dict) or not all(isinstance(value, str) and _HEX.fullmatch(value) for value in files.values()):
        inventory.say(PROBLEM, INTEGRITY, "is no list of SHA-256 checksums by file")
        return {}
    present = {row.name for row in inventory.files}
    inventory.lacks([name for name in files if _PLAIN.fullmatch(name) and name not in present], f"named in {INTEGRITY}")
    return {name: value for name, value in files.items() if name in present}


def _check(path: Path, row: FileRow, expected: str | None) -> FileCheck:
    with OpenFile(path) as file:
        if expected is not None:
            state = hashlib.sha256()
            _stream(file, 0, file.size, state.update)
            problem = None if state.hexdigest() == expected else f"does not match its SHA-256: {_CHANGED}"
            return FileCheck(row.name, SHA256, file.size, problem)
        # A shard is many archives, one behind the other.
        if row.read and row.role != "shard" and file.size >= 4 and file.read(0, 4) == ZIP_MAGIC:
            return _check_records(file, row)
    return FileCheck(row.name, STRUCTURE, 0, None)


def _check_records(file: OpenFile, row: FileRow) -> FileCheck:
    """Every record with a CRC-32; torch writes none (0) where it was told to."""
    archive, read = ZipArchive(file), 0
    for record in archive.records.values():
        if not record.crc or record.stored != record.size:
            continue
        read += record.size
        if _crc(archive, record) != record.crc:
            return FileCheck(row.name, CRC32, read, f"record {record.name[:80]} does not match its CRC-32: {_CHANGED}")
    return FileCheck(row.name, CRC32 if read else STRUCTURE, read, None)


def _crc(archive: ZipArchive, record: Record) -> int:
    value = 0

    def update(data: bytes) -> None:
        nonlocal value
        value = zlib.crc32(data, value)

    _stream(archive.file, archive.data_start(record), record.stored, update)
    return value


def _stream(file: OpenFile, start: int, length: int, update: Callable[[bytes], None]) -> None:
    for at in range(start, start + length, _CHUNK):
        update(file.read(at, min(_CHUNK, start + length - at)))
