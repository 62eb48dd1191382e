"""Who differs from the others: ranks at the start of a run, nodes in `megactl doctor`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Disagreement:
    """The value that most have, how many they are, and the positions of the others."""

    common: str
    count: int
    odd: tuple[int, ...]


def disagreement(values: Sequence[str]) -> Disagreement | None:
    """Which of `values` differ from the most frequent one; None where all agree."""
    if len(set(values)) <= 1:
        return None
    # With a tie the value that comes first counts as the common one (Counter keeps the order of first sight).
    common, count = Counter(values).most_common(1)[0]
    return Disagreement(common, count, tuple(index for index, value in enumerate(values) if value != common))
