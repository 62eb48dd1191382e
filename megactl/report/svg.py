"""Line charts as inline SVG: no script, no file beside the page, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from megactl.report.curves import Curve, bounds, thinned

_WIDTH, _HEIGHT = 760, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 16, 28, 40
_MAX_POINTS = 1200


@dataclass(frozen=True)
class Line:
    """A curve and its look: CSS class (`raw`, `main` or `dots`); dots are drawn as points."""

    curve: Curve
    style: str = "main"


@dataclass(frozen=True)
class _Axes:
    """Data ranges in axis space (log10 of y where `log`), mapped to pixels."""

    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    def column(self, value: float) -> float:
        low, high = self.x
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def row(self, value: float) -> float:
        low, high = self.y
        value = math.log10(value) if self.log else value
        # Values beyond a robust range stay inside the frame's clip rather than far outside, where renderers lose precision.
        share = min(2.0, max(-1.0, (value - low) / (high - low)))
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def line_chart(lines: Sequence[Line], *, name: str, y_label: str, log: bool = False, robust: bool = False, zero: bool = False) -> str:
    """An <svg> of `lines` over the iterations. `name` must be unique within the page: it names the clip path.

    `log`: logarithmic y axis. `robust`: outliers may lie outside. `zero`: the axis begins at 0, so that noise does not look like change.
    """
    x_label = "iteration"
    axes = _axes(lines, log=log, robust=robust, zero=zero)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y_label)} over {x_label}">']
    # A little wider than the frame, so that a point at the very end is drawn whole.
    clip = f'<clipPath id="clip-{escape(name)}"><rect x="{_LEFT - 4}" y="{_TOP}"'
    parts.append(f'<defs>{clip} width="{_WIDTH - _LEFT - _RIGHT + 8}" height="{_HEIGHT - _TOP - _BOTTOM}"/></clipPath></defs>')
    parts += _grid(axes, x_label, y_label)
    parts.append(f'<g clip-path="url(#clip-{escape(name)})">')
    parts += [_dots(line.curve, axes) if line.style == "dots" else _path(line, axes) for line in lines]
    return "".join([*parts, "</g>", _legend(lines), "</svg>"])


def _axes(lines: Sequence[Line], *, log: bool, robust: bool, zero: bool) -> _Axes:
    curves = [line.curve for line in lines]
    low, high = bounds(curves, log=log, robust=robust)
    if log:
        low, high = math.log10(low), math.log10(high)
    if zero:
        low = min(low, 0.0)
    pad = 0.05 * (high - low)
    x = np.concatenate([curve.x for curve in curves]) if curves else np.array([])
    x_low, x_high = (float(x.min()), float(x.max())) if len(x) else (0.0, 1.0)
    return _Axes((x_low, x_high if x_high > x_low else x_low + 1), (low - (0 if zero else pad), high + pad), log)


def ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) inside [low, high], about `wanted` of them. Needs low < high."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Values whose log10 lies inside [low, high]: 1-2-5 a decade, finer within less than a decade."""
    if high - low < 0.7:
        return ticks(10**low, 10**high)
    factors = (1, 2, 5) if high - low < 4 else (1,)
    decades = range(math.floor(low), math.ceil(high) + 1)
    return [factor * 10.0**decade for decade in decades for factor in factors if low <= math.log10(factor * 10.0**decade) <= high]


def tick_text(value: float) -> str:
    """A tick's label: plain where short, k, M, G for large ones, exponents for tiny ones."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit * (10 if suffix == "k" else 1):
            return f"{value / limit:.4g}{suffix}"
    if size >= 1e-3:
        return f"{value:.4g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _grid(axes: _Axes, x_label: str, y_label: str) -> list[str]:
    parts = []
    for value in _log_ticks(*axes.y) if axes.log else ticks(*axes.y):
        y = f"{axes.row(value):.1f}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y}" dy="4" text-anchor="end">{tick_text(value)}</text>')
    bottom = _HEIGHT - _BOTTOM
    for value in ticks(*axes.x, wanted=8):
        if value != round(value):
            continue
        x = f"{axes.column(value):.1f}"
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{bottom + 16}" text-anchor="middle">{tick_text(value)}</text>')
    parts.append(f'<text class="label" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (_TOP + bottom) / 2
    turned = f'x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})"'
    parts.append(f'<text class="label" {turned}>{escape(y_label)}</text>')
    return parts


def _path(line: Line, axes: _Axes) -> str:
    curve = thinned(line.curve, _MAX_POINTS)
    commands, pen_down = [], False
    for x, y in zip(curve.x.tolist(), curve.y.tolist(), strict=True):
        if not math.isfinite(y) or (axes.log and y <= 0):
            pen_down = False
            continue
        commands.append(f"{'L' if pen_down else 'M'}{axes.column(x):.1f} {axes.row(y):.1f}")
        pen_down = True
    return f'<path class="{line.style}" d="{"".join(commands)}"/>'


def _dots(curve: Curve, axes: _Axes) -> str:
    points = zip(curve.x.tolist(), curve.y.tolist(), strict=True)
    return "".join(
        f'<circle class="dots" cx="{axes.column(x):.1f}" cy="{axes.row(y):.1f}" r="3.5"/>'
        for x, y in points
        if math.isfinite(y) and (not axes.log or y > 0)
    )


def _legend(lines: Sequence[Line]) -> str:
    if len(lines) < 2:
        return ""
    parts, x = [], _WIDTH - _RIGHT - 8
    for line in reversed(lines):
        x -= 7 * len(line.curve.label) + 8
        parts.append(f'<text class="legend" x="{x}" y="{_TOP - 10}">{escape(line.curve.label)}</text>')
        x -= 26
        if line.style == "dots":
            parts.append(f'<circle class="dots" cx="{x + 11}" cy="{_TOP - 14}" r="3.5"/>')
        else:
            parts.append(f'<path class="{line.style}" d="M{x} {_TOP - 14}h20"/>')
        x -= 12
    return "".join(parts)
