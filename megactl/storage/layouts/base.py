"""What every layout has, and how its parts are found missing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Protocol

from megactl.storage.layouts.folder import Folder
from megactl.storage.layouts.inventory import Inventory

MOST_MISSING = 1000


class Layout(Protocol):
    """One system's way of writing checkpoints."""

    system: str
    title: str

    def matches(self, folder: Folder) -> bool:
        """Whether the names in the folder are this layout's."""

    def inspect(self, folder: Folder) -> Inventory:
        """Everything in the folder. Damage becomes findings."""


def extent(ranks: Iterable[int]) -> int:
    """One more than the largest rank: the least degree that has all of them."""
    return max(ranks, default=-1) + 1


def absent(present: Collection[tuple[int, ...]], sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Coordinates of the grid of `sizes` that are not there, the first thousand of them: one stray name can ask for any number."""
    return list(islice((point for point in _points(sizes) if point not in present), MOST_MISSING))


def _points(sizes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    # itertools.product would first make a list of each range.
    if not sizes:
        yield ()
        return
    for first in range(sizes[0]):
        for others in _points(sizes[1:]):
            yield (first, *others)


def number_after(pattern: str, text: str) -> int | None:
    """The whole number that a pattern's first group finds in a name."""
    match = re.search(pattern, text, re.ASCII)
    return int(match[1]) if match else None
