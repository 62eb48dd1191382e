"""What every command prints with: one JSON document, plain tables, messages on stderr, colour only where it is wanted."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TextIO

from megactl.errors import MegactlError

Facts = ParamSpec("Facts")

_LINE_EVERY_S = 5.0


def wants_colour(stream: TextIO, environ: Mapping[str, str] | None = None) -> bool:
    """Colour only on a terminal that can show it, and never with NO_COLOR (https://no-color.org: any text that is not empty)."""
    environ = os.environ if environ is None else environ
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def say(message: str, *, label: str | None = None) -> None:
    """One message to stderr. `label` ("error", "warning", "hint") stands before it, coloured on a terminal."""
    if label is not None:
        code = {"error": "1;31", "warning": "1;33"}.get(label, "1")
        shown = f"\x1b[{code}m{label}:\x1b[0m" if wants_colour(sys.stderr) else f"{label}:"
        message = f"{shown} {message}"
    print(message, file=sys.stderr, flush=True)


def strict(value: Any) -> Any:
    """`value` as JSON has it: NaN and infinities become null, tuples lists, paths and other objects their text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return str(value)


def emit_json(document: Any) -> None:
    """The one JSON document of a command, on stdout."""
    print(json.dumps(strict(document), indent=2, ensure_ascii=False, allow_nan=False), flush=True)


def write_text(path: Path, text: str) -> None:
    """Write a page of --markdown. Raises MegactlError where that is not possible."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MegactlError(f"{path}: cannot be written: {error.strerror}", "choose another place with --markdown FILE") from error


def columns(rows: Sequence[Sequence[str]], *, indent: str = "", gap: str = "  ") -> list[str]:
    """Rows as left-aligned plain columns; the last column is as wide as it needs. Plain text survives a pipe, a box does not."""
    if not rows:
        return []
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]) - 1)]
    return [(indent + gap.join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])).rstrip() for row in rows]


def size(number: float) -> str:
    """A number of bytes for people: "1.50 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(number) < 1024 or unit == "TiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.2f} {unit}"
        number /= 1024
    raise AssertionError("unreachable")


def decimal_size(number: float) -> str:
    """A number of bytes in powers of 1000, as disks are sold and quotas are set: "1.61 GB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(number) < 1000 or unit == "TB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.3f} {unit}" if unit == "TB" else f"{number:.2f} {unit}"
        number /= 1000
    raise AssertionError("unreachable")


def count(number: float) -> str:
    """A large number for people, in the field's units: "345.2M", "7.46B"."""
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= scale:
            return f"{number / scale:.4g}{unit}"
    return f"{number:g}"


def printable(text: str) -> str:
    """Control characters shown, not obeyed: neither a document nor a model may write to the terminal's title or clipboard."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else repr(letter)[1:-1] for letter in text)


def said_now_and_then(describe: Callable[Facts, str]) -> Callable[Facts, None]:
    """A progress callback that says describe(...) on stderr every few seconds, for where no bar can be drawn."""
    last = time.monotonic()

    def update(*arguments: Facts.args, **named: Facts.kwargs) -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_EVERY_S:
            last = time.monotonic()
            say(describe(*arguments, **named))

    return update
