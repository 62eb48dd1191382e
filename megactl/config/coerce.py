"""One value, from text or from TOML, to the type of its setting: strictly, so that 1.5 heads or a quoted number is a mistake."""

from __future__ import annotations

import math
import re
from typing import Any

from megactl.config.absent import meant_choice
from megactl.config.settings import Setting

_INTEGER = re.compile(r"[+-]?\d+(_\d+)*", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+(_\d+)*)?\.?(\d+(_\d+)*)?([eE][+-]?\d+)?", re.ASCII)
# Python itself refuses to read an integer of thousands of digits, with an error that says nothing of settings.
_MOST_DIGITS = 40
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
# Text settings whose natural value is often a bare number in TOML (warmup = 100 beside warmup = "1%").
_NUMBER_OR_TEXT = ("optimizer.warmup",)


class CoercionError(ValueError):
    """A value that does not fit its setting: the rule it breaks and what to set instead."""

    def __init__(self, rule: str, instead: str | None = None) -> None:
        super().__init__(rule)
        self.rule = rule
        self.instead = instead


def coerce(setting: Setting, value: Any, *, typed: bool = False) -> Any:
    """`value` as `setting.type`. `typed`: it comes from TOML, where text is text and is not read as a number or a bool.

    The word "none" clears an optional setting. Raises CoercionError.
    """
    if isinstance(value, str) and setting.optional and value.strip().lower() == "none":
        return None
    if isinstance(value, (list, dict)):
        raise CoercionError(f"must be {_kind(setting)}, not a {'list' if isinstance(value, list) else 'table'}")
    if typed and isinstance(value, str) and setting.type is not str:
        raise CoercionError(f"must be {_kind(setting)}, not text", "write it without quotes" if _readable(setting, value) else None)
    return {bool: _boolean, int: _integer, float: _number, str: _text}[setting.type](setting, value)


def _kind(setting: Setting) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[setting.type]


def _readable(setting: Setting, value: str) -> bool:
    try:
        coerce(setting, value)
    except CoercionError:
        return False
    return True


def _boolean(setting: Setting, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if isinstance(value, str) and word in _TRUE + _FALSE:
        return word in _TRUE
    raise CoercionError("must be true or false")


def _integer(setting: Setting, value: Any) -> int:
    if isinstance(value, bool):
        raise CoercionError("must be a whole number, not true or false")
    if isinstance(value, str) and _INTEGER.fullmatch(value.strip()):
        if len(value) > _MOST_DIGITS:
            raise CoercionError(f"has more than {_MOST_DIGITS} digits")
        return int(value)
    if isinstance(value, int):
        return value
    # 5e5 is how people write half a million; it counts as long as it is exact.
    number = _number(setting, value, kind="a whole number")
    if number != int(number):
        raise CoercionError("must be a whole number", f"use {math.floor(number)} or {math.ceil(number)}")
    return int(number)


def _number(setting: Setting, value: Any, kind: str = "a number") -> float:
    if isinstance(value, bool):
        raise CoercionError(f"must be {kind}, not true or false")
    if isinstance(value, (int, float)):
        number = float(value)
    else:
        text = str(value).strip()
        if not isinstance(value, str) or not _NUMBER.fullmatch(text) or not any(c.isdigit() for c in re.split("[eE]", text)[0]):
            raise CoercionError(f"must be {kind}", _number_hint(str(value)))
        number = float(text)
    if not math.isfinite(number):
        raise CoercionError(f"must be {kind}, not infinite or NaN")
    return number


def _number_hint(text: str) -> str | None:
    """What to write for the usual slips: a decimal comma, a unit letter."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMbB])\s*", text)
    if match:
        scale = {"k": 1_000, "m": 1_000_000, "b": 1_000_000_000}[match[2].lower()]
        return f"use {float(match[1]) * scale:.0f}"
    if re.fullmatch(r"\s*\d+,\d+\s*", text):
        # Three digits after the comma group thousands; anything else is a decimal comma.
        grouped = len(text.strip().partition(",")[2]) == 3
        return f"use {text.strip().replace(',', '_' if grouped else '.')}"
    return None


def _text(setting: Setting, value: Any) -> str:
    if setting.name in _NUMBER_OR_TEXT and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise CoercionError("must be text", f'write "{value}" in quotes')
    if setting.choices and value not in setting.choices:
        close = meant_choice(value, setting.choices)
        listed = f"must be {setting.choices[0]}" if len(setting.choices) == 1 else f"must be one of {', '.join(setting.choices)}"
        raise CoercionError(listed, f"did you mean {close}?" if close else None)
    if not value.strip() and not setting.choices:
        raise CoercionError("must not be empty", "leave it out" if setting.optional else None)
    if any(ord(character) < 32 and character != "\t" for character in value):
        raise CoercionError("must not contain line breaks or control characters")
    return value
