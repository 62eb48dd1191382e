"""Numbers as people write them into tables and commands: with a unit, and rounded to the digits that are shown."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

BILLIONS: Mapping[str, float] = MappingProxyType({"": 1.0, "t": 1e3, "b": 1.0, "m": 1e-3, "k": 1e-6})
"""Units of a model's size, in billions of parameters; a bare number is billions."""

SECONDS: Mapping[str, float] = MappingProxyType(
    {"": 1.0, "s": 1.0, "sec": 1.0, "secs": 1.0, "second": 1.0, "seconds": 1.0, "ms": 1e-3, "msec": 1e-3, "min": 60.0, "h": 3600.0}
)
"""Units of a time, in seconds; a bare number is seconds."""

COUNT: Mapping[str, float] = MappingProxyType({"": 1.0})
"""A whole number, without a unit."""

# A number, and letters behind it. Emphasis and "about" around it are no part of it.
_NUMBER = re.compile(r"[*_`~≈ ]*(?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d{1,3})?|\.\d+)\s*(?P<unit>[A-Za-z]*)[*_`~ ]*", re.ASCII)
_GROUPED = re.compile(r"[1-9]\d{0,2}(?:[,_]\d{3})+", re.ASCII)
_LONGEST = 60


@dataclass(frozen=True)
class Quantity:
    """`value`, which was rounded to `shown` digits behind the point: the true one is at most `half_unit` away."""

    value: float
    half_unit: float
    shown: int


def read_quantity(text: str, units: Mapping[str, float], *, default_unit: str = "") -> Quantity | None:
    """The quantity that `text` is, in the base of `units`; `default_unit` where it names none. None for anything else.

    Never negative, infinite or NaN. Thousands may be grouped ("1,024") where `units` is COUNT: elsewhere a comma may be a decimal one.
    """
    text = text.strip()
    if len(text) > _LONGEST:
        return None
    if units is COUNT and _GROUPED.fullmatch(text):
        text = re.sub("[,_]", "", text)
    match = _NUMBER.fullmatch(text)
    unit = match["unit"].lower() or default_unit if match else ""
    if match is None or unit not in units:
        return None
    value = float(match["number"]) * units[unit]
    if not math.isfinite(value) or (units is COUNT and value != int(value)):
        return None
    mantissa, _, exponent = match["number"].lower().partition("e")
    digits = len(mantissa.partition(".")[2])
    return Quantity(value, 0.5 * 10.0 ** (int(exponent or 0) - digits) * units[unit], digits)


def number_span(text: str) -> tuple[int, int] | None:
    """Where the number stands in a text that is one quantity, so that it can be replaced and its emphasis kept."""
    match = _NUMBER.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    if match is None:
        return None
    blanks = len(text) - len(text.lstrip())
    return blanks + match.start("number"), blanks + match.end("number")
