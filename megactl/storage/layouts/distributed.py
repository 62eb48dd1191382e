"""PyTorch's distributed checkpoints (DCP): Megatron-LM's `torch_dist` and `torch_dcp`, FSDP, torchtitan.

    .metadata              a pickle: every tensor with its chunks, and for each chunk file, first byte and length
    __0_0.distcp           the chunks of one writer, one after another (rank, number of the file)
    metadata.json          Megatron-LM: {"sharded_backend": "torch_dist", ...};  common.pt: what is not sharded

torch itself reads `.metadata` with plain pickle, so that opening a stranger's runs its code; here it is read like every other pickle.
Tensor data are never read: what the index says is compared with the sizes of the files.
Source: torch/distributed/checkpoint/{metadata,filesystem}.py; megatron/core/dist_checkpointing/strategies.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Any

from megactl.errors import CheckpointError
from megactl.storage.foreign import Contents
from megactl.storage.foreign.dtypes import TORCH
from megactl.storage.foreign.names import sizes_of
from megactl.storage.foreign.nodes import Global, Mapping, Object
from megactl.storage.layouts import facts
from megactl.storage.layouts.base import number_after
from megactl.storage.layouts.folder import Folder, Planned, add_files, rest
from megactl.storage.layouts.inventory import OTHER, OVERHEAD, PROBLEM, FileRow, Inventory
from megactl.storage.layouts.parts import place_key
from megactl.storage.strict_json import loads

INDEX, COMMON, MARKER = ".metadata", "common.pt", "metadata.json"
_SHARD = r"__(\d+)_(\d+)\.distcp"


@dataclass(frozen=True)
class _Chunk:
    """A stored piece: of which key, its first byte and length in its file, the shape of its tensor and its type (None: bytes)."""

    key: str
    file: str
    start: int
    length: int
    shape: tuple[int, ...]
    dtype: str | None


class Distributed:
    """`.metadata` and `*.distcp`."""

    system = "torch_dist"
    title = "PyTorch distributed checkpoint"

    def matches(self, folder: Folder) -> bool:
        """The index, or shards that have lost it."""
        return INDEX in folder.sizes or bool(folder.matching(_SHARD))

    def inspect(self, folder: Folder) -> Inventory:
        """The index against the files, and Megatron-LM's common.pt."""
        megatron = MARKER in folder.sizes or COMMON in folder.sizes
        title = f"{self.title}, written by Megatron-LM (torch_dist)" if megatron else f"{self.title} (FSDP, torch_dcp)"
        inventory = Inventory(folder.path, self.system, title, iteration=number_after(r"(?:iter_|step[-_]?)(\d+)$", folder.path.name))
        shards = folder.matching(_SHARD)
        inventory.layout["writers"] = len({match[1] for match in shards.values()})
        found: list[_Chunk] = []
        plan = [Planned(name, role) for name, role in ((INDEX, "index"), (COMMON, "common")) if name in folder.sizes]
        others = [item for item in rest(folder, plan) if item.name not in shards]

        def notice(planned: Planned, contents: Contents) -> None:
            if planned.name == INDEX:
                found.extend(_chunks(contents, inventory, folder))
            elif planned.name == COMMON:
                _take_common(inventory, contents)

        add_files(inventory, folder, [*plan, *others], notice)
        _count(inventory, folder, found, {name: int(match[1]) for name, match in shards.items()})
        if INDEX not in folder.sizes:
            inventory.lacks([INDEX], "the index; it is written last, so the save was cut short")
        if MARKER in folder.sizes:
            _check_marker(inventory, folder)
        if megatron:
            inventory.lacks([name for name in (COMMON, MARKER) if name not in folder.sizes], "every torch_dist checkpoint has it")
        return inventory


def _check_marker(inventory: Inventory, folder: Folder) -> None:
    """metadata.json decides how Megatron-LM reads the rest."""
    try:
        document = loads((folder.text(MARKER) or "").encode("utf-8", "replace"), MARKER)
    except CheckpointError as error:
        inventory.say(PROBLEM, MARKER, error.message.removeprefix(f"{MARKER}: "))
        return
    if not isinstance(document, dict) or not isinstance(document.get("sharded_backend"), str):
        inventory.say(PROBLEM, MARKER, "names no sharded_backend")


def _take_common(inventory: Inventory, contents: Contents) -> None:
    args = facts.arguments(contents.tree)
    inventory.layout |= facts.degrees(args)
    iteration = facts.whole(facts.mapping(contents.tree).get("iteration"))
    if iteration is not None and inventory.iteration not in (None, iteration):
        inventory.say(PROBLEM, COMMON, f"is of iteration {iteration}, the folder's name says {inventory.iteration}")
    inventory.iteration = iteration if inventory.iteration is None else inventory.iteration
    inventory.architecture, inventory.unpredictable = facts.from_megatron(args)


def _chunks(contents: Contents, inventory: Inventory, folder: Folder) -> list[_Chunk]:
    """Every stored chunk of the index; what cannot be understood is a problem, not a guess."""
    top = facts.mapping(contents.tree)
    tensors, stored = top.get("state_dict_metadata"), top.get("storage_data")
    if not isinstance(tensors, Mapping) or not isinstance(stored, Mapping):
        inventory.say(PROBLEM, INDEX, "has no lists of tensors and of where they are stored")
        return []
    shapes = _shapes(tensors)
    found, odd = [], 0
    places: Counter[tuple[str, tuple[int, ...] | None]] = Counter()
    for index, where in stored.pairs:
        chunk = _chunk(facts.mapping(index), facts.mapping(where), shapes, places)
        if chunk is None:
            odd += 1
        else:
            found.append(chunk)
    if odd:
        inventory.say(PROBLEM, INDEX, f"{odd} of {len(stored.pairs)} entries cannot be understood")
    expected = {(key, offsets) for key, (_, chunks) in shapes.items() for offsets in (chunks or {None: ()})}
    lost = sorted({key for key, offsets in expected if (key, offsets) not in places})
    if lost:
        inventory.say(PROBLEM, INDEX, f"{len(lost)} tensors have chunks that are stored nowhere, the first is {lost[0][:120]}")
    return found


_Shapes = dict[str, tuple[str | None, dict[tuple[int, ...] | None, tuple[int, ...]]]]


def _shapes(tensors: Mapping) -> _Shapes:
    """key -> (type, {offsets of a chunk: its sizes}); bytes (pickled values) have no type."""
    found: _Shapes = {}
    for key, value in tensors.strings().items():
        fields = facts.mapping(value)
        chunks = fields.get("chunks")
        if not isinstance(chunks, list):
            found[key] = (None, {None: ()})
            continue
        try:
            pieces = [facts.mapping(chunk) for chunk in chunks]
            found[key] = (
                _dtype(fields.get("properties")),
                {sizes_of(piece.get("offsets")): sizes_of(piece.get("sizes")) for piece in pieces},
            )
        except ValueError:
            continue
    return found


def _dtype(properties: Any) -> str | None:
    """The element type in TensorProperties: the first of its state's tuple, or the attribute of older versions."""
    state = properties.state if isinstance(properties, Object) else None
    value = state[0] if isinstance(state, tuple) and state else facts.mapping(properties).get("dtype")
    return value.name if isinstance(value, Global) and value.name in TORCH else None


def _chunk(index: dict[str, Any], where: dict[str, Any], shapes: _Shapes, places: Counter[Any]) -> _Chunk | None:
    key, file = index.get("fqn"), where.get("relative_path")
    start, length = facts.whole(where.get("offset")), facts.whole(where.get("length"))
    if (
        not isinstance(key, str)
        or not isinstance(file, str)
        or key not in shapes
        or start is None
        or length is None
        or min(start, length) < 0
    ):
        return None
    dtype, chunks = shapes[key]
    try:
        offsets = None if index.get("offset") is None or dtype is None else sizes_of(index.get("offset"))
    except ValueError:
        return None
    if offsets not in chunks:
        return None
    places[key, offsets] += 1
    return _Chunk(key, file, start, length, chunks[offsets], dtype)


def _count(inventory: Inventory, folder: Folder, chunks: list[_Chunk], shards: dict[str, int]) -> None:
    """Bytes of the shard files by part; each chunk must lie inside its file and be long enough for its tensor."""
    rows = {name: FileRow(name, "shard", folder.sizes[name], {"rank": rank}, read=bool(chunks)) for name, rank in shards.items()}
    ends: Counter[str] = Counter()
    short: list[str] = []
    for chunk in chunks:
        part, name = place_key(chunk.key) if chunk.dtype is not None else (OTHER if "rng" not in chunk.key else "rng", chunk.key)
        nbytes = prod(chunk.shape) * TORCH[chunk.dtype] if chunk.dtype is not None else chunk.length
        if nbytes > chunk.length:
            short.append(chunk.key)
        row = rows.get(chunk.file)
        ends[chunk.file] = max(ends[chunk.file], chunk.start + chunk.length)
        if row is not None and chunk.start + chunk.length <= row.size:
            # Chunks that overlap would add up to more than the file.
            row.parts[part] += min(nbytes, chunk.length, row.size - row.parts.total())
            inventory.add_parameter((part, name), chunk.dtype or "bytes", chunk.shape, prod(chunk.shape) if chunk.dtype else 0, nbytes)
    for row in rows.values():
        left = row.size - row.parts.total()
        row.parts[OVERHEAD if chunks else "unread"] += max(0, left)
        inventory.files.append(row)
    inventory.lacks(sorted(name for name in ends if name not in folder.sizes), "named in the index")
    for name in sorted(rows):
        if ends[name] > rows[name].size:
            inventory.say(PROBLEM, name, f"{rows[name].size} bytes, the index says at least {ends[name]}: the file was cut short")
        elif chunks and name not in ends:
            inventory.say("warning", name, "nothing in the index points to it; it may be of another save")
    if short:
        inventory.say(PROBLEM, INDEX, f"{len(short)} chunks are shorter than their tensors, the first is of {short[0][:120]}")
