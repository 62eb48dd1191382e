"""Reading a .bin/.idx pair through the page cache. Everything the index claims is checked once, when it is opened."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from megactl.errors import DataError
from megactl.storage.dataset_metadata import DatasetMetadata, read_metadata
from megactl.storage.indexed_format import HEADER, bin_path, clean_prefix, idx_path, unpack_header

# Checks run over blocks that fit the cache: several passes over a block then cost one pass over memory.
_BLOCK = 1 << 16
_AGAIN = "preprocess the data again, or copy both files again"


class IndexedDataset:
    """A memory-mapped pair. `lengths` int32 [S] tokens, `offsets` int64 [S] bytes, `documents` int64 [D] first sequences.

    Raises DataError where a file is missing, empty, truncated, or contradicts itself or the other one. Safe to share between threads.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = clean_prefix(prefix)
        self._index = _map(idx_path(self.prefix), self.prefix)
        self.dtype, sequences, boundaries = unpack_header(self._index[: HEADER.size].tobytes(), idx_path(self.prefix))
        self._split_index(sequences, boundaries)
        self.num_tokens = self._check_pointers()
        self._check_documents()
        self._tokens = self._map_tokens()
        self.metadata: DatasetMetadata | None = read_metadata(self.prefix)
        self._check_metadata()

    def __len__(self) -> int:
        """Sequences (for GPT data: documents)."""
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        """Documents: runs of sequences."""
        return len(self.documents) - 1

    @property
    def holds_sentences(self) -> bool:
        """Whether a sequence is a sentence: as recorded, or where nothing is recorded because some document has several sequences."""
        recorded = self.metadata.split_sentences if self.metadata is not None else None
        return recorded if recorded is not None else len(self) > int(np.count_nonzero(np.diff(self.documents)))

    def sequence(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of one sequence: a read-only view in the file's data type. Raises IndexError out of range."""
        if not 0 <= index < len(self.lengths):
            raise IndexError(f"sequence {index} of {len(self.lengths)}")
        length = int(self.lengths[index])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"tokens [{start}, {stop}) of sequence {index}, which has {length}")
        first = int(self.offsets[index]) // self.dtype.itemsize
        return self._tokens[first + start : first + stop]

    def sequences(self, first: int, last: int) -> np.ndarray:
        """Every token of sequences [first, last), which lie one after another: a read-only view. Raises IndexError out of range."""
        if not 0 <= first <= last <= len(self.lengths):
            raise IndexError(f"sequences {first} to {last} of {len(self.lengths)}")
        if first == last:
            return self._tokens[:0]
        start, end = int(self.offsets[first]), int(self.offsets[last - 1]) + int(self.lengths[last - 1]) * self.dtype.itemsize
        return self._tokens[start // self.dtype.itemsize : end // self.dtype.itemsize]

    def document(self, index: int) -> np.ndarray:
        """Every token of one document, a view."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        return self.sequences(int(self.documents[index]), int(self.documents[index + 1]))

    def blocks(self, tokens: int = 1 << 22) -> list[tuple[int, int]]:
        """Token ranges that cover the .bin, for a scan with bounded memory (see `token_range`)."""
        return [(start, min(start + tokens, self.num_tokens)) for start in range(0, self.num_tokens, tokens)]

    def token_range(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the .bin, across sequences: a view."""
        return self._tokens[start:stop]

    def _split_index(self, sequences: int, boundaries: int) -> None:
        """Views into the index, after its size has been checked against its own counts."""
        path, size = idx_path(self.prefix), len(self._index)
        # Python integers: counts from a damaged header may be anything below 2^64, and must not overflow.
        plain = HEADER.size + 12 * sequences + 8 * boundaries
        if size not in (plain, plain + sequences):
            state = "truncated" if size < plain else "too long"
            raise DataError(
                f"{path}: is {state}: {sequences} sequences and {boundaries} boundaries need {plain} bytes, it has {size}", _AGAIN
            )
        lengths_end, offsets_end = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences
        self.lengths = self._index[HEADER.size : lengths_end].view("<i4")
        self.offsets = self._index[lengths_end:offsets_end].view("<i8")
        self.documents = self._index[offsets_end:plain].view("<i8")
        self.modes = self._index[plain:].view("i1") if size > plain else None

    def _check_pointers(self) -> int:
        """Lengths are not negative and each offset is the sum of the lengths before it; returns the number of tokens."""
        path = idx_path(self.prefix)
        # Data type code 7 changed its meaning; the offsets, being in bytes, show which one was meant.
        if self.dtype == np.dtype("<f4") and bin_path(self.prefix).exists():
            total = int(self.lengths.sum(dtype=np.int64))
            if total and bin_path(self.prefix).stat().st_size == 8 * total:
                self.dtype = np.dtype("<f8")
        tokens = 0
        for start in range(0, len(self.lengths), _BLOCK):
            lengths = self.lengths[start : start + _BLOCK].astype(np.int64)
            if lengths.min() < 0:
                bad = start + int(np.argmax(lengths < 0))
                raise DataError(f"{path}: sequence {bad} has length {self.lengths[bad]}; a length is at least 0", _AGAIN)
            ends = np.cumsum(lengths)
            wrong = self.offsets[start : start + _BLOCK] != (ends - lengths + tokens) * self.dtype.itemsize
            if wrong.any():
                bad = start + int(np.argmax(wrong))
                rule = "each offset is the end of the sequence before it"
                raise DataError(f"{path}: sequence {bad} starts at byte {self.offsets[bad]}; {rule}", _AGAIN)
            tokens += int(ends[-1])
        return tokens

    def _check_documents(self) -> None:
        """The document index starts at 0, never falls, and ends at the number of sequences."""
        path, sequences = idx_path(self.prefix), len(self.lengths)
        if not len(self.documents):
            raise DataError(f"{path}: has no document index; it holds at least the boundary 0", _AGAIN)
        if int(self.documents[0]) != 0 or int(self.documents[-1]) != sequences:
            found = f"runs from {self.documents[0]} to {self.documents[-1]}"
            hint = "the program that wrote it must end each document (end_document); " + _AGAIN
            raise DataError(f"{path}: the document index {found}; it must run from 0 to the {sequences} sequences", hint)
        for start in range(0, len(self.documents) - 1, _BLOCK):
            part = self.documents[start : start + _BLOCK + 1]
            falls = part[1:] < part[:-1]
            if falls.any():
                bad = start + int(np.argmax(falls))
                found = f"goes from {self.documents[bad]} back to {self.documents[bad + 1]}"
                raise DataError(f"{path}: the document index {found} at document {bad}; it must not fall", _AGAIN)

    def _map_tokens(self) -> np.ndarray:
        path, needed = bin_path(self.prefix), self.num_tokens * self.dtype.itemsize
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); an .idx needs its .bin", _AGAIN) from error
        if size != needed:
            state = "truncated" if size < needed else "too long"
            raise DataError(f"{path}: is {state}: the index describes {self.num_tokens} tokens = {needed} bytes, it has {size}", _AGAIN)
        if not needed:
            return np.zeros(0, self.dtype)
        return _map(path, self.prefix).view(self.dtype)

    def _check_metadata(self) -> None:
        """The counts in `P.json` catch what the pair alone cannot: an .idx and .bin of another, equally valid run."""
        if self.metadata is None:
            return
        found = {"documents": self.num_documents, "sequences": len(self), "tokens": self.num_tokens, "dtype": self.dtype.name}
        for key, value in found.items():
            recorded = getattr(self.metadata, key)
            if value != recorded:
                hint = "the three files must come from one run: " + _AGAIN
                raise DataError(f"{self.prefix}.json: {key} = {recorded}, but the pair has {value}", hint)


def _map(path: Path, prefix: Path) -> np.ndarray:
    """A read-only map of a file's bytes, uint8."""
    try:
        size = path.stat().st_size
        return np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    except FileNotFoundError as error:
        raise DataError(f"{path}: does not exist", _missing_hint(prefix)) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})", "name the prefix of a .bin/.idx pair") from error


def _missing_hint(prefix: Path) -> str:
    """Names a pair that the user may have meant: the output prefix alone lacks `_text_document`."""
    near = sorted(prefix.parent.glob(f"{_escaped(prefix.name)}*.idx")) if prefix.parent.is_dir() else []
    if near:
        return f"did you mean {near[0].with_suffix('')}? (the prefix of a pair is the name without .idx)"
    if not prefix.parent.is_dir():
        return f"there is no folder {prefix.parent}"
    return "make the pair with: megactl data preprocess FILE --output-prefix P --tokenizer byte"


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in blocks."""
    with path.open("rb", buffering=0) as file:
        # The kernel may drop what was read: a checksum of a large file must not push everything else out of the page cache.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return hashlib.file_digest(file, "sha256").hexdigest()
