"""Writing a .bin/.idx pair: streaming, resumable after a kill, and in place only when complete."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from megactl.errors import DataError
from megactl.storage.durable import sync_folder
from megactl.storage.indexed_format import CODES, HEADER, MAGIC, VERSION, bin_path, idx_path

_BLOCK = 1 << 20


@dataclass(frozen=True)
class WriterPosition:
    """How far a writer has got: enough to cut its files back to this point and go on."""

    bytes: int = 0
    sequences: int = 0
    documents: int = 0


class IndexedWriter:
    """Collects sequences beside the final names (`.bin.partial` and two lists for the index) and puts the pair in place in `finish`.

    With `resume` the partial files of an earlier writer are cut back to that position and continued.
    """

    def __init__(self, prefix: Path, dtype: np.dtype, *, resume: WriterPosition | None = None) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise DataError(f"data type {dtype}: an index cannot describe it", "use uint16 or int32")
        self._position = resume or WriterPosition()
        self._open_document = 0
        position = self._position
        sizes = {"bin": position.bytes, "lengths": 4 * position.sequences, "documents": 8 * position.documents}
        self._files = {name: _open_partial(path, sizes[name], resume is not None) for name, path in self.partial_paths(prefix).items()}

    @staticmethod
    def partial_paths(prefix: Path) -> dict[str, Path]:
        """The files a writer keeps until the pair is complete."""
        return {
            "bin": prefix.with_name(prefix.name + ".bin.partial"),
            "lengths": prefix.with_name(prefix.name + ".lengths.partial"),
            "documents": prefix.with_name(prefix.name + ".documents.partial"),
        }

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray, sequences: np.ndarray | None = None) -> None:
        """Append documents: `tokens` [sum of lengths] in the writer's data type, `lengths` int32 [n] of the sequences.

        `sequences` [documents]: how many sequences each document has, summing to n; None: one each.
        """
        assert tokens.dtype == self.dtype and tokens.size == int(lengths.sum(dtype=np.int64))
        counts = np.ones(len(lengths), np.int64) if sequences is None else sequences
        assert int(counts.sum(dtype=np.int64)) == len(lengths)
        ends = (np.cumsum(counts, dtype=np.int64) + self._position.sequences).astype("<i8")
        self._append(tokens, lengths.astype("<i4"), ends)

    def add_sequence(self, tokens: np.ndarray) -> None:
        """Append one sequence to the open document. Raises DataError where a token does not fit the data type."""
        array = np.asarray(tokens)
        if array.size and (int(array.min()) < np.iinfo(self.dtype).min or int(array.max()) > np.iinfo(self.dtype).max):
            raise DataError(f"tokens from {array.min()} to {array.max()}: do not fit {self.dtype.name}", "use a larger data type")
        self._append(array.astype(self.dtype), np.array([array.size], "<i4"), np.zeros(0, "<i8"))
        self._open_document += 1

    def end_document(self) -> None:
        """Close the document that `add_sequence` filled."""
        self._append(np.zeros(0, self.dtype), np.zeros(0, "<i4"), np.array([self._position.sequences], "<i8"))
        self._open_document = 0

    def _append(self, tokens: np.ndarray, lengths: np.ndarray, document_ends: np.ndarray) -> None:
        for name, array in (("bin", tokens), ("lengths", lengths), ("documents", document_ends)):
            self._files[name].write(memoryview(np.ascontiguousarray(array)).cast("B") if array.size else b"")
        was = self._position
        self._position = WriterPosition(was.bytes + tokens.nbytes, was.sequences + lengths.size, was.documents + document_ends.size)

    @property
    def position(self) -> WriterPosition:
        """How far the writer has got; safe to resume from after the next `flush`."""
        return self._position

    def flush(self) -> WriterPosition:
        """Put everything on disk; the position returned is safe to resume from."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return self._position

    def close(self) -> None:
        """Close the files and leave them for a later resume."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def finish(self) -> None:
        """Write the index and rename the pair into place. The caller has closed every document."""
        assert not self._open_document, "end_document was not called after the last add_sequence"
        position = self.flush()
        self.close()
        complete_pair(self.prefix, self.dtype, position)


def complete_pair(prefix: Path, dtype: np.dtype, position: WriterPosition) -> None:
    """The last step of a writer. It may be repeated after a kill at any point inside it, until `remove_partials`."""
    paths = IndexedWriter.partial_paths(prefix)
    beside = prefix.with_name(prefix.name + ".idx.partial")
    with beside.open("wb") as file:
        _write_index(file, paths, dtype, position)
        file.flush()
        os.fsync(file.fileno())
    # Absent: an earlier attempt was killed after this rename; then the final file has the size the position promises.
    if paths["bin"].exists():
        os.replace(paths["bin"], bin_path(prefix))
    elif not bin_path(prefix).exists() or bin_path(prefix).stat().st_size != position.bytes:
        raise DataError(f"{bin_path(prefix)}: was changed while it was being completed", "delete it and preprocess again")
    os.replace(beside, idx_path(prefix))
    sync_folder(prefix.parent)


def remove_partials(prefix: Path) -> None:
    """Delete what a writer left beside the pair."""
    for path in (*IndexedWriter.partial_paths(prefix).values(), prefix.with_name(prefix.name + ".idx.partial")):
        path.unlink(missing_ok=True)


def _write_index(file: BinaryIO, paths: dict[str, Path], dtype: np.dtype, position: WriterPosition) -> None:
    file.write(HEADER.pack(MAGIC, VERSION, CODES[np.dtype(dtype)], position.sequences, position.documents + 1))
    lengths = np.memmap(paths["lengths"], "<i4", "r", shape=(position.sequences,)) if position.sequences else np.zeros(0, "<i4")
    documents = np.memmap(paths["documents"], "<i8", "r", shape=(position.documents,)) if position.documents else np.zeros(0, "<i8")
    for start in range(0, len(lengths), _BLOCK):
        file.write(lengths[start : start + _BLOCK].tobytes())
    offset = 0
    for start in range(0, len(lengths), _BLOCK):
        ends = np.cumsum(lengths[start : start + _BLOCK], dtype=np.int64) * np.dtype(dtype).itemsize
        file.write((offset + np.concatenate(([0], ends[:-1]))).astype("<i8").tobytes())
        offset += int(ends[-1])
    file.write(np.zeros(1, "<i8").tobytes())
    for start in range(0, len(documents), _BLOCK):
        file.write(documents[start : start + _BLOCK].tobytes())


def _open_partial(path: Path, size: int, resume: bool) -> BinaryIO:
    """A file open at `size` bytes, cut there. Raises DataError where it has fewer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if resume and not path.exists():
        raise DataError(f"{path}: is missing, the state file says it has {size} bytes", "delete the state file and preprocess again")
    file = path.open("r+b" if resume else "w+b")
    found = file.seek(0, os.SEEK_END)
    if found < size:
        file.close()
        raise DataError(f"{path}: has {found} bytes, the state file says {size}", "delete the partial files and preprocess again")
    file.truncate(size)
    file.seek(size)
    return file
