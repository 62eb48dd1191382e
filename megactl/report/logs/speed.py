"""Seconds an iteration from the lines of a log: over every line, and in steady state.

Left out of the steady state is the warm-up: the first line of a run (it pays for compilation, memory growth and the first exchanges;
up to three times the others have been seen), and every line directly after it that still takes more than `SLOW` times the median of
all lines, but never more than half of the lines. Left out, too, is every line that may have counted a save or an evaluation, where
that does not leave less than half of the lines. A run of one line has no steady state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

SLOW = 1.5
# Thirty million years. A larger number is a damaged line, and sums of such overflow.
_MOST = 1e15


@dataclass(frozen=True)
class Speed:
    """Seconds an iteration. `lines` is the number of lines that gave a time, `steady_lines` how many of them are steady."""

    lines: int
    steady_lines: int
    mean: float | None
    median: float | None
    steady_mean: float | None
    p95: float | None


def is_time(seconds: float) -> bool:
    """Whether it can be a time: above 0 and no damage. A clock that was set back gives others."""
    return 0 < seconds < _MOST


def quantile(ordered: Sequence[float], share: float) -> float:
    """Quantile of values in ascending order, linear between neighbours (numpy's default). `ordered` must not be empty."""
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def warm_up_lines(times: Sequence[float]) -> int:
    """How many of the first `times` (seconds, in the order of the log) are warm-up. 0 where there are fewer than two."""
    if len(times) < 2:
        return 0
    limit = SLOW * quantile(sorted(times), 0.5)
    count, most = 1, len(times) // 2
    while count < most and times[count] > limit:
        count += 1
    return count


def steady(seconds: Sequence[float], interrupted: Sequence[int] = ()) -> list[float]:
    """The times of the steady state, in the order of the log. `interrupted`: not 0 where a line may have counted a save."""
    flags = interrupted or [0] * len(seconds)
    times = [(value, flag) for value, flag in zip(seconds, flags, strict=True) if is_time(value)]
    if len(times) < 2:
        return []
    rest = times[warm_up_lines([value for value, _ in times]) :]
    clean = [value for value, flag in rest if not flag]
    return clean if 2 * len(clean) >= len(rest) else [value for value, _ in rest]


def speed_of(seconds: Sequence[float], interrupted: Sequence[int] = ()) -> Speed:
    """The figures of a run's lines (seconds; NaN where a line has no time). All None without a line that has one."""
    times = [value for value in seconds if is_time(value)]
    if not times:
        return Speed(0, 0, None, None, None, None)
    ordered, rest = sorted(times), steady(seconds, interrupted)
    return Speed(
        lines=len(times),
        steady_lines=len(rest),
        mean=math.fsum(times) / len(times),
        median=quantile(ordered, 0.5),
        steady_mean=math.fsum(rest) / len(rest) if rest else None,
        p95=quantile(ordered, 0.95),
    )
