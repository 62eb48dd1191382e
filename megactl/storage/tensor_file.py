"""Safetensors files, byte by byte: what the manifest needs and the safetensors package does not offer.

Written in a stream (a bounded share of the tensors in host memory, hashed by threads while the disk works, then fsync), and read by range
with the position of every byte known, so that checksums cover the header as well as the data. The format is safetensors' own, and
its package reads what is written here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megactl.errors import CheckpointError
from megactl.storage import durable
from megactl.storage.strict_json import DAMAGED, Fields, loads

ALGORITHM = "sha256"
# Our name of a type -> (safetensors' name, bytes per element).
DTYPES = {"float64": ("F64", 8), "float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
# safetensors refuses larger headers, so that a damaged length cannot ask for the whole memory.
HEADER_LIMIT = 100_000_000
_DIMENSIONS, _ELEMENTS = 64, 1 << 62
# Bytes of host copies that may wait for their checksum: bounds memory where tensors come from a device.
_PENDING_LIMIT = 512 * 1024 * 1024
_CHUNK = 8 * 1024 * 1024


@dataclass(frozen=True)
class Part:
    """A tensor to be written. `data` gives its bytes (row-major, little endian) when their turn comes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    data: Callable[[], memoryview]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Written:
    """What was written: file size in bytes, checksum of the header, checksum of each tensor by key (hexadecimal)."""

    size: int
    header: str
    tensors: dict[str, str]


def threads() -> int:
    """Threads for checksums: beyond a few, the disk is the limit, and other ranks share the machine."""
    return min(8, len(os.sched_getaffinity(0)))


def digest(data: bytes | bytearray | memoryview) -> str:
    """SHA-256 of `data` in hexadecimal; releases the interpreter lock, so threads run it in parallel."""
    return hashlib.sha256(data).hexdigest()


def _header(parts: Sequence[Part]) -> bytes:
    """Length and JSON of the header, padded to 8 bytes so that the data which follows is aligned."""
    table, offset = {}, 0
    for part in parts:
        table[part.key] = {"dtype": DTYPES[part.dtype][0], "shape": list(part.shape), "data_offsets": [offset, offset + part.nbytes]}
        offset += part.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(path: Path, parts: Sequence[Part]) -> Written:
    """Write a new safetensors file; its bytes are on disk when this returns. Raises OSError. Keys must differ."""
    # Wider types first: every tensor then starts at a multiple of its own element size.
    parts = sorted(parts, key=lambda part: -DTYPES[part.dtype][1])
    assert len({part.key for part in parts}) == len(parts), "two parts share a key"
    header = _header(parts)
    descriptor = durable.create(path)
    try:
        durable.write_all(descriptor, header)
        checksums = _write_parts(descriptor, parts)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Written(len(header) + sum(part.nbytes for part in parts), digest(header), checksums)


def _write_parts(descriptor: int, parts: Sequence[Part]) -> dict[str, str]:
    """Copy out, hash and write at once: this thread takes the copies (they belong to its device stream), one thread writes in order."""
    checksums: dict[str, Future[str]] = {}
    waiting: deque[tuple[Future[str], Future[None], int]] = deque()
    pending = 0

    def finish_oldest() -> int:
        checksum, written, size = waiting.popleft()
        checksum.result()
        written.result()
        return size

    with ThreadPoolExecutor(threads()) as hashers, ThreadPoolExecutor(1) as writer:
        for part in parts:
            while waiting and pending + part.nbytes > _PENDING_LIMIT:
                pending -= finish_oldest()
            data = part.data()
            assert data.nbytes == part.nbytes, f"{part.key}: {data.nbytes} bytes for {part.nbytes}"
            checksums[part.key] = hashers.submit(digest, data)
            waiting.append((checksums[part.key], writer.submit(durable.write_all, descriptor, data), part.nbytes))
            pending += part.nbytes
        while waiting:
            finish_oldest()
    return {key: future.result() for key, future in checksums.items()}


@dataclass(frozen=True)
class Slot:
    """A tensor inside a file: safetensors' type name, shape, first byte from the start of the file, size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class TensorFile:
    """An open safetensors file. A context manager; reads are positioned, so threads may share it."""

    def __init__(self, path: Path, *, size: int, header: str) -> None:
        """Open and check against the manifest: `size` in bytes, `header` its checksum. Raises CheckpointError where they differ."""
        self.path = path
        self.descriptor = durable.open_regular(path)
        try:
            self.slots = self._read_slots(size, header)
        except BaseException:
            os.close(self.descriptor)
            raise

    def _read_slots(self, size: int, header: str) -> dict[str, Slot]:
        found = os.fstat(self.descriptor).st_size
        if found != size:
            hint = "the file was truncated or replaced; use another checkpoint"
            raise CheckpointError(f"{self.path}: {found} bytes, the manifest says {size}", hint)
        length_bytes = self.read(0, min(8, size))
        length = int.from_bytes(length_bytes, "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise CheckpointError(f"{self.path}: header of {length} bytes does not fit the file", DAMAGED)
        text = self.read(8, length)
        if digest(length_bytes + text) != header:
            raise CheckpointError(f"{self.path}: the header does not match its checksum", DAMAGED)
        return parse_header(text, size, str(self.path))

    def read(self, start: int, nbytes: int) -> bytearray:
        """`nbytes` bytes from byte `start` of the file."""
        buffer = bytearray(nbytes)
        durable.read_exactly(self.descriptor, memoryview(buffer), start, self.path)
        return buffer

    def read_into(self, key: str, view: memoryview, offset: int = 0) -> None:
        """Fill `view` with bytes of the tensor `key`, from byte `offset` of its data."""
        durable.read_exactly(self.descriptor, view, self.slots[key].start + offset, self.path)

    def checksum(self, key: str) -> str:
        """Checksum of a tensor's bytes as they are on disk, in constant memory."""
        slot, state, at = self.slots[key], hashlib.sha256(), 0
        buffer = memoryview(bytearray(min(_CHUNK, slot.nbytes)))
        while at < slot.nbytes:
            part = buffer[: min(_CHUNK, slot.nbytes - at)]
            self.read_into(key, part, at)
            state.update(part)
            at += len(part)
        return state.hexdigest()

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def parse_header(text: bytes, size: int, source: str, *, widths: Mapping[str, int] | None = None, least: int = 1) -> dict[str, Slot]:
    """The tensors of a file of `size` bytes from its header's JSON. They must tile the data exactly, as the format demands.

    `widths` are the types allowed with their bytes per element (default: those megactl writes), `least` the smallest dimension.
    """
    table = loads(bytes(text), source)
    if not isinstance(table, dict):
        raise CheckpointError(f"{source}: the header must be an object", DAMAGED)
    table.pop("__metadata__", None)
    base, slots = 8 + len(text), {}
    widths = dict(DTYPES.values()) if widths is None else widths
    for key, value in table.items():
        fields = Fields(value, f"{source}: {key}")
        dtype, shape, offsets = fields.choice("dtype", tuple(widths)), fields.integers("shape", least), fields.items("data_offsets")
        fields.done()
        # The product of a long list of large numbers takes for ever.
        if len(shape) > _DIMENSIONS or any(size > _ELEMENTS for size in shape):
            raise fields.error("shape", shape, f"must have at most {_DIMENSIONS} dimensions of at most {_ELEMENTS}")
        nbytes = prod(shape) * widths[dtype]
        if len(offsets) != 2 or any(type(at) is not int for at in offsets) or offsets[1] - offsets[0] != nbytes or offsets[0] < 0:
            raise fields.error("data_offsets", offsets, f"must be two whole numbers {nbytes} apart")
        slots[key] = Slot(dtype, shape, base + offsets[0], nbytes)
    end = base
    for key, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if slot.start != end:
            raise CheckpointError(f"{source}: {key} starts at byte {slot.start}, must start at {end}", DAMAGED)
        end += slot.nbytes
    if end != size:
        raise CheckpointError(f"{source}: {size} bytes, its tensors end at {end}", DAMAGED)
    return slots
