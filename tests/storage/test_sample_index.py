"""Sample and blending indices: Megatron's numbers, compiled and in Python."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.errors import DataError
from megactl.storage import blending, sample_index
from megactl.storage.native import native_module

LENGTHS = np.array([3, 5, 2, 7, 4], np.int32)


@pytest.fixture(params=["native", "python"])
def implementation(request, monkeypatch):
    """Runs a test with the compiled module and without it."""
    if request.param == "python":
        monkeypatch.setattr(sample_index, "native_module", lambda: None)
        monkeypatch.setattr(blending, "native_module", lambda: None)
    elif native_module() is None:
        pytest.skip("megactl._native is not built")
    return request.param


def build(lengths, first, last, **settings):
    return sample_index.build_sample_index(np.asarray(lengths, np.int32), first, last, **settings)


def test_golden_one_epoch(implementation):
    index = build(LENGTHS, 0, 5, num_samples=5, seq_length=4, seed=1234)
    assert index.epochs == 1 and len(index) == 5
    assert index.documents.tolist() == [4, 0, 1, 2, 3]
    assert index.samples.tolist() == [[0, 0], [1, 0], [2, 1], [3, 0], [4, 2], [4, 6]]
    assert index.shuffle.tolist() == [3, 2, 1, 0, 4]
    assert (index.documents.dtype, index.samples.dtype, index.shuffle.dtype) == (np.int32, np.int32, np.uint32)


def test_golden_three_epochs_the_last_apart(implementation):
    index = build(LENGTHS, 0, 5, num_samples=12, seq_length=4, seed=1234)
    assert index.epochs == 3
    assert index.documents.tolist() == [2, 2, 4, 1, 0, 3, 4, 0, 1, 3, 0, 4, 3, 2, 1]
    rows = [0, 0, 2, 0, 3, 0, 3, 4, 5, 0, 5, 4, 6, 1, 7, 1, 8, 2, 9, 1, 9, 5, 10, 2, 11, 3, 12, 3, 13, 0, 14, 2]
    assert index.samples.reshape(-1).tolist() == rows
    assert index.shuffle.tolist() == [3, 9, 2, 1, 7, 5, 4, 0, 8, 6, 14, 11, 13, 10, 12]


def test_golden_blend(implementation):
    datasets, samples = blending.build_blending([0.5, 0.3, 0.2], 10)
    assert datasets.tolist() == [0, 1, 2, 0, 1, 0, 2, 0, 1, 0]
    assert samples.tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4]
    assert (datasets.dtype, samples.dtype) == (np.int16, np.int64)


def test_golden_exhaustive_blend(implementation):
    assert blending.build_exhaustive_blending([3, 2, 1])[0].tolist() == [0, 1, 2, 0, 1, 0]


def megatron_walk(lengths, order, total, seq_length):
    """The loop of Megatron's helpers.cpp, step by step: the oracle for both builders."""
    rows, position, offset = [(0, 0)], 0, 0
    for _ in range(total):
        remaining = seq_length + 1
        while remaining:
            left = lengths[order[position]] - offset
            remaining -= left
            if remaining <= 0:
                offset += remaining + left - 1
                remaining = 0
            else:
                position, offset = position + 1, 0
        rows.append((position, offset))
    return rows


@settings(max_examples=120, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=30).filter(any),
    seq_length=st.integers(1, 9),
    num_samples=st.integers(0, 60),
    seed=st.integers(0, 2**32 - 1),
)
def test_both_builders_equal_megatrons_walk(lengths, seq_length, num_samples, seed):
    index = build(lengths, 0, len(lengths), num_samples=num_samples, seq_length=seq_length, seed=seed)
    assert len(index) >= num_samples
    assert sorted(index.documents.tolist()) == sorted(list(range(len(lengths))) * index.epochs)
    assert sorted(index.shuffle.tolist()) == list(range(len(index)))
    expected = megatron_walk(lengths, index.documents, len(index), seq_length)
    assert [tuple(row) for row in index.samples.tolist()] == expected
    fallback = sample_index._sample_rows_numpy(np.array(lengths, np.int32), index.documents, len(index), seq_length)
    assert fallback.tolist() == index.samples.tolist()


@pytest.mark.parametrize("dtype", [np.uint32, np.int32, np.int64])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 1023, 1024, 1025, 70_001])
def test_compiled_shuffle_is_numpys_and_leaves_the_generator_where_numpy_does(dtype, size):
    if native_module() is None:
        pytest.skip("megactl._native is not built")
    expected, found = np.arange(size, dtype=dtype), np.arange(size, dtype=dtype)
    ours, numpys = np.random.RandomState(99), np.random.RandomState(99)
    for random in (ours, numpys):
        random.randint(10, size=5)  # so that neither starts at the beginning of its state
    numpys.shuffle(expected)
    sample_index.shuffle_in_place(ours, found)
    assert (found == expected).all()
    assert ours.randint(2**31) == numpys.randint(2**31)


def test_rows_count_in_int64_where_asked():
    native = native_module()
    if native is None:
        pytest.skip("megactl._native is not built")
    for order_type in (np.int32, np.int64):
        for row_type in (np.int32, np.int64):
            rows = np.empty((6, 2), row_type)
            native.build_sample_index(LENGTHS, np.array([4, 0, 1, 2, 3], order_type), rows, 4)
            assert rows.tolist() == [[0, 0], [1, 0], [2, 1], [3, 0], [4, 2], [4, 6]]


def test_compiled_builder_refuses_what_would_read_out_of_bounds():
    native = native_module()
    if native is None:
        pytest.skip("megactl._native is not built")
    rows = np.empty((3, 2), np.int32)
    for order in ([5], [-1], [0, 2**31 - 1]):
        with pytest.raises(ValueError, match="does not exist"):
            native.build_sample_index(LENGTHS, np.array(order, np.int32), rows, 4)
    with pytest.raises(ValueError, match="too few tokens"):
        native.build_sample_index(LENGTHS, np.array([0], np.int32), rows, 4)
    with pytest.raises(TypeError):
        native.build_sample_index(LENGTHS.astype(np.int64), np.array([0], np.int32), rows, 4)


def test_split_without_tokens_is_an_error():
    with pytest.raises(DataError, match="hold no tokens"):
        build([0, 0, 3], 0, 2, num_samples=1, seq_length=4, seed=1)


def test_only_documents_of_the_range_are_used(implementation):
    index = build([3, 5, 2, 7, 4], 1, 4, num_samples=9, seq_length=2, seed=5)
    assert set(index.documents.tolist()) == {1, 2, 3}


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6), count=st.integers(0, 200))
def test_python_blend_equals_compiled_and_keeps_the_shares(weights, count):
    datasets, samples = blending.build_blending(weights, count)
    again = np.empty(count, np.int16), np.empty(count, np.int64)
    blending._deal(blending.normalise(weights).tolist(), [count] * len(weights), *again)
    assert (datasets == again[0]).all() and (samples == again[1]).all()
    shares = np.array(weights) / sum(weights)
    used = np.bincount(datasets, minlength=len(weights))
    # The method's known bound is below the number of datasets; in practice it is about one sample.
    assert (np.abs(used - shares * count) <= len(weights)).all()
    for number in range(len(weights)):
        assert samples[datasets == number].tolist() == list(range(used[number]))


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_exhaustive_blend_uses_everything_once(sizes):
    datasets, samples = blending.build_exhaustive_blending(sizes)
    assert np.bincount(datasets, minlength=len(sizes)).tolist() == sizes
    again = np.empty(sum(sizes), np.int16), np.empty(sum(sizes), np.int64)
    blending._deal([size / sum(sizes) for size in sizes], sizes, *again)
    assert (datasets == again[0]).all() and (samples == again[1]).all()


@pytest.mark.parametrize("weights", [[0.5, 0.0], [1.0, -1.0], [float("nan")], [float("inf"), 1.0]])
def test_weights_that_are_no_shares_are_refused(weights):
    with pytest.raises(DataError, match="must be a positive number"):
        blending.build_blending(weights, 3)


def test_exhaustive_blend_cannot_give_more_than_there_is():
    with pytest.raises(DataError, match="hold 3 together"):
        blending.build_exhaustive_blending([1, 2], 4)


def test_missing_module_warns_once(monkeypatch):
    import sys

    import megactl

    native_module.cache_clear()
    monkeypatch.setitem(sys.modules, "megactl._native", None)
    monkeypatch.delattr(megactl, "_native", raising=False)
    try:
        with pytest.warns(RuntimeWarning, match="_native does not load") as caught:
            assert native_module() is None and native_module() is None
        assert len(caught) == 1
    finally:
        native_module.cache_clear()
