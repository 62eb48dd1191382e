"""Which sentences make up BERT sample i: Megatron's mapping, number for number.

Row i is (first sentence, sentence behind the last, target length in tokens): consecutive sentences of one document. Built from the
sentence lengths alone, whole epochs at a time, then shuffled. Source: Megatron-Core's helpers.cpp (`build_mapping`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

from megactl.errors import DataError
from megactl.storage.array_cache import ArrayCache
from megactl.storage.indexed import IndexedDataset
from megactl.storage.indexed_format import idx_path
from megactl.storage.native import native_module
from megactl.storage.sample_index import INDEX_VERSION, file_identity

# Megatron leaves out documents with a longer sentence, unless it is their only one.
LONG_SENTENCE = 512
# [CLS] A [SEP] B [SEP]; Megatron keeps room for three also where there is no B.
SPECIAL_TOKENS = 3


def build_sentence_index(
    documents: np.ndarray,
    lengths: np.ndarray,
    *,
    num_samples: int,
    seq_length: int,
    short_probability: float,
    seed: int,
    min_sentences: int,
    name: str = "the data",
) -> np.ndarray:
    """Rows [samples, 3]: at least `num_samples`, being whole epochs; uint32, or uint64 where that cannot count the sentences.

    `documents` int64 [D + 1]: the first sentence of each document, and the end; `lengths` int32: tokens of every sentence of the pair.
    `short_probability` is rounded to one in a whole number; `name`: of the pair, for messages.
    Raises DataError where no document gives a sample.
    """
    assert seq_length >= SPECIAL_TOKENS + 2 and min_sentences in (1, 2)
    ratio = math.floor(1 / short_probability + 0.5) if short_probability > 0 else 0
    wide = len(lengths) > np.iinfo(np.uint32).max
    # A blend may want nothing of one of its datasets, which is still a dataset.
    arguments = (max(num_samples, 1), seq_length - SPECIAL_TOKENS, ratio, seed, min_sentences, LONG_SENTENCE, wide)
    bounds = np.require(documents, np.int64, ["C", "A"])
    native = native_module()
    # The lengths lie unaligned in the file; compiled code may not read them there.
    sizes = np.require(lengths, np.int32, ["C", "A"])
    rows = _build_python(bounds, sizes, *arguments) if native is None else native.build_sentence_samples(bounds, sizes, *arguments)
    if not len(rows):
        least = "a sentence" if min_sentences == 1 else f"two sentences, none of them longer than {LONG_SENTENCE} tokens"
        rule = f"{name}: none of the {len(bounds) - 1} documents has {least}"
        raise DataError(rule, "give this split more documents (--split), or preprocess longer texts with --split-sentences")
    return rows


def cached_sentence_index(
    dataset: IndexedDataset,
    first: int,
    last: int,
    *,
    num_samples: int,
    seq_length: int,
    short_probability: float,
    seed: int,
    min_sentences: int,
    cache_folder: str | None = None,
    log: Callable[[str], None] = print,
) -> np.ndarray:
    """`build_sentence_index` of documents [first, last) of a dataset, kept on disk and shared by the processes of this machine."""
    path = idx_path(dataset.prefix)
    settings = {
        "num_samples": num_samples,
        "seq_length": seq_length,
        "short_probability": short_probability,
        "seed": seed,
        "min_sentences": min_sentences,
    }
    key = {"kind": "bert-sentence-index", "version": INDEX_VERSION, **file_identity(path), "documents": [first, last], **settings}

    def build() -> dict[str, np.ndarray]:
        return {"rows": build_sentence_index(dataset.documents[first : last + 1], dataset.lengths, name=str(dataset.prefix), **settings)}

    return ArrayCache(path.parent, cache_folder, log).get("sentence index", key, build)["rows"]


def _build_python(
    documents: np.ndarray,
    lengths: np.ndarray,
    num_samples: int,
    max_length: int,
    ratio: int,
    seed: int,
    min_sentences: int,
    long_sentence: int,
    wide: bool,
) -> np.ndarray:
    """The twin of sentence_pairs.cpp."""
    targets = _targets(max_length, ratio, seed)
    bounds = documents.tolist()
    usable = [
        (first, last)
        for first, last in itertools.pairwise(bounds)
        if last - first >= min_sentences and (last - first == 1 or int(lengths[first:last].max()) <= long_sentence)
    ]
    rows: list[tuple[int, int, int]] = []
    while usable and len(rows) < num_samples:
        for first, last in usable:
            rows += _document_rows(first, lengths[first:last].tolist(), targets, min_sentences)
    array = np.array(rows, np.uint64 if wide else np.uint32).reshape(-1, 3)
    return array[_shuffled(len(array), seed + 1)]


def _document_rows(first: int, lengths: list[int], targets: Iterator[int], min_sentences: int) -> list[tuple[int, int, int]]:
    rows, start, length, target = [], 0, 0, next(targets)
    for sentence, size in enumerate(lengths):
        length += size
        left = len(lengths) - sentence - 1
        if left == 0 or (length >= target and left > 1 and sentence + 1 - start >= min_sentences):
            rows.append((first + start, first + sentence + 1, target))
            start, length, target = sentence + 1, 0, next(targets)
    return rows


def _targets(max_length: int, ratio: int, seed: int) -> Iterator[int]:
    """Target lengths without end. `RandomState.bytes` is the 32-bit stream of std::mt19937."""
    random = np.random.RandomState(seed)
    while True:
        for number in np.frombuffer(random.bytes(4096), "<u4").tolist():
            yield 2 + number % (max_length - 1) if ratio and number % ratio == 0 else max_length


def _shuffled(count: int, seed: int) -> np.ndarray:
    """Fisher-Yates from the end with std::mt19937_64: the place each row comes from."""
    order = list(range(count))
    for last, draw in zip(range(count - 1, 0, -1), _mt19937_64(seed), strict=False):
        other = draw % (last + 1)
        order[last], order[other] = order[other], order[last]
    return np.array(order, np.int64)


def _mt19937_64(seed: int) -> Iterator[int]:
    """The numbers of std::mt19937_64 without end. Source: Nishimura and Matsumoto's 64-bit Mersenne Twister (2004)."""
    mask, words, middle = 2**64 - 1, 312, 156
    state = [seed & mask]
    for i in range(1, words):
        state.append((6364136223846793005 * (state[-1] ^ (state[-1] >> 62)) + i) & mask)
    while True:
        for i in range(words):
            mixed = (state[i] & 0xFFFFFFFF80000000) | (state[(i + 1) % words] & 0x7FFFFFFF)
            state[i] = state[(i + middle) % words] ^ (mixed >> 1) ^ (0xB5026F5AA96619E9 if mixed & 1 else 0)
        for word in state:
            number = word ^ ((word >> 29) & 0x5555555555555555)
            number ^= (number << 17) & 0x71D67FFFEDA60000
            number ^= (number << 37) & 0xFFF7EEE000000000
            yield number ^ (number >> 43)
