"""Sentence indices of BERT samples: Megatron's numbers, compiled and in Python."""

import math
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.errors import DataError
from megactl.storage import sentence_index
from megactl.storage.indexed import IndexedDataset
from megactl.storage.indexed_writer import IndexedWriter
from megactl.storage.native import native_module

DOCUMENTS = [0, 4, 5, 9]
LENGTHS = [5, 6, 4, 7, 9, 3, 8, 2, 6]


@pytest.fixture(params=["native", "python"])
def implementation(request, monkeypatch):
    """Runs a test with the compiled module and without it."""
    if request.param == "python":
        monkeypatch.setattr(sentence_index, "native_module", lambda: None)
    elif native_module() is None:
        pytest.skip("megactl._native is not built")
    return request.param


def build(documents=DOCUMENTS, lengths=LENGTHS, **changes):
    options = {"num_samples": 1, "seq_length": 16, "short_probability": 0.1, "seed": 1234, "min_sentences": 2, **changes}
    return sentence_index.build_sentence_index(np.array(documents, np.int64), np.array(lengths, np.int32), **options)


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, [[0, 4, 13], [5, 9, 13]]),
        ({"min_sentences": 1}, [[5, 9, 13], [4, 5, 13], [0, 4, 13]]),
        (
            {"num_samples": 7},
            [[0, 4, 13], [5, 9, 13], [5, 9, 13], [5, 9, 13], [0, 4, 13], [0, 4, 13], [0, 4, 13], [5, 9, 13]],
        ),
    ],
)
def test_golden(implementation, changes, rows):
    """Vectors of Megatron's own helpers.cpp."""
    found = build(**changes)
    assert found.tolist() == rows and found.dtype == np.uint32


def test_generators_are_those_of_the_standard():
    """The 10 000th number of a default-seeded engine is fixed by the C++ standard."""
    assert next(islice(sentence_index._mt19937_64(5489), 9999, None)) == 9981545732273789042
    assert int(np.frombuffer(np.random.RandomState(5489).bytes(40_000), "<u4")[-1]) == 4123659995


def megatron_epoch(documents, lengths, targets, min_sentences):
    """One epoch of Megatron's loop with its own counters, `targets` being its draws: the oracle for the order of rows and draws."""
    rows = []
    for first, last in pairwise(documents):
        remaining, start, length, count = last - first, first, 0, 0
        if remaining > 1 and any(lengths[i] > 512 for i in range(first, last)):
            continue
        if remaining < min_sentences or remaining == 0:
            continue
        target = next(targets)
        for sentence in range(first, last):
            length, count, remaining = length + lengths[sentence], count + 1, remaining - 1
            if (length >= target and remaining > 1 and count >= min_sentences) or remaining == 0:
                rows.append((start, sentence + 1, target))
                start, length, count, target = sentence + 1, 0, 0, next(targets)
    return rows


corpora = st.lists(st.lists(st.one_of(st.integers(0, 30), st.just(600)), max_size=9), min_size=1, max_size=15)


@settings(max_examples=150, deadline=None)
@given(
    corpus=corpora,
    num_samples=st.integers(1, 60),
    max_length=st.integers(2, 40),
    probability=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    seed=st.integers(0, 2**32 - 1),
    min_sentences=st.sampled_from([1, 2]),
)
def test_both_builders_equal_megatrons_loop(corpus, num_samples, max_length, probability, seed, min_sentences):
    documents = np.cumsum([0, *map(len, corpus)])
    lengths = np.array([size for document in corpus for size in document], np.int32)
    arguments = (num_samples, max_length, math.floor(1 / probability + 0.5) if probability else 0)
    targets = sentence_index._targets(max_length, arguments[2], seed)
    expected, epoch = [], [None]
    while epoch and len(expected) < num_samples:
        epoch = megatron_epoch(documents.tolist(), lengths.tolist(), targets, min_sentences)
        expected += epoch
    rest = (seed, min_sentences, 512)
    python = sentence_index._build_python(documents, lengths, *arguments, *rest, False)
    assert sorted(map(tuple, python.tolist())) == sorted(expected)
    native = native_module()
    if native is None:
        pytest.skip("megactl._native is not built")
    for wide, dtype in ((False, np.uint32), (True, np.uint64)):
        rows = native.build_sentence_samples(documents, lengths, *arguments, *rest, wide)
        assert rows.dtype == dtype and rows.tolist() == python.tolist()


def test_a_lower_document_range_counts_the_sentences_of_the_whole_pair(implementation):
    rows = build([4, 5, 9], min_sentences=1)
    assert {row[0] for row in rows.tolist()} == {4, 5}


def test_short_targets_come_as_often_as_asked(implementation):
    rows = build([0, 8000], [3] * 8000, num_samples=1, seq_length=23, short_probability=0.25)
    targets = rows[:, 2]
    share = (targets < 20).mean()
    assert 0.2 < share < 0.3 and targets.min() == 2 and targets.max() == 20


def test_nothing_to_sample_is_an_error(implementation):
    for documents, lengths in (([0, 1, 2], [5, 5]), ([0, 2], [5, 600]), ([0], [])):
        with pytest.raises(DataError, match="documents has two sentences"):
            build(documents, lengths)
    # A sentence alone in its document may be long.
    assert build([0, 1], [600], min_sentences=1).tolist() == [[0, 1, 13]]


def test_compiled_builder_refuses_what_would_read_out_of_bounds():
    native = native_module()
    if native is None:
        pytest.skip("megactl._native is not built")
    lengths = np.array(LENGTHS, np.int32)
    for bounds in ([0, 10], [-1, 3], [0, 5, 4]):
        with pytest.raises(ValueError, match="does not exist"):
            native.build_sentence_samples(np.array(bounds, np.int64), lengths, 1, 13, 0, 1, 2, 512, False)
    with pytest.raises(ValueError, match="max_length"):
        native.build_sentence_samples(np.array([0, 9], np.int64), lengths, 1, 1, 0, 1, 2, 512, False)


def test_cached_index_is_built_once_and_belongs_to_its_settings(tmp_path):
    writer = IndexedWriter(tmp_path / "P", np.dtype("<u2"))
    for first, last in pairwise(DOCUMENTS):
        for size in LENGTHS[first:last]:
            writer.add_sequence(np.arange(size))
        writer.end_document()
    writer.finish()
    data, lines = IndexedDataset(tmp_path / "P"), []

    def get(**changes):
        options = {"num_samples": 7, "seq_length": 16, "short_probability": 0.1, "seed": 1234, "min_sentences": 2, **changes}
        return sentence_index.cached_sentence_index(data, 0, 3, log=lines.append, **options)

    assert get().tolist() == get().tolist() == build(num_samples=7).tolist()
    assert len(lines) == 1 and "built the sentence index" in lines[0]
    for changes in ({"seed": 5}, {"min_sentences": 1}, {"short_probability": 0.5}, {"seq_length": 12}, {"num_samples": 1}):
        get(**changes)
    assert len(lines) == 6
