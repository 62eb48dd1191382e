"""BERT's datasets: sentence pairs from a .bin/.idx pair of sentences, from a blend of them, and generated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right

import numpy as np

from megactl.engine.data.datasets import Blend, check_tokens
from megactl.engine.data.masking import MaskedSample, MaskingRules, MaskingVocabulary, PairMasker
from megactl.errors import DataError
from megactl.storage.indexed import IndexedDataset
from megactl.storage.sentence_index import SPECIAL_TOKENS

# Sentences looked at for the second part of a pair that goes on elsewhere; with one token each they would still fill most sequences.
_MOST_SENTENCES = 512


class PairDataset(ABC):
    """Samples of one or two parts with masked tokens, padded to `seq_length`. Every sample is a pure function of its index.

    `pair`: a sample has two parts and a label that says whether the second one follows the first.
    """

    name: str
    seq_length: int
    vocab_size: int
    pair: bool

    @abstractmethod
    def __len__(self) -> int:
        """Samples."""

    @abstractmethod
    def sample(self, index: int) -> MaskedSample:
        """Sample `index`. Raises IndexError outside [0, len), DataError for an id that is not in the vocabulary."""


class BertDataset(PairDataset):
    """Samples of documents [first, last) of a pair whose sequences are sentences; `rows`: see `storage.sentence_index`.

    `elsewhere`: half of the second parts come from another document (Devlin et al. 2018), a sentence drawn from all others; else half of
    the pairs are in reverse order (Lan et al. 2019, and Megatron).
    """

    def __init__(
        self, data: IndexedDataset, rows: np.ndarray, masker: PairMasker, *, first: int, last: int, seed: int, elsewhere: bool = False
    ) -> None:
        self.name, self.seq_length = str(data.prefix), masker.seq_length
        self.vocab_size, self.pair = masker.vocabulary.size, masker.rules.pair
        self._data, self._rows, self._masker, self._seed = data, rows, masker, seed
        self._elsewhere = elsewhere and self.pair
        self._sentences = int(data.documents[first]), int(data.documents[last])
        if self._elsewhere:
            self._check_elsewhere()

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int) -> MaskedSample:
        """See PairDataset.sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in {self.name}")
        first, last, target = self._rows[index].tolist()
        # Only where it is needed: looking the document up costs a search.
        own = self._document_of(first) if self._elsewhere else (first, first)
        begin, end = self._sentences
        others = end - begin - (own[1] - own[0]) if self._elsewhere else 0
        plan = self._masker.plan((self._seed + index) % 2**32, last - first, others)
        a, b = self._data.sequences(first, first + plan.pivot), self._data.sequences(first + plan.pivot, last)
        if plan.other >= 0:
            start = begin + plan.other
            b = self._continuation(start if start < own[0] else start + own[1] - own[0], target - len(a))
        for part in (a, b):
            if len(part):
                check_tokens(part, self.vocab_size, self.name, index)
        return self._masker.make(plan, a, b, target)

    def _document_of(self, sentence: int) -> tuple[int, int]:
        """Sentences [first, last) of the document that holds one."""
        # Not numpy's search: the index lies unaligned in the file, and numpy would copy all of it each time.
        document = bisect_right(self._data.documents, sentence) - 1
        return int(self._data.documents[document]), int(self._data.documents[document + 1])

    def _continuation(self, start: int, tokens: int) -> np.ndarray:
        """Sentences from `start` on until there are `tokens` of them or the document ends; at least one."""
        last = min(self._document_of(start)[1], start + _MOST_SENTENCES)
        ends = np.cumsum(self._data.lengths[start:last], dtype=np.int64)
        return self._data.sequences(start, min(start + 1 + int(np.searchsorted(ends, max(tokens, 1))), last))

    def _check_elsewhere(self) -> None:
        begin, end = self._sentences
        if begin < end and self._document_of(begin)[1] - begin == end - begin:
            rule = f"{self.name}: this split has one document, and the next sentence of a pair is to come from another one"
            raise DataError(rule, "use --sentence-task sop, or give this split more documents (--split)")


class BlendedPairs(Blend[PairDataset], PairDataset):
    """Samples dealt from several datasets (see Blend)."""

    @property
    def pair(self) -> bool:  # type: ignore[override]
        """See PairDataset."""
        return self.datasets[0].pair

    def sample(self, index: int) -> MaskedSample:
        """See PairDataset.sample."""
        dataset, number = self.pick(index)
        return dataset.sample(number)


class MockPairs(PairDataset):
    """Generated pairs with structure to learn: a sample goes round and round through eight neighbouring ids, its topic.

    Any token in sight gives a masked one away but for eight choices, which a model learns within some hundred steps; the tokens beside
    it, later, entirely. Whether the second part follows the first shows beside [SEP] (or in the topics, where parts come from elsewhere).
    Lengths run from a quarter of the sequence to all of it, so there is padding.
    """

    VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    _TOPIC = 8
    _TOPICS = 64
    _SENTENCE = 24

    def __init__(
        self,
        size: int,
        rules: MaskingRules,
        *,
        seq_length: int,
        vocab_size: int,
        seed: int = 1234,
        stream: int = 0,
        elsewhere: bool = False,
    ) -> None:
        special = len(self.VOCABULARY)
        if vocab_size < special + 3:
            rule = f"generated pairs need at least 3 tokens besides {', '.join(self.VOCABULARY)}"
            raise DataError(f"--vocab-size {vocab_size}: {rule}", f"set --vocab-size {special + 3} or more")
        self.name, self.seq_length, self.vocab_size, self.pair = "mock data", seq_length, vocab_size, rules.pair
        pad, _, cls, sep, mask = range(special)
        self._masker = PairMasker(rules, MaskingVocabulary(vocab_size, cls, sep, mask, pad), seq_length)
        self._size, self._seed, self._elsewhere = size, seed, elsewhere and rules.pair
        self._topic = min(self._TOPIC, vocab_size - special)
        self._topics = min(self._TOPICS, (vocab_size - special) // self._topic)
        # As in MockDataset: streams keep the splits apart.
        self._key = np.array([seed % 2**64, (stream << 56) + (1 << 55)], np.uint64)

    def __len__(self) -> int:
        return self._size

    def sample(self, index: int) -> MaskedSample:
        """See PairDataset.sample."""
        if not 0 <= index < self._size:
            raise IndexError(f"sample {index} of {self._size} in {self.name}")
        # The raw words of a counter-based generator, which numpy promises never to change.
        words = np.random.Philox(key=self._key + np.array([0, index], np.uint64)).random_raw(4).tolist()
        longest = self.seq_length - SPECIAL_TOKENS
        length = max(2, longest - words[0] % max(1, 3 * longest // 4))
        # After whole rounds the end would be followed by the beginning, and a reversed pair look like one in order.
        length -= length % self._topic == 0
        sentences = max(2 if self.pair else 1, length // self._SENTENCE)
        # The splits draw the same for masking, as they do with data of one seed; their tokens differ.
        plan = self._masker.plan((self._seed + index) % 2**32, sentences, 1 if self._elsewhere else 0)
        cut = length * plan.pivot // sentences
        topic, phase = words[1] % self._topics, words[2] % self._topic
        a, b = self._run(topic, phase, cut), self._run(topic, phase + cut, length - cut)
        if plan.other >= 0:
            b = self._run(*self._other(topic, phase + cut, words[3]), length - cut)
        return self._masker.make(plan, a, b, longest)

    def _run(self, topic: int, phase: int, length: int) -> np.ndarray:
        return len(self.VOCABULARY) + topic * self._topic + (phase + np.arange(length)) % self._topic

    def _other(self, topic: int, phase: int, word: int) -> tuple[int, int]:
        """Another topic; where there is one alone, another place in it."""
        if self._topics > 1:
            return (topic + 1 + word % (self._topics - 1)) % self._topics, phase
        return topic, phase + 1 + word % (self._topic - 1)
