"""Source text on disk: which files, how they are compressed, and how they are cut into chunks of work that keep their order."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megactl.errors import DataError, MegactlError

_COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
_KINDS = {".txt": "text", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl"}
_FOLDER_KINDS = {".txt", ".jsonl"}
# Compressed input is fed in small steps: a step of well-compressed data grows a thousandfold.
_COMPRESSED_STEP = 1 << 14
_PLAIN_STEP = 1 << 20
_CHUNK_FILES = 256
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Source:
    """One input file: `kind` "text" (one document) or "jsonl" (one a line), `compression` "", "gz" or "zst", `size` in bytes on disk."""

    path: str
    kind: str
    compression: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Position:
    """A place between two chunks: the source, the bytes (uncompressed) and lines of it that lie before."""

    source: int = 0
    offset: int = 0
    line: int = 0


@dataclass(frozen=True)
class Chunk:
    """Work for one call of an encoder: lines of one jsonl file (`data`), or whole text files (`files`). `end` is where the next one starts.

    `disk_bytes` estimates how much of the files on disk lies behind `end`.
    """

    kind: str
    files: tuple[Source, ...]
    data: bytes
    first_line: int
    end: Position
    disk_bytes: int


def find_sources(inputs: Sequence[str | Path], *, as_text: bool = False, patterns: Sequence[str] = ()) -> list[Source]:
    """The files that some files and folders name, in a fixed order: as given, folders sorted and recursive.

    A folder gives its .txt and .jsonl files (also .gz, .zst), with `as_text` every file, with `patterns` those whose name fits one.
    `as_text` takes each file as one document, whatever its name. Raises DataError for what does not exist or fits nothing.
    """
    if not inputs:
        raise DataError("no input files", "name .txt or .jsonl files, or a folder of them")
    found: list[Source] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            found += _folder_sources(path, as_text, patterns)
        else:
            found.append(_source(path, as_text))
    return found


def _folder_sources(folder: Path, as_text: bool, patterns: Sequence[str]) -> list[Source]:
    found = []
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            fits = any(fnmatchcase(name, pattern) for pattern in patterns)
            wanted = fits if patterns else as_text or _suffixes(name)[0] in _FOLDER_KINDS
            if wanted:
                found.append(_source(Path(root, name), as_text))
    if not found:
        rule = f"no file in it fits {', '.join(patterns)}" if patterns else "holds no .txt or .jsonl file (nor .gz or .zst of them)"
        raise DataError(f"{folder}: {rule}", "name the files, or use --as-text with --pattern '*.md'")
    return found


def _suffixes(name: str) -> tuple[str, str]:
    """(suffix of the content, compression): ("jsonl", "gz") for a.jsonl.gz."""
    stem, suffix = os.path.splitext(name)
    compression = _COMPRESSIONS.get(suffix, "")
    return (os.path.splitext(stem)[1] if compression else suffix), compression


def _source(path: Path, as_text: bool) -> Source:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", "name files that exist") from error
    if not path.is_file():
        raise DataError(f"{path}: is not a plain file", "pre-processing reads its input twice after an interruption; name a file")
    suffix, compression = _suffixes(path.name)
    kind = "text" if as_text else _KINDS.get(suffix)
    if kind is None:
        raise DataError(
            f"{path}: has neither of the endings .txt and .jsonl (nor .gz or .zst of them)", "use --as-text to take it as one document"
        )
    return Source(str(path), kind, compression, status.st_size, status.st_mtime_ns)


def read_text(source: Source) -> bytes:
    """A text file's bytes, uncompressed, without a byte-order mark."""
    return b"".join(block for block, _ in read_blocks(source)).removeprefix(_BOM)


def read_chunks(sources: Sequence[Source], start: Position, chunk_bytes: int) -> Iterator[Chunk]:
    """Every chunk from `start` on: whole lines of about `chunk_bytes` in all, or text files grouped up to that size."""
    behind = [0]
    for source in sources:
        behind.append(behind[-1] + source.size)
    index = start.source
    while index < len(sources):
        source = sources[index]
        if source.kind == "jsonl":
            place = start if index == start.source else Position(index)
            yield from _line_chunks(source, place, chunk_bytes, behind[index])
            index += 1
        else:
            last = _group_end(sources, index, chunk_bytes)
            yield Chunk("text", tuple(sources[index:last]), b"", 0, Position(last), behind[last])
            index = last


def _group_end(sources: Sequence[Source], first: int, chunk_bytes: int) -> int:
    size, last = 0, first
    while last < len(sources) and sources[last].kind == "text" and last - first < _CHUNK_FILES and size < chunk_bytes:
        size += sources[last].size
        last += 1
    return last


def _line_chunks(source: Source, start: Position, chunk_bytes: int, disk_before: int) -> Iterator[Chunk]:
    """Lines of one file; the last chunk's end is the start of the next source."""
    offset, line = start.offset, start.line
    held: Chunk | None = None
    for data, disk in _whole_lines(read_blocks(source, offset, min(chunk_bytes, _PLAIN_STEP)), chunk_bytes):
        # Held back by one, because only the last chunk of a file points to the next file.
        if held is not None:
            yield held
        text = data.removeprefix(_BOM) if offset == 0 else data
        first, offset, line = line, offset + len(data), line + data.count(b"\n")
        held = Chunk("jsonl", (source,), text, first, Position(start.source, offset, line), disk_before + disk)
    end = Position(start.source + 1)
    yield Chunk("jsonl", (source,), held.data if held else b"", held.first_line if held else line, end, disk_before + source.size)


def _whole_lines(blocks: Iterable[tuple[bytes, int]], chunk_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Pieces of at least `chunk_bytes` that end with a newline, the last one being what remains; with the bytes of the file read so far."""
    pending: list[bytes] = []
    size = disk = 0
    for block, disk in blocks:
        pending.append(block)
        size += len(block)
        # Looking for the newline in the new block alone keeps a line of gigabytes from being joined again and again.
        cut = block.rfind(b"\n") + 1
        if size >= chunk_bytes and cut:
            pending[-1] = block[:cut]
            yield b"".join(pending), disk
            pending, size = ([block[cut:]], len(block) - cut) if cut < len(block) else ([], 0)
    if size:
        yield b"".join(pending), disk


def read_blocks(source: Source, offset: int = 0, step: int = _PLAIN_STEP) -> Iterator[tuple[bytes, int]]:
    """The uncompressed bytes of a file from `offset` on, each block with the bytes on disk read so far. `step`: bytes read at once.

    Raises DataError for a truncated or damaged compressed file.
    """
    try:
        if not source.compression:
            yield from _plain_blocks(source.path, offset, step)
            return
        for block, disk in _uncompressed(source):
            # A compressed file cannot be entered in the middle: what lies before is read and dropped.
            if offset < len(block):
                yield (block[offset:] if offset else block), disk
            offset = max(0, offset - len(block))
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read ({error})", "check the file") from error


def _plain_blocks(path: str, offset: int, step: int) -> Iterator[tuple[bytes, int]]:
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while block := file.read(step):
            offset += len(block)
            yield block, offset


def _uncompressed(source: Source) -> Iterator[tuple[bytes, int]]:
    """gzip members or zstd frames, one after another. Readers of the libraries take a truncated one for the end; here it is an error."""
    decoder: Any = None
    for read, disk in _plain_blocks(source.path, 0, _COMPRESSED_STEP):
        block = read
        while block:
            decoder = decoder if decoder is not None else _decoder(source)
            try:
                data = decoder.decompress(block)
            except Exception as error:  # zlib.error or zstandard.ZstdError, which cannot be named without importing it
                raise DataError(f"{source.path}: is damaged ({error})", "copy or compress the file again") from error
            if data:
                yield data, disk
            block = decoder.unused_data if decoder.eof else b""
            decoder = None if decoder.eof else decoder
    if decoder is not None:
        raise DataError(f"{source.path}: is truncated: its compressed data has no end", "copy or compress the file again")


def _decoder(source: Source) -> Any:
    if source.compression == "gz":
        return zlib.decompressobj(wbits=31)
    try:
        import zstandard
    except ImportError as error:
        raise MegactlError(f"{source.path}: reading .zst needs the 'zstandard' library", "pip install megactl[zstd]") from error
    return zstandard.ZstdDecompressor().decompressobj()
