"""From paths to runs: opens files however they are packed or encoded, and feeds them through a scanner in flat memory."""

from __future__ import annotations

import codecs
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from typing import Any

from megactl.errors import DataError
from megactl.report.logs.assembly import Assembly
from megactl.report.logs.compressed import Refused, chunks
from megactl.report.logs.records import Run, Unreadable
from megactl.report.logs.scanning import Batch, Scanner, make_scanner

# Values held by the scanner before they are taken over; some megabytes.
_MOST_WAITING = 1 << 17
_SAMPLE = 1 << 16
# Control characters that text has next to none of; and what files start with that are no text.
_CONTROL = re.compile(rb"[\x01-\x06\x0e-\x1a\x1c-\x1f\x7f]")
_MAGIC = ((b"\x7fELF", "a program"), (b"PK\x03\x04", "a zip archive or a PyTorch checkpoint"), (b"\x89PNG", "a picture"),
          (b"\x80\x02", "a pickle"), (b"\x80\x04\x95", "a pickle"), (b"%PDF", "a PDF"), (b"\x89HDF", "an HDF5 file"))  # fmt: skip


def read_runs(
    path: str | os.PathLike[str], *, cap: int = 1 << 16, timers: Collection[str] | None = None, scanner: Scanner | None = None
) -> list[Run]:
    """The runs in one log, at least one. cap: bytes of a line that are looked at. timers: those to keep (None: all).

    scanner: another than the one for this machine; it has its own cap and timers.

    Raises DataError where nothing can be read.
    """
    path = os.fspath(path)
    try:
        return _read(path, scanner or make_scanner(cap, timers))
    except Refused as error:
        raise DataError(f"{path}: {error.reason}", "give the log of a training run") from error


def read_many(
    paths: Iterable[str | os.PathLike[str]], *, cap: int = 1 << 16, timers: Collection[str] | None = None
) -> Iterator[Run | Unreadable]:
    """Every run of every path, in the order given; a path that gives none is one Unreadable, and the rest is still read."""
    for path in map(os.fspath, paths):
        try:
            yield from _read(path, make_scanner(cap, timers))
        except Refused as error:
            yield Unreadable(path, error.kind, error.reason)


def _read(path: str, scanner: Scanner) -> list[Run]:
    warnings: list[str] = []
    assembly = Assembly(path)
    try:
        with open(path, "rb", buffering=0) as file:
            _check(file.fileno())
            for piece in _as_utf8(chunks(file, warnings), warnings):
                if scanner.feed(piece, len(piece)) > _MOST_WAITING:
                    assembly.add(Batch(*scanner.take()))
    except OSError as error:
        raise _refused(error) from error
    scanner.finish()
    assembly.add(Batch(*scanner.take()))
    runs = assembly.finish(scanner.line, is_own=scanner.saw_own_line)
    for run in runs:
        run.warnings += warnings
        if scanner.duplicates:
            run.summary["lines_of_other_ranks"] = scanner.duplicates
    return runs


def _check(descriptor: int) -> None:
    state = os.fstat(descriptor)
    if stat.S_ISREG(state.st_mode) and state.st_size == 0:
        raise Refused("empty", "the file is empty")


def _refused(error: OSError) -> Refused:
    if isinstance(error, FileNotFoundError):
        return Refused("missing", "no such file")
    if isinstance(error, IsADirectoryError):
        return Refused("unreadable", "it is a folder")
    return Refused("unreadable", f"it cannot be read: {error.strerror or error}")


def _as_utf8(pieces: Iterator[Any], warnings: list[str]) -> Iterator[Any]:
    """The pieces as they are, or turned into UTF-8 where they are UTF-16. Raises Refused for what is no text."""
    start = b""
    while len(start) < _SAMPLE and (piece := next(pieces, None)) is not None:
        # A hole at the beginning, which truncating an open log leaves, says nothing about the rest.
        start = (start + bytes(piece)).lstrip(b"\0") if not start else start + bytes(piece)
    if not start:
        raise Refused("empty", "the file is empty" if not warnings else warnings[0])
    name = _utf16(start)
    if name is None:
        _refuse_binary(start)
        yield start.removeprefix(codecs.BOM_UTF8)
        yield from pieces
        return
    warnings.append(f"the file is {name.upper()} and was converted")
    decoder = codecs.getincrementaldecoder(name)("replace")
    for piece in chain([start], pieces):
        yield decoder.decode(bytes(piece)).encode("utf-8", "replace")
    yield decoder.decode(b"", final=True).encode("utf-8", "replace")


def _utf16(start: bytes) -> str | None:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    sample = start[:4096]
    pairs = len(sample) // 2
    # Without a mark: ASCII in UTF-16 has a zero in every second byte.
    for name, zeros in (("utf-16-le", sample[1::2]), ("utf-16-be", sample[::2])):
        if pairs >= 8 and zeros.count(0) > 0.8 * pairs and sample.count(0) < 1.2 * pairs:
            return name
    return None


def _refuse_binary(start: bytes) -> None:
    for magic, what in _MAGIC:
        if start.startswith(magic):
            raise Refused("binary", f"it is {what}, not a text")
    sample = start[:_SAMPLE].replace(b"\0", b"")
    if len(_CONTROL.findall(sample)) * 30 > len(sample):
        raise Refused("binary", "it is not a text")
