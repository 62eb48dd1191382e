"""The geometry of stored pieces: which elements of a logical tensor a piece holds, and how two cuts of one tensor meet.

A piece holds a rectangle (one [start, stop) per dimension: what tensor parallelism leaves a rank) or, inside the rectangle, a flat
range [a, b) of its row-major elements (what ZeRO leaves a rank). Both are turned into at most 2n - 1 boxes, each contiguous in
the piece's own memory; every question about layouts is then one about boxes that intersect.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

Range = tuple[int, int]
Box = tuple[Range, ...]


@dataclass(frozen=True)
class Region:
    """Elements of a logical tensor: `rectangle`, narrowed to the row-major elements `flat_range` of that rectangle if given."""

    rectangle: Box
    flat_range: Range | None = None

    @property
    def rectangle_shape(self) -> tuple[int, ...]:
        """Extent of the rectangle in each dimension."""
        return tuple(stop - start for start, stop in self.rectangle)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that holds these elements: the rectangle's, or one dimension for a flat range."""
        return self.rectangle_shape if self.flat_range is None else (self.flat_range[1] - self.flat_range[0],)

    @property
    def elements(self) -> int:
        """Number of elements held."""
        return prod(self.shape)

    def problem(self, logical_shape: tuple[int, ...]) -> str | None:
        """The rule this region breaks for a tensor of `logical_shape`, or None."""
        if len(self.rectangle) != len(logical_shape):
            return f"has {len(self.rectangle)} dimensions, must have the {len(logical_shape)} of shape {list(logical_shape)}"
        for (start, stop), extent in zip(self.rectangle, logical_shape, strict=True):
            if not 0 <= start < stop <= extent:
                return f"[{start}, {stop}) must be a non-empty range within [0, {extent})"
        if self.flat_range is not None and not 0 <= self.flat_range[0] < self.flat_range[1] <= prod(self.rectangle_shape):
            return f"flat range {list(self.flat_range)} must be non-empty and within [0, {prod(self.rectangle_shape)})"
        return None


def whole(logical_shape: Sequence[int]) -> Region:
    """The region that is the whole tensor."""
    return Region(tuple((0, extent) for extent in logical_shape))


def clip(region: Region, logical_shape: Sequence[int]) -> Region | None:
    """The part of `region` inside `logical_shape`, or None. For a vocabulary padded along the first dimension.

    Rows beyond the end are last in row-major order, so what remains is a prefix of the piece's memory: `tensor.view(-1)[:elements]`.
    """
    if not region.rectangle:
        return region
    start, stop = region.rectangle[0][0], min(region.rectangle[0][1], logical_shape[0])
    if stop <= start:
        return None
    kept = Region(((start, stop), *region.rectangle[1:]))
    if region.flat_range is None:
        return kept
    a, b = region.flat_range[0], min(region.flat_range[1], kept.elements)
    return Region(kept.rectangle, (a, b)) if a < b else None


def _spans(shape: tuple[int, ...], a: int, b: int) -> Iterator[Box]:
    """Boxes that tile the row-major elements [a, b) of `shape`, in order: a partial first row, whole rows, a partial last row."""
    if not shape:
        yield ()
        return
    row = prod(shape[1:])
    first, head = divmod(a, row)
    if head:
        end = min(b, (first + 1) * row)
        yield from (((first, first + 1), *rest) for rest in _spans(shape[1:], head, end - first * row))
        a, first = end, first + 1
    last = b // row
    if first < last:
        yield ((first, last), *((0, extent) for extent in shape[1:]))
        a = last * row
    if a < b:
        yield from (((last, last + 1), *rest) for rest in _spans(shape[1:], a - last * row, b - last * row))


@lru_cache(maxsize=65536)
def boxes(region: Region) -> tuple[tuple[Box, int], ...]:
    """(box in logical coordinates, its offset in the piece's memory in elements) for each box of the region, in memory order."""
    if region.flat_range is None:
        return ((region.rectangle, 0),)
    found, offset = [], 0
    for span in _spans(region.rectangle_shape, *region.flat_range):
        shifted = tuple((base + start, base + stop) for (base, _), (start, stop) in zip(region.rectangle, span, strict=True))
        found.append((shifted, offset))
        offset += volume(span)
    return tuple(found)


def volume(box: Box) -> int:
    """Elements in a box."""
    return prod(stop - start for start, stop in box)


def intersect(one: Box, other: Box) -> Box | None:
    """The common part of two boxes of one tensor, or None."""
    common = []
    for (a, b), (c, d) in zip(one, other, strict=True):
        start, stop = max(a, c), min(b, d)
        if start >= stop:
            return None
        common.append((start, stop))
    return tuple(common)


@dataclass(frozen=True)
class Window:
    """A part of a piece's memory: view `shape` at element `offset`, then `slices` of that view."""

    offset: int
    shape: tuple[int, ...]
    slices: tuple[slice, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Extent of the window."""
        return tuple(part.stop - part.start for part in self.slices)

    @property
    def strides(self) -> tuple[int, ...]:
        """Elements between neighbours along each dimension."""
        return tuple(prod(self.shape[i + 1 :]) for i in range(len(self.shape)))

    @property
    def span(self) -> Range:
        """Elements [first, end) of the piece's memory that a reader must have to fill the window."""
        first = sum(part.start * stride for part, stride in zip(self.slices, self.strides, strict=True))
        last = sum((part.stop - 1) * stride for part, stride in zip(self.slices, self.strides, strict=True))
        return self.offset + first, self.offset + last + 1


def _window(box: Box, offset: int, common: Box) -> Window:
    shape = tuple(stop - start for start, stop in box)
    slices = tuple(slice(start - base, stop - base) for (start, stop), (base, _) in zip(common, box, strict=True))
    return Window(offset, shape, slices)


def overlaps(source: Region, target: Region) -> list[tuple[Window, Window]]:
    """Pairs (window of source, window of target) that hold the same elements in the same order; none twice. Empty: they do not meet."""
    if intersect(source.rectangle, target.rectangle) is None:
        return []
    pairs = []
    for box, offset in boxes(source):
        for other, other_offset in boxes(target):
            common = intersect(box, other)
            if common is not None:
                pairs.append((_window(box, offset, common), _window(other, other_offset, common)))
    return pairs


@lru_cache(maxsize=4096)
def coverage_problem(logical_shape: tuple[int, ...], regions: tuple[Region, ...]) -> str | None:
    """Why `regions` do not hold every element of the tensor exactly once, or None. Each region must lie within the tensor."""
    tiles = [box for region in regions for box, _ in boxes(region)]
    clash = _clash(tiles, len(logical_shape))
    if clash is not None:
        return f"elements {describe(clash)} are held by more than one piece"
    missing = prod(logical_shape) - sum(volume(box) for box in tiles)
    return f"{missing} of {prod(logical_shape)} elements are held by no piece" if missing else None


def _clash(tiles: list[Box], dimensions: int) -> Box | None:
    """The common part of two overlapping boxes, or None: a sweep along one dimension, comparing only boxes that are open together."""
    if not dimensions:
        return () if len(tiles) > 1 else None
    # Along the dimension with most distinct starts the fewest boxes are open at once; along a bad one the sweep is quadratic.
    axis = max(range(dimensions), key=lambda i: len({box[i][0] for box in tiles}))
    active: list[tuple[int, int, Box]] = []
    for number, box in enumerate(sorted(tiles, key=lambda box: box[axis][0])):
        while active and active[0][0] <= box[axis][0]:
            heapq.heappop(active)
        for _, _, other in active:
            common = intersect(box, other)
            if common is not None:
                return common
        heapq.heappush(active, (box[axis][1], number, box))
    return None


def describe(box: Box) -> str:
    """A box as users read it: [0:4, 16:32]."""
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in box) + "]"
