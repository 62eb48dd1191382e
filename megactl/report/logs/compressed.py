"""Bytes of a log as it lies on disk: plain, gzip, bzip2, xz or zstandard, known by their first bytes and never by the name."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

# Small enough to stay in a processor's own cache between reading and scanning.
CHUNK = 1 << 18
_MOST_OUT = 1 << 20


class Refused(Exception):
    """A file that cannot be read as a log: `kind` as in records.Unreadable, and a sentence."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class _Format(NamedTuple):
    name: str
    magic: bytes
    # A decompressor with decompress(data, max_length), eof, needs_input and unused_data.
    make: Callable[[], Any]


class _Gzip:
    """zlib's decompressor with the interface of bz2's and lzma's."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.eof and not self._inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, limit: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, limit)


_FORMATS = (
    _Format("gzip", b"\x1f\x8b", _Gzip),
    _Format("bzip2", b"BZh", bz2.BZ2Decompressor),
    _Format("xz", b"\xfd7zXZ\x00", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)),
)
_ZSTANDARD = b"\x28\xb5\x2f\xfd"


def chunks(file: IO[bytes], warnings: list[str]) -> Iterator[bytes | memoryview]:
    """The content of `file` (opened unbuffered) in pieces; a piece is valid until the next one is asked for.

    What can be read of a damaged or cut compressed file is given, and a sentence is added to `warnings`.
    Raises Refused where not even its beginning can be read, or where the package for its format is missing.
    """
    first = file.read(16)
    for kind in _FORMATS:
        if first.startswith(kind.magic):
            yield from _decompressed(file, first, kind, warnings)
            return
    if first.startswith(_ZSTANDARD):
        yield from _zstandard(file, first, warnings)
        return
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    yield first
    while size := file.readinto(buffer):  # type: ignore[attr-defined]
        yield view[:size]


def _decompressed(file: IO[bytes], first: bytes, kind: _Format, warnings: list[str]) -> Iterator[bytes]:
    given = 0
    data = first
    decompressor = kind.make()
    try:
        while data or not decompressor.needs_input:
            out = decompressor.decompress(data, _MOST_OUT)
            given += len(out)
            if out:
                yield out
            if decompressor.eof:
                # Several members in one file follow each other; logrotate and `cat` make such files.
                data = decompressor.unused_data.lstrip(b"\0") or file.read(CHUNK)
                if not data.startswith(kind.magic):
                    _note_rest(data, kind, warnings)
                    return
                decompressor = kind.make()
            else:
                data = file.read(CHUNK) if decompressor.needs_input else b""
    except (zlib.error, OSError, lzma.LZMAError, EOFError) as error:
        _damaged(given, f"its {kind.name} data is damaged ({error})", warnings)
        return
    _damaged(given, f"its {kind.name} data ends in the middle", warnings)


def _note_rest(rest: bytes, kind: _Format, warnings: list[str]) -> None:
    if rest.strip(b"\0"):
        warnings.append(f"what follows its {kind.name} data is not {kind.name} and was left out")


def _zstandard(file: IO[bytes], first: bytes, warnings: list[str]) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise Refused("unsupported", "it is compressed with zstandard; install megactl[zstd], or unpack it with zstd -d") from None
    given, data = 0, first
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    try:
        while data:
            out = decompressor.decompress(data)
            given += len(out)
            if out:
                yield out
            if not decompressor.eof:
                data = file.read(1 << 16)
                continue
            data = decompressor.unused_data or file.read(1 << 16)
            decompressor = zstandard.ZstdDecompressor().decompressobj()
            if not data:
                return
    except zstandard.ZstdError as error:
        _damaged(given, f"its zstandard data is damaged ({error})", warnings)
        return
    _damaged(given, "its zstandard data ends in the middle", warnings)


def _damaged(given: int, reason: str, warnings: list[str]) -> None:
    if given == 0:
        raise Refused("damaged", reason)
    warnings.append(f"{reason}: only what comes before could be read")
