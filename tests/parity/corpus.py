"""The tokens the tests train on: a list in memory, with documents that end at odd places."""

from __future__ import annotations

import numpy as np

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
