"""From the sentences of a BERT sample to what the model reads: order of the two parts, truncation, special tokens, masked tokens.

Devlin et al. 2018 (15 %, of which 80 % [MASK], 10 % random, 10 % unchanged), with whole words and n-grams as Megatron-Core draws them: for
the same seed the samples are its own, number for number. Each sample has a generator of its own, RandomState((seed + index) mod 2^32), so
it depends on nothing but its index. Compiled in masked_sample.cpp; the functions here without it are the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megactl.storage.native import native_module
from megactl.storage.sentence_index import SPECIAL_TOKENS


@dataclass(frozen=True)
class MaskingVocabulary:
    """Ids that masking needs. `continues` bool [size], True where a token continues the word before it; None: every token is a word."""

    size: int
    cls: int
    sep: int
    mask: int
    pad: int
    continues: np.ndarray | None = None


@dataclass(frozen=True)
class MaskingRules:
    """`probability`: share of tokens to mask; `ngrams`: at most so many words at a time, n of them with weight 1/n.

    `pair`: two parts and a label, else one part. `whole_words`: the tokens of a word are masked together.
    """

    probability: float = 0.15
    ngrams: int = 3
    whole_words: bool = True
    pair: bool = True

    def sizes(self) -> np.ndarray:
        """Cumulative probability of masking 1, 2, ... words at a time, float64 [ngrams]."""
        weights = 1.0 / (np.arange(self.ngrams) + 1)
        shares = weights / weights.sum()
        # Twice, as numpy's `choice` does with what Megatron gives it: a rounding more or less could move a draw.
        shares = shares / shares.sum()
        cumulative = shares.cumsum()
        return cumulative / cumulative[-1]


class Plan(NamedTuple):
    """How a sample is to be cut: sentences [0, pivot) are one part and the rest the other. `state`: the generator, to go on with.

    `flag`: the second part does not follow the first. `other`: a sentence elsewhere in [0, others) that starts the second part, or -1: then
    the two parts change places.
    """

    pivot: int
    flag: bool
    other: int
    state: object


class MaskedSample(NamedTuple):
    """One sample of s positions: tokens, token_types, labels int64 [s]; loss_mask float32 [s], 1 at masked tokens; `length` before padding.

    `flag`: see Plan; always False for a sample of one part.
    """

    tokens: np.ndarray
    token_types: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    length: int
    flag: bool


class PairMasker:
    """Makes samples by fixed rules; without state, so threads may share it."""

    def __init__(self, rules: MaskingRules, vocabulary: MaskingVocabulary, seq_length: int) -> None:
        assert seq_length >= SPECIAL_TOKENS + 2 and rules.ngrams >= 1 and 0 < rules.probability < 1
        self.rules, self.vocabulary, self.seq_length = rules, vocabulary, seq_length
        self._sizes = rules.sizes()
        self._special = np.array([vocabulary.size, vocabulary.cls, vocabulary.sep, vocabulary.mask], np.int64)
        whole = vocabulary.continues if rules.whole_words and vocabulary.continues is not None else np.zeros(0, bool)
        self._continues = np.ascontiguousarray(whole, np.uint8)
        assert len(whole) in (0, vocabulary.size)

    def plan(self, seed: int, sentences: int, others: int = 0) -> Plan:
        """The first draws of the sample `seed` (a number below 2^32) of so many sentences. `others` > 0: part two may be replaced."""
        native = native_module()
        if native is not None:
            key = np.empty(624, np.uint32)
            pivot, flag, other, position = native.plan_pair(key, seed, sentences, self.rules.pair, others)
            return Plan(pivot, flag, other, (key, position))
        random = np.random.RandomState(seed)
        if not self.rules.pair:
            return Plan(sentences, False, -1, random)
        pivot = int(random.randint(1, sentences)) if sentences >= 3 else 1
        flag = bool(random.random_sample() < 0.5)
        other = int(random.random_sample() * others) if flag and others else -1
        return Plan(pivot, flag, other, random)

    def make(self, plan: Plan, first: np.ndarray, second: np.ndarray, target: int) -> MaskedSample:
        """The sample of two parts in reading order (int arrays; ids below the vocabulary's size), at most `target` of their tokens."""
        a, b = np.ascontiguousarray(first, np.int64), np.ascontiguousarray(second, np.int64)
        if plan.flag and plan.other < 0:
            a, b = b, a
        native = native_module()
        if native is None:
            return self._make_python(plan, a, b, target)
        out, loss_mask = np.empty((3, self.seq_length), np.int64), np.empty(self.seq_length, np.float32)
        key, position = plan.state
        arguments = (key, position, a, b, target, self._special, self._continues, self.rules.probability, self._sizes)
        length = native.mask_pair(*arguments, out, loss_mask)
        return self._padded(out, loss_mask, length, plan.flag)

    def _padded(self, out: np.ndarray, loss_mask: np.ndarray, length: int, flag: bool) -> MaskedSample:
        out[0, length:] = self.vocabulary.pad
        return MaskedSample(out[0], out[1], out[2], loss_mask, length, flag)

    def _make_python(self, plan: Plan, a: np.ndarray, b: np.ndarray, target: int) -> MaskedSample:
        random = plan.state
        assert isinstance(random, np.random.RandomState)
        a, b = _truncate(a, b, target, random)
        ids = self.vocabulary
        second = [*b.tolist(), ids.sep] if len(b) else []
        tokens = [ids.cls, *a.tolist(), ids.sep, *second]
        out, loss_mask = np.zeros((3, self.seq_length), np.int64), np.zeros(self.seq_length, np.float32)
        out[0, : len(tokens)] = tokens
        out[1, len(tokens) - len(second) : len(tokens)] = 1
        share = max(1, round(len(tokens) * self.rules.probability))
        for place in self._masked_places(tokens, max(1.0, min(self.rules.probability * target, share)), random):
            loss_mask[place], out[2, place] = 1.0, tokens[place]
            if random.random_sample() < 0.8:
                out[0, place] = ids.mask
            elif random.random_sample() >= 0.5:
                out[0, place] = random.randint(0, ids.size)
        return self._padded(out, loss_mask, len(tokens), plan.flag)

    def _masked_places(self, tokens: list[int], budget: float, random: np.random.RandomState) -> Iterator[int]:
        """Places to mask, one by one: the caller draws what each becomes before the next word is drawn."""
        words = self._words(tokens)
        order = list(range(len(words)))
        random.shuffle(order)
        masked: set[int] = set()
        for word in order:
            if len(masked) >= budget:
                break
            count = int(np.searchsorted(self._sizes, random.random_sample(), side="right")) + 1
            while count and len(masked) + sum(map(len, words[word : word + count])) > budget:
                count -= 1
            places = [place for part in words[word : word + count] for place in part]
            if masked.isdisjoint(places):
                for place in places:
                    masked.add(place)
                    yield place
        # A sample without a label teaches nothing: where every word is too long for the budget, one token is taken.
        if not masked and order:
            yield words[order[0]][0]

    def _words(self, tokens: list[int]) -> list[list[int]]:
        """Places that may be masked, by word. A piece at the start of the second part joins the word before it, as in Megatron."""
        words: list[list[int]] = []
        for place, token in enumerate(tokens):
            if token in (self.vocabulary.cls, self.vocabulary.sep):
                continue
            if words and len(self._continues) and self._continues[token]:
                words[-1].append(place)
            else:
                words.append([place])
        return words


def _truncate(a: np.ndarray, b: np.ndarray, target: int, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Take tokens from the longer part, from either end, until both have `target` together."""
    bounds = [[0, len(a)], [0, len(b)]]
    for _ in range(len(a) + len(b) - target):
        (a_first, a_last), (b_first, b_last) = bounds
        longer = bounds[0] if a_last - a_first > b_last - b_first else bounds[1]
        if random.random_sample() < 0.5:
            longer[0] += 1
        else:
            longer[1] -= 1
    return a[slice(*bounds[0])], b[slice(*bounds[1])]
