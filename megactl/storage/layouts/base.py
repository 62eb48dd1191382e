"""What every layout has, and how its parts are found missing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import product
from typing import Protocol

from megactl.storage.layouts.folder import Folder
from megactl.storage.layouts.inventory import Inventory


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


def absent(present: set[tuple[int, ...]], sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Coordinates of the grid of `sizes` that are not there. A grid far larger than what is there is given up: one stray name would
    otherwise list millions."""
    total = 1
    for size in sizes:
        total *= max(1, size)
    if total > 100 * len(present) + 1000:
        return []
    return [point for point in product(*(range(size) for size in sizes)) if point not in present]


def number_after(pattern: str, text: str) -> int | None:
    """The whole number that a pattern's first group finds in a name."""
    match = re.search(pattern, text, re.ASCII)
    return int(match[1]) if match else None
