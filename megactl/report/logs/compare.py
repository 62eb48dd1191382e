"""Are two runs of different speed, or is it noise?

Two runs differ when their spreads are apart: between the 10th and the 90th percentile of the steady iterations, no time of one run
is a time of the other, and a Mann-Whitney test on them agrees at `ALPHA`. Anything else is noise. What this cannot see is the noise
between allocations: one job, run twice, has been measured 40 % apart, with little spread inside each run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megactl.report.logs.speed import quantile

ALPHA = 0.01
FEWEST = 5
"""Steady iterations a side needs: with four and four the exact test cannot come below 0.01 whatever they say (2 of 70 orders)."""

_BLOCKS = 200
_RESAMPLES = 4000
_EXACT = 12


@dataclass(frozen=True)
class Side:
    """The steady iterations of one run: how many, their median and the spread's two ends (10th and 90th percentile), in seconds."""

    iterations: int
    median: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """Two runs. `verdict`: "within noise", "too few iterations", "A is faster" or "B is faster".

    `change` is B's median over A's, less 1 (negative: B is faster). `change_low` and `change_high` are the ends of its 99 % interval
    for the means (block bootstrap, since neighbouring iterations resemble each other). `p` is the two-sided Mann-Whitney probability.
    """

    a: Side
    b: Side
    verdict: str
    change: float | None
    change_low: float | None
    change_high: float | None
    p: float | None


def compare(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Compare the steady iterations (seconds, in the order of the log) of two runs."""
    sides = (_side(a), _side(b))
    if min(len(a), len(b)) < FEWEST:
        change = sides[1].median / sides[0].median - 1 if sides[0].median and sides[1].median else None
        return Comparison(*sides, "too few iterations", change, None, None, None)
    low, high = _bootstrap(a, b)
    p = mann_whitney(a, b)
    return Comparison(*sides, _verdict(*sides, p), sides[1].median / sides[0].median - 1, low, high, p)


def _side(times: Sequence[float]) -> Side:
    if not times:
        return Side(0, None, None, None)
    ordered = sorted(times)
    return Side(len(ordered), quantile(ordered, 0.5), quantile(ordered, 0.1), quantile(ordered, 0.9))


def _verdict(a: Side, b: Side, p: float) -> str:
    if p >= ALPHA:
        return "within noise"
    if b.high < a.low:
        return "B is faster"
    return "A is faster" if a.high < b.low else "within noise"


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided probability of ranks this uneven if both came from one distribution (Mann and Whitney 1947).

    Exact for up to 12 values a side without ties, else the normal approximation with the correction for ties and continuity.
    """
    ordered = sorted([(value, 0) for value in a] + [(value, 1) for value in b])
    ranks, ties = _ranks([value for value, _ in ordered])
    u = math.fsum(rank for rank, (_, side) in zip(ranks, ordered, strict=True) if side == 0) - len(a) * (len(a) + 1) / 2
    if ties == 0 and max(len(a), len(b)) <= _EXACT:
        return _exact(round(min(u, len(a) * len(b) - u)), len(a), len(b))
    n = len(ordered)
    variance = len(a) * len(b) / 12 * (n + 1 - ties / (n * (n - 1)))
    if variance <= 0:
        return 1.0
    z = max(0.0, abs(u - len(a) * len(b) / 2) - 0.5) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2))


def _ranks(ordered: Sequence[float]) -> tuple[list[float], float]:
    """Ranks from 1 with equal values sharing their mean, and the sum of t^3 - t over the groups of t equal values."""
    ranks: list[float] = []
    ties = 0.0
    while len(ranks) < len(ordered):
        first = last = len(ranks)
        while last < len(ordered) and ordered[last] == ordered[first]:
            last += 1
        size = last - first
        ranks += [(first + 1 + last) / 2] * size
        ties += size**3 - size
    return ranks, ties


def _exact(u: int, n: int, m: int) -> float:
    """Two-sided probability of a statistic of at most `u`: of all orders of n + m values, those counted by the recurrence in n and m."""
    # ways[i][j][k]: orders of i values of A and j of B in which k pairs have B first.
    ways = [[[0] * (n * m + 1) for _ in range(m + 1)] for _ in range(n + 1)]
    for i in range(n + 1):
        for j in range(m + 1):
            for k in range(i * j + 1):
                if i == 0 or j == 0:
                    ways[i][j][k] = int(k == 0)
                else:
                    ways[i][j][k] = ways[i][j - 1][k] + (ways[i - 1][j][k - j] if k >= j else 0)
    counts = ways[n][m]
    return min(1.0, 2 * sum(counts[: u + 1]) / sum(counts))


def _bootstrap(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Ends of the 99 % interval of mean(b) / mean(a) - 1, resampling blocks of neighbouring iterations; the same on every call."""
    import numpy as np

    generator = np.random.default_rng(0)

    def means(times: Sequence[float]) -> np.ndarray:
        values = np.asarray(times, dtype=float)
        # Blocks of about the square root of n, and never so many that the resampling of a long run takes long.
        count = min(_BLOCKS, max(FEWEST, math.isqrt(len(values))))
        blocks = np.array([block.mean() for block in np.array_split(values, count)])
        return blocks[generator.integers(0, count, (_RESAMPLES, count))].mean(axis=1)

    ratios = means(b) / means(a) - 1
    low, high = np.percentile(ratios, [0.5, 99.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """An argument that two runs have in different values; None where a run does not have it."""

    name: str
    a: str | None
    b: str | None


def differing(a: Mapping[str, str], b: Mapping[str, str]) -> list[Difference]:
    """Arguments (raw text as dumped) whose values differ, by name. Text that reads as the same number is the same."""
    names = sorted({*a, *b})
    return [Difference(name, a.get(name), b.get(name)) for name in names if not _same(a.get(name), b.get(name))]


def _same(one: str | None, other: str | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.strip() == other.strip():
        return True
    try:
        return float(one) == float(other)
    except ValueError:
        return False
