"""The log scanner in Python: what is used where megactl._native is not built. Finds exactly what csrc/native/log_scanner.h finds."""

from __future__ import annotations

import bisect
import math
import re
import struct
from array import array
from collections import deque
from collections.abc import Collection, Iterable
from typing import Any

from megactl.report.logs.anchors import ACTED_ON, Anchor, Kind, anchors_for
from megactl.report.logs.python_records import MOST_TIMERS, Iteration, IterationReader, timer_rows, timers_of_line
from megactl.report.logs.records import VALUE_COLUMNS
from megactl.report.logs.scanning import Batch

_BREAK = re.compile(rb"[\n\r]")
_ESCAPE = re.compile(rb"\x1b(?:\[[^@-~]*(?:[@-~]|\Z)|\][^\x07]*(?:\x07|\Z)|[^\[\]]|\Z)", re.DOTALL)
_RECENT = 8


def _places(text: bytes, anchors: Iterable[Anchor]) -> list[int]:
    """Where anchors start in `text`, sorted. One search an anchor is many times faster than one regular expression of them all."""
    found: list[int] = []
    for anchor in anchors:
        at = text.find(anchor.text)
        while at >= 0:
            found.append(at)
            at = text.find(anchor.text, at + 1)
    return sorted(found)


class PythonScanner:
    """See scanning.Scanner."""

    def __init__(self, cap: int, timers: Collection[str] | None = None) -> None:
        self._cap = cap
        self._anchors = anchors_for(timers)
        self._wanted = None if timers is None else {name.encode() for name in timers}
        self._reader = IterationReader()
        self._carry = bytearray()
        self._open = self._cut = False
        self.line = 1
        self.duplicates = 0
        self._left, self._block = 0, self._anchors[0]
        self._interrupted = False
        self._recent: deque[tuple[int, bytes]] = deque(maxlen=_RECENT)
        self._last_iteration = -1
        self._rows: list[tuple[Iteration, int, bool]] = []
        self._notes: list[tuple[int, int, str]] = []
        self._timers: dict[bytes, tuple[array[int], array[float]]] = {}

    @property
    def saw_own_line(self) -> bool:
        """Whether a line had a field that only megactl prints."""
        return self._reader.saw_own_line

    def feed(self, data: Any, size: int) -> int:
        """Scan the first `size` bytes of `data`; returns how many values wait to be taken."""
        text = bytes(memoryview(data)[:size])
        start = self._close_open(text) if self._open else 0
        if start is not None:
            end = max(text.rfind(b"\n", start), text.rfind(b"\r", start)) + 1
            if end > start:
                self._scan_lines(text[start:end])
            self._keep(text[max(start, end) :])
        waiting = sum(len(lines) for lines, _ in self._timers.values())
        return len(self._rows) * (len(VALUE_COLUMNS) + 4) + len(self._notes) * 8 + waiting * 2

    def finish(self) -> None:
        """The input is over: what is left of it is a line without an end."""
        if self._open:
            self._read_carry(terminated=False)

    def take(self) -> Batch:
        """What was found since the last call."""
        rows, notes, timers = self._rows, self._notes, self._timers
        self._rows, self._notes, self._timers = [], [], {name: (array("q"), array("d")) for name in timers}
        values = [array("d", (row.values.get(name, math.nan) for row, _, _ in rows)).tobytes() for name in VALUE_COLUMNS]
        losses = [
            (name.decode("utf-8", "replace"), array("d", (row.losses.get(name, math.nan) for row, _, _ in rows)).tobytes())
            for name in self._reader.loss_names
        ]
        return Batch(
            array("q", (row.iteration for row, _, _ in rows)).tobytes(),
            array("q", (row.total for row, _, _ in rows)).tobytes(),
            array("q", (line for _, line, _ in rows)).tobytes(),
            array("b", (interrupted for _, _, interrupted in rows)).tobytes(),
            values,
            losses if rows else [],
            notes,
            [(name.decode(), lines.tobytes(), found.tobytes()) for name, (lines, found) in timers.items() if lines],
        )

    def _close_open(self, text: bytes) -> int | None:
        """Complete the line that is open from `text`; where the next one starts, None if it does not end here."""
        stop = _BREAK.search(text)
        self._keep(text[: stop.start()] if stop else text)
        if stop is None:
            return None
        self._read_carry(terminated=True)
        self.line += stop[0] == b"\n"
        return stop.end()

    def _keep(self, text: bytes) -> None:
        if not text:
            return
        self._open = True
        room = self._cap - len(self._carry)
        self._carry += text[:room]
        self._cut |= len(text) > room

    def _read_carry(self, *, terminated: bool) -> None:
        self._read_line(bytes(self._carry), self.line, terminated and not self._cut)
        self._carry.clear()
        self._open = self._cut = False

    def _scan_lines(self, text: bytes) -> None:
        places = _places(text, self._anchors)
        at = counted = 0
        while at < len(text):
            if self._left > 0:
                start = hit = at
            else:
                place = bisect.bisect_left(places, at)
                if place == len(places):
                    break
                hit = places[place]
                start = max(text.rfind(b"\n", at, hit), text.rfind(b"\r", at, hit), at - 1) + 1
            stop = _BREAK.search(text, hit)
            assert stop is not None, "what is scanned ends with a break"
            self.line += text.count(b"\n", counted, start)
            counted = start
            size = stop.start() - start
            self._read_line(text[start : start + min(size, self._cap)], self.line, size <= self._cap)
            at = stop.end()
        self.line += text.count(b"\n", counted)

    def _read_line(self, line: bytes, number: int, terminated: bool) -> None:
        met = [anchor for anchor in self._anchors if anchor.text in line]
        in_block = self._left > 0
        if not met and not in_block:
            return
        kinds = 0
        for anchor in met:
            kinds |= anchor.kinds
        if b"\x1b" in line:
            line = _ESCAPE.sub(b"", line)
        is_rows = in_block and bool(self._block.kinds & Kind.ACROSS_RANKS)
        self._act(kinds | (Kind.ACROSS_RANKS if is_rows else 0), line, number, terminated)
        noted = in_block and not is_rows
        if in_block:
            self._left -= 1
            if self._block.until and self._block.until in line:
                self._left = 0
        opens = next((anchor for anchor in met if anchor.follow), None)
        if opens is not None:
            self._left, self._block = opens.follow, opens
        if kinds & ~ACTED_ON or noted:
            self._note(number, kinds | (Kind.BLOCK if noted else 0), line)

    def _act(self, kinds: int, line: bytes, number: int, terminated: bool) -> None:
        if kinds & Kind.START:
            self._recent.clear()
            self._last_iteration = -1
        if kinds & Kind.ITERATION:
            for row in self._reader.read(line):
                self._add_row(row, line, number)
        if kinds & Kind.TIMER_LINE:
            self._add_timers(timers_of_line(line, terminated), number)
        if kinds & Kind.ACROSS_RANKS:
            self._add_timers(timer_rows(line, terminated), number)
        self._interrupted |= bool(kinds & Kind.INTERRUPTION)

    def _note(self, number: int, kinds: int, line: bytes) -> None:
        self._notes.append((number, kinds, line.decode("utf-8", "replace")))

    def _add_row(self, row: Iteration, line: bytes, number: int) -> None:
        row.drop_placeholders()
        printed = (row.losses[name] for name in self._reader.loss_names if name in row.losses)
        # By its bits, as the compiled scanner compares them.
        mark = (row.iteration, struct.pack("d", next(printed, 0.0)))
        falls = row.iteration < self._last_iteration
        if row.iteration == self._last_iteration or (falls and mark in self._recent):
            self.duplicates += 1
            return
        if falls:
            self._recent.clear()
        if falls or self._last_iteration < 0:
            self._note(number, Kind.REWIND if falls else Kind.FIRST, line)
        self._recent.append(mark)
        self._last_iteration = row.iteration
        self._rows.append((row, number, self._interrupted))
        self._interrupted = False

    def _add_timers(self, found: Any, number: int) -> None:
        for name, milliseconds in found:
            unwanted = self._wanted is not None and name not in self._wanted
            if unwanted or (name not in self._timers and len(self._timers) == MOST_TIMERS):
                continue
            lines, values = self._timers.setdefault(name, (array("q"), array("d")))
            lines.append(number)
            values.append(milliseconds)
