"""The geometry of pieces against plain indexing of small arrays."""

from __future__ import annotations

import time
from math import prod

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.storage.pieces import Region, boxes, clip, coverage_problem, overlaps, volume, whole


def numbers(shape, region: Region) -> np.ndarray:
    """Flat numbers of the elements a region holds, in its own memory order: by indexing, not by the code under test."""
    grid = np.arange(prod(shape)).reshape(shape)
    block = grid[tuple(slice(a, b) for a, b in region.rectangle)].reshape(-1)
    return block if region.flat_range is None else block[slice(*region.flat_range)]


@st.composite
def regions(draw, shape):
    rectangle = []
    for extent in shape:
        start = draw(st.integers(0, extent - 1))
        rectangle.append((start, draw(st.integers(start + 1, extent))))
    size = Region(tuple(rectangle)).elements
    if draw(st.booleans()):
        return Region(tuple(rectangle))
    a = draw(st.integers(0, size - 1))
    return Region(tuple(rectangle), (a, draw(st.integers(a + 1, size))))


SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


@st.composite
def shape_and_regions(draw, count):
    shape = draw(SHAPES)
    return shape, [draw(regions(shape)) for _ in range(count)]


@settings(max_examples=300, deadline=None)
@given(case=shape_and_regions(1))
def test_boxes_tile_the_region_in_memory_order(case):
    shape, (region,) = case
    assert region.problem(shape) is None
    grid = np.arange(prod(shape)).reshape(shape)
    parts = boxes(region)
    found = [grid[tuple(slice(a, b) for a, b in box)].reshape(-1) for box, _ in parts]
    assert np.array_equal(np.concatenate(found), numbers(shape, region))
    assert [offset for _, offset in parts] == [sum(volume(box) for box, _ in parts[:i]) for i in range(len(parts))]
    assert len(parts) <= max(1, 2 * len(shape) - 1)


@settings(max_examples=300, deadline=None)
@given(case=shape_and_regions(2))
def test_overlaps_copy_exactly_the_common_elements(case):
    shape, (source, target) = case
    values, result = numbers(shape, source), np.full(target.elements, -1)
    for window, into in overlaps(source, target):
        common = values[window.offset : window.offset + prod(window.shape)].reshape(window.shape)[window.slices]
        result[into.offset : into.offset + prod(into.shape)].reshape(into.shape)[into.slices] = common
        assert window.sizes == into.sizes
        # The span is the tightest range that holds the window.
        positions = np.arange(source.elements)[window.offset : window.offset + prod(window.shape)].reshape(window.shape)[window.slices]
        assert window.span == (positions.min(), positions.max() + 1)
    wanted = numbers(shape, target)
    assert np.array_equal(result, np.where(np.isin(wanted, values), wanted, -1))


@settings(max_examples=400, deadline=None)
@given(case=st.integers(1, 4).flatmap(shape_and_regions))
def test_coverage_is_exactly_once(case):
    shape, found = case
    count = np.bincount(np.concatenate([numbers(shape, region) for region in found]), minlength=prod(shape))
    problem = coverage_problem(shape, tuple(found))
    if (count > 1).any():
        assert problem is not None and "more than one" in problem
    elif (count == 0).any():
        assert problem == f"{(count == 0).sum()} of {count.size} elements are held by no piece"
    else:
        assert problem is None


def test_whole_tensors_are_covered():
    for shape in ((), (1,), (5,), (3, 4), (2, 1, 3)):
        assert coverage_problem(shape, (whole(shape),)) is None
        assert "more than one" in coverage_problem(shape, (whole(shape),) * 2)


@settings(max_examples=300, deadline=None)
@given(case=shape_and_regions(1), rows=st.integers(1, 5))
def test_clip_keeps_a_prefix_of_the_memory(case, rows):
    padded, (region,) = case
    if not padded:
        assert clip(region, ()) == region
        return
    logical = (min(rows, padded[0]), *padded[1:])
    held = numbers(padded, region)
    real = held[held < prod(logical)]
    kept = clip(region, logical)
    if kept is None:
        assert real.size == 0
    else:
        assert kept.problem(logical) is None
        # Numbers of real elements do not depend on the padding, since padding is along the first dimension.
        assert np.array_equal(numbers(logical, kept), real) and np.array_equal(held[: real.size], real)


def test_ten_thousand_pieces_are_checked_in_seconds():
    for shape, cut in (((10_000, 64), 0), ((64, 10_000), 1), ((1, 10_000), 1)):
        parts = [Region(tuple((i, i + 1) if axis == cut else (0, extent) for axis, extent in enumerate(shape))) for i in range(10_000)]
        start = time.perf_counter()
        assert coverage_problem(shape, tuple(parts)) is None
        assert time.perf_counter() - start < 5
