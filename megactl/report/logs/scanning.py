"""What a scanner gives, and which scanner is used: the compiled one, or its Python twin, which finds the same and is slower."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple, Protocol

from megactl.report.logs.anchors import COMMON, anchors_for


class Batch(NamedTuple):
    """What was found since the last batch, in file order. Columns are the bytes of native int64 (`interrupted`: int8) and float64.

    values: one column for each of VALUE_COLUMNS. losses: (printed name, column). notes: (line, kinds, text without colours).
    timers: (name, lines, milliseconds).
    """

    iteration: bytes
    total: bytes
    line: bytes
    interrupted: bytes
    values: list[bytes]
    losses: list[tuple[str, bytes]]
    notes: list[tuple[int, int, str]]
    timers: list[tuple[str, bytes, bytes]]


class Scanner(Protocol):
    """Fed with pieces of a log of any size. `feed` returns how many values wait in memory, `take` hands them over."""

    @property
    def saw_own_line(self) -> bool: ...
    @property
    def duplicates(self) -> int: ...
    @property
    def line(self) -> int: ...
    def feed(self, data: Any, size: int, /) -> int: ...
    def finish(self) -> None: ...
    def take(self) -> Any: ...


def make_scanner(cap: int, timers: Collection[str] | None = None) -> Scanner:
    """A scanner that looks at the first `cap` bytes of each line: the compiled one where it is built.

    timers: names of those to keep, of seven letters or more (None: all). A line of timers without one of them costs nearly nothing.
    """
    from megactl.report.logs.python_scanner import PythonScanner
    from megactl.storage.native import native_module

    native = native_module()
    if native is None:
        return PythonScanner(cap, timers)
    table = [(anchor.text, anchor.kinds, anchor.follow, anchor.until) for anchor in anchors_for(timers)]
    scanner: Scanner = native.LogScanner(table, COMMON, cap, None if timers is None else list(timers))
    return scanner
