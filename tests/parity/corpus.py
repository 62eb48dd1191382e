"""What the tests train on, in memory: tokens with documents that end at odd places, and sentence pairs of odd lengths."""

from __future__ import annotations

import numpy as np
import torch

from megactl.engine.data.batch import Batch

SEQ_LENGTH = 16
# Not a multiple of 128: the vocabulary is padded, and at tensor parallel 4 and 8 some ranks hold padding alone.
VOCAB_SIZE = 50
EOD = 7


class Corpus:
    """A TokenDataset over random tokens. Every sample has another number of end-of-document tokens, from none to many."""

    name = "parity corpus"
    seq_length, vocab_size = SEQ_LENGTH, VOCAB_SIZE

    def __init__(self, samples: int, seed: int = 5) -> None:
        generator = np.random.default_rng(seed)
        self._rows = generator.integers(0, VOCAB_SIZE, (samples, SEQ_LENGTH + 1))
        self._rows[self._rows == EOD] = 8
        # A share of its own for each sample makes the number of unmasked tokens differ between micro-batches and replicas.
        share = generator.random((samples, 1)) * 0.5
        self._rows[generator.random(self._rows.shape) < share] = EOD
        # A micro-batch without a single unmasked token, in a place where every global batch has others beside it.
        self._rows[6:8] = EOD

    def __len__(self) -> int:
        return len(self._rows)

    def tokens(self, index: int) -> np.ndarray:
        """int64 [seq_length + 1]."""
        return self._rows[index]


class PairCorpus:
    """Sentence pairs for an encoder. Every sample has another length (where `padding`), another cut and another number of masked tokens."""

    def __init__(self, samples: int, *, padding: bool, seed: int = 6) -> None:
        generator = np.random.default_rng(seed)
        shape, positions = (samples, SEQ_LENGTH), np.arange(SEQ_LENGTH)
        lengths = generator.integers(5, SEQ_LENGTH + 1, (samples, 1)) if padding else np.full((samples, 1), SEQ_LENGTH)
        cuts = generator.integers(2, lengths - 1)
        self._padding_mask = positions < lengths
        self._tokens, self._labels = (generator.integers(1, VOCAB_SIZE, shape) * self._padding_mask for _ in range(2))
        self._token_types = (positions >= cuts) * self._padding_mask
        share = generator.random((samples, 1)) * 0.6
        self._loss_mask = (generator.random(shape) < share) & self._padding_mask
        # A micro-batch without a single masked token, in a place where every global batch has others beside it.
        self._loss_mask[6:8] = False
        self._sentence_labels = generator.integers(0, 2, samples)

    def batch(self, first: int, count: int) -> Batch:
        """Samples [first, first + count)."""
        rows = slice(first, first + count)
        integers = (self._tokens, self._labels, self._token_types, self._sentence_labels)
        tokens, labels, token_types, sentence_labels = (torch.from_numpy(array[rows].astype(np.int64)) for array in integers)
        return Batch(
            tokens, labels, torch.from_numpy(self._loss_mask[rows].astype(np.float32)), torch.arange(SEQ_LENGTH).expand(count, -1).clone(),
            segments=None, token_types=token_types, padding_mask=torch.from_numpy(self._padding_mask[rows].copy()),
            sentence_labels=sentence_labels,
        )  # fmt: skip
