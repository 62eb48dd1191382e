"""Turning recorded values into curves one can look at: gaps where a value is missing, a smoothed line, fewer points than pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Curve:
    """Points of one line; y is NaN where nothing is known (drawn as a gap). Both are float64 of the same length."""

    label: str
    x: np.ndarray
    y: np.ndarray

    @property
    def is_empty(self) -> bool:
        """Whether there is no finite point."""
        return not np.isfinite(self.y).any()


def curve_of(label: str, records: Iterable[dict[str, Any]], key: str) -> Curve:
    """The values under `key` over the iterations."""
    rows = [(record["iteration"], record.get(key)) for record in records]
    x = np.array([iteration for iteration, _ in rows], dtype=float)
    y = np.array([float(value) if isinstance(value, int | float) else math.nan for _, value in rows], dtype=float)
    return Curve(label, x, y)


def default_window(points: int) -> int:
    """Width of the smoothing window (odd) that suits a curve of this many points: about a fiftieth; 1, no smoothing, below 100."""
    return points // 100 * 2 + 1


def smoothed(curve: Curve, window: int) -> Curve:
    """Centred mean over `window` points, so that the line does not lag behind them; missing points are left out.

    Towards an end the window shrinks on both sides alike: a one-sided mean would pull the steep beginning of a loss curve down.
    """
    if window <= 1 or len(curve.y) == 0:
        return curve
    known = np.isfinite(curve.y)
    sums = np.concatenate(([0.0], np.cumsum(np.where(known, curve.y, 0.0))))
    counts = np.concatenate(([0], np.cumsum(known)))
    positions = np.arange(len(curve.y))
    reach = np.minimum(window // 2, np.minimum(positions, positions[::-1]))
    first, last = positions - reach, positions + reach + 1
    found = counts[last] - counts[first]
    mean = np.divide(sums[last] - sums[first], found, out=np.full(len(curve.y), math.nan), where=found > 0)
    return Curve(curve.label, curve.x, mean)


def thinned(curve: Curve, points: int) -> Curve:
    """At most about `points` points: each bucket of neighbours gives its lowest and its highest, so that no spike is lost."""
    if len(curve.y) <= points:
        return curve
    keep: list[int] = []
    for bucket in np.array_split(np.arange(len(curve.y)), max(1, points // 2)):
        values = curve.y[bucket]
        if np.isfinite(values).any():
            keep += sorted({int(bucket[np.nanargmin(values)]), int(bucket[np.nanargmax(values)])})
        else:
            keep.append(int(bucket[0]))
    return Curve(curve.label, curve.x[keep], curve.y[keep])


def bounds(curves: Sequence[Curve], *, log: bool = False, robust: bool = False) -> tuple[float, float]:
    """Lowest and highest finite y of the curves (above 0 if `log`), never equal; (0, 1), or (1, 10), without any.

    `robust`: a first step many times slower than the rest must not press the rest flat, so the outermost percent may lie outside.
    """
    values = np.concatenate([curve.y for curve in curves]) if curves else np.array([])
    values = values[np.isfinite(values)]
    values = values[values > 0] if log else values
    if len(values) == 0:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = np.percentile(values, [1, 99]) if robust and len(values) >= 20 else (values.min(), values.max())
    if low == high:
        pad = abs(low) * 0.05 or 0.5
        return (float(low) / 1.1, float(low) * 1.1) if log else (float(low - pad), float(high + pad))
    return float(low), float(high)
