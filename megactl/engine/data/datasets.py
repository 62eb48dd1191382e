"""Datasets: sample number to tokens. Every one is a pure function of its index, so a run resumes from the count of consumed samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from megactl.errors import DataError
from megactl.storage.indexed import IndexedDataset
from megactl.storage.sample_index import SampleIndex


class TokenDataset(Protocol):
    """Samples of `seq_length` + 1 tokens: the inputs and, shifted by one, their labels."""

    name: str
    seq_length: int
    vocab_size: int

    def __len__(self) -> int:
        """Samples."""

    def tokens(self, index: int) -> np.ndarray:
        """int64 [seq_length + 1]. Raises IndexError outside [0, len), DataError for an id that is not below vocab_size."""


class GPTDataset:
    """Samples cut from the shuffled documents of a .bin/.idx pair (see `storage.sample_index`)."""

    def __init__(self, data: IndexedDataset, index: SampleIndex, *, seq_length: int, vocab_size: int) -> None:
        self.name = str(data.prefix)
        self.seq_length, self.vocab_size = seq_length, vocab_size
        self._data, self._index = data, index

    def __len__(self) -> int:
        return len(self._index)

    @property
    def epochs(self) -> int:
        """Passes over the documents that the samples span."""
        return self._index.epochs

    def tokens(self, index: int) -> np.ndarray:
        """See TokenDataset.tokens."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.name}")
        row = int(self._index.shuffle[index])
        (first, start), (last, stop) = self._index.samples[row : row + 2].tolist()
        out = np.empty(self.seq_length + 1, np.int64)
        filled = 0
        for position in range(first, last + 1):
            document = int(self._index.documents[position])
            # Including the token at the next row: it is the label of this sample's last input.
            part = self._data.sequence(document, start if position == first else 0, stop + 1 if position == last else None)
            out[filled : filled + len(part)] = part
            filled += len(part)
        assert filled == len(out), "a sample index that does not belong to these documents"
        check_tokens(out, self.vocab_size, self.name, index)
        return out


class _Sized(Protocol):
    """What a blend needs to know of the datasets in it."""

    name: str
    seq_length: int
    vocab_size: int

    def __len__(self) -> int:
        """Samples."""


D = TypeVar("D", bound=_Sized)


class Blend(Generic[D]):
    """Samples dealt from several datasets: sample i is sample `samples[i]` of dataset `choices[i]`."""

    def __init__(self, datasets: Sequence[D], choices: np.ndarray, samples: np.ndarray) -> None:
        assert len(choices) == len(samples) and len({dataset.seq_length for dataset in datasets}) == 1
        self.datasets = tuple(datasets)
        self.name = " + ".join(dataset.name for dataset in datasets)
        self.seq_length = datasets[0].seq_length
        self.vocab_size = max(dataset.vocab_size for dataset in datasets)
        self._choices, self._samples = choices, samples

    def __len__(self) -> int:
        return len(self._choices)

    def pick(self, index: int) -> tuple[D, int]:
        """(dataset, sample within it) of sample `index`. Raises IndexError outside [0, len)."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.name}")
        return self.datasets[int(self._choices[index])], int(self._samples[index])


class BlendedDataset(Blend[TokenDataset]):
    """Token samples dealt from several datasets (see Blend)."""

    def tokens(self, index: int) -> np.ndarray:
        """See TokenDataset.tokens."""
        dataset, number = self.pick(index)
        return dataset.tokens(number)


class MockDataset:
    """Generated tokens with structure to learn: each token is its predecessor plus a fixed stride, except where a run breaks off.

    A run ends with probability 1/8 a token; the next starts anywhere in an alphabet of at most 512 ids, after an end-of-document token
    half of the time (where `eod` is given). A model that learns the stride brings the loss from log(vocab_size) below 1.5 nats.
    """

    _ALPHABET = 512
    _BREAK_EVERY = 8

    def __init__(self, size: int, *, seq_length: int, vocab_size: int, eod: int | None = None, seed: int = 1234, stream: int = 0) -> None:
        # One id may be the end-of-document token, which text never contains.
        usable = vocab_size - (1 if eod is not None and eod < vocab_size else 0)
        if usable < 2:
            raise DataError(
                f"--vocab-size {vocab_size}: generated tokens need at least 2 besides the end of document", "set a larger --vocab-size"
            )
        self.name = "mock data"
        self.seq_length, self.vocab_size, self._size = seq_length, vocab_size, size
        self._eod, self._alphabet = eod, min(usable, self._ALPHABET)
        # `stream` keeps train, valid and test apart; the stride is the same in all of them, or there were nothing to generalise.
        self._key = np.array([seed % 2**64, stream << 56], np.uint64)
        self._stride = 1 + seed % (self._alphabet - 1)

    def __len__(self) -> int:
        return self._size

    def tokens(self, index: int) -> np.ndarray:
        """See TokenDataset.tokens."""
        if not 0 <= index < self._size:
            raise IndexError(f"sample {index} of {self._size} in {self.name}")
        # The raw words of a counter-based generator: numpy promises that they never change, which it does not of its distributions.
        words = np.random.Philox(key=self._key + np.array([0, index], np.uint64)).random_raw(self.seq_length + 1)
        starts = words % self._BREAK_EVERY == 0
        starts[0] = True
        run_start = np.maximum.accumulate(np.where(starts, np.arange(len(words)), 0))
        first = ((words >> np.uint64(8)) % np.uint64(self._alphabet)).astype(np.int64)[run_start]
        tokens = (first + self._stride * (np.arange(len(words)) - run_start)) % self._alphabet
        if self._eod is not None:
            tokens += tokens >= self._eod  # skip the id of the end-of-document token
            ends = np.flatnonzero(starts[1:] & (words[1:] >> np.uint64(63) == 1))
            tokens[ends] = self._eod
        return tokens


def check_tokens(tokens: np.ndarray, vocab_size: int, name: str, index: int) -> None:
    """Raise DataError where an id is not in [0, vocab_size): on a GPU it would read other memory, or stop the run without a name."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        hint = "the data was made with another tokenizer: set --tokenizer or --vocab-size to that one's, or preprocess again"
        raise DataError(f"token {bad} in sample {index} of {name}: must be in [0, {vocab_size})", hint)
