"""Makes runs of what a scanner found in one file: where one ends and the next starts, and which parser gets which line."""

from __future__ import annotations

import bisect
import math
import re
from array import array
from collections.abc import Sequence

from megactl.report.logs.anchors import Kind
from megactl.report.logs.arguments import unprefixed
from megactl.report.logs.deepspeed import DeepSpeed
from megactl.report.logs.events import classify
from megactl.report.logs.huggingface import HuggingFace
from megactl.report.logs.megatron import Megatron
from megactl.report.logs.own import Own
from megactl.report.logs.parser import OpenRun, Parser
from megactl.report.logs.records import VALUE_COLUMNS, Columns, Run
from megactl.report.logs.scanning import Batch

_PARSERS: tuple[type[Parser], ...] = (Megatron, DeepSpeed, HuggingFace, Own)
# Who reads the lines behind an anchor that has lines to follow.
_OWNERS = ((Kind.ARGUMENTS, Megatron), (Kind.DEEPSPEED_CONFIG, DeepSpeed), (Kind.HF_ARGUMENTS | Kind.HF_METRICS, HuggingFace))
_STARTS = Kind.ARGUMENTS | Kind.WORLD | Kind.DEEPSPEED
_ENDS = ("oom-gpu", "oom-host", "time-limit", "cancelled", "node-failure", "killed-subprocess", "stopped", "completed")
_DATE = re.compile(r"\b([0-9]{4}-[0-9]{2}-[0-9]{2})[ T]([0-9]{2}:[0-9]{2}:[0-9]{2})")
_DATED = 400
_MOST_HELD = 200


class _Open:
    """One run and the parsers that read it."""

    def __init__(self, file: str, number: int, first_line: int) -> None:
        self.state = OpenRun(Run(file, number, first_line=first_line))
        self.parsers: list[Parser] = [kind(self.state) for kind in _PARSERS]
        self.owner: type[Parser] | None = None

    def has_rows(self) -> bool:
        return len(self.state.run.iterations) > 0 or any(len(parser.rows) for parser in self.parsers)


class Assembly:
    """Takes batches of one file in order. Call `finish` once."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._runs: list[Run] = []
        self._open = _Open(file, 0, 1)
        self._held: list[tuple[int, int, str]] = []

    def add(self, batch: Batch) -> None:
        """What the scanner found since the last call."""
        columns = _BatchColumns(batch)
        for line, kinds, text in batch.notes:
            if kinds & (_STARTS | Kind.REWIND):
                columns.hand_over(self._open.state.run, line)
                self._start(kinds, line)
            if kinds & (Kind.EVENT | Kind.TRACE):
                # Both are judged by the iterations before them.
                columns.hand_over(self._open.state.run, line)
            self._note(kinds, line, text)
        columns.hand_over(self._open.state.run, None)

    def finish(self, last_line: int, *, is_own: bool) -> list[Run]:
        """The runs. last_line: of the file. is_own: the scanner met lines that only megactl prints."""
        self._close(last_line)
        for run in self._runs:
            if is_own and run.system == "megatron-lm":
                run.system = "megactl"
        return self._runs

    def _start(self, kinds: int, line: int) -> None:
        now = self._open
        again = kinds & _STARTS & now.state.seen
        if not (now.has_rows() or now.state.events.has(*_ENDS) or again & (Kind.ARGUMENTS | Kind.WORLD)):
            return
        if kinds & Kind.DEEPSPEED and not kinds & Kind.REWIND and not again and not now.state.events.has(*_ENDS):
            return  # DeepSpeed's engine starts within a run whose Megatron has already said so
        held, self._held = self._held, []
        self._close(line - 1)
        self._open = _Open(self._file, len(self._runs), line)
        if kinds & Kind.REWIND:
            self._open.state.inherit(now.state)
        for note in held:
            self._dispatch(*note)

    def _note(self, kinds: int, line: int, text: str) -> None:
        if kinds & Kind.TRACE and (self._open.has_rows() or self._open.state.events.has(*_ENDS)):
            # The shell's trace of the next launch comes before that run says anything itself.
            if len(self._held) < _MOST_HELD:
                self._held.append((kinds, line, text))
            return
        self._dispatch(kinds, line, text)

    def _dispatch(self, kinds: int, line: int, text: str) -> None:
        now = self._open
        now.state.seen |= kinds
        for opener, owner in _OWNERS:
            if kinds & opener:
                now.owner = owner
        if not kinds & Kind.BLOCK or kinds & ~Kind.BLOCK:
            self._date(text)
        for parser in now.parsers:
            mine = kinds & parser.kinds | (kinds & Kind.BLOCK if isinstance(parser, now.owner or ()) else 0)
            if mine:
                parser.note(mine, line, text)
        if kinds & Kind.EVENT and (kind := classify(unprefixed(text))) is not None:
            now.state.events.add(kind, line, text, survived=now.state.survived)

    def _date(self, text: str) -> None:
        match = _DATE.search(text, 0, _DATED)
        if match:
            run = self._open.state.run
            run.ended_at = f"{match[1]}T{match[2]}"
            run.started_at = run.started_at or run.ended_at

    def _close(self, last_line: int) -> None:
        run = self._open.state.run
        for parser in self._open.parsers:
            parser.finish()
        if not len(run.iterations):
            # A Trainer's run has lines of DeepSpeed's engine too: who says more of the steps is right.
            run.iterations = max((parser.rows for parser in self._open.parsers), key=len)
        run.last_line = last_line
        self._open.state.events.settle(run)
        run.system = _system(run, self._open.state.seen)
        summed = run.summary.get("parameters_summed_over_ranks")
        if run.model_parameters is None and not {"num_layers", "hidden_size"} <= run.arguments.keys():
            run.model_parameters = summed
        self._runs.append(run)


def _system(run: Run, seen: int) -> str:
    """Whose run it was, by what only that system prints."""
    if seen & Kind.METRICS_LINE:
        return "megactl"
    has_deepspeed = seen & (Kind.DEEPSPEED | Kind.DEEPSPEED_CONFIG | Kind.DEEPSPEED_STEP) or "deepspeed" in run.arguments
    if seen & (Kind.ARGUMENTS | Kind.WORLD | Kind.FIRST | Kind.REWIND):
        return "megatron-deepspeed" if has_deepspeed else "megatron-lm"
    if seen & (Kind.HF_ARGUMENTS | Kind.HF_LOG | Kind.HF_METRICS | Kind.HF_INFO) or (seen & Kind.HF_PROGRESS and len(run.iterations)):
        return "hf-trainer"
    return "deepspeed" if has_deepspeed else "unknown"


class _BatchColumns:
    """The columns of a batch, handed over to runs in order of their lines."""

    def __init__(self, batch: Batch) -> None:
        self._whole = {"iteration": batch.iteration, "total": batch.total, "line": batch.line, "interrupted": batch.interrupted}
        self._whole |= dict(zip(VALUE_COLUMNS, batch.values, strict=True))
        self._losses = dict(batch.losses)
        self._timers = batch.timers
        self._lines = _lines(batch.line)
        self._row = 0
        self._timer_rows = [0] * len(self._timers)

    def hand_over(self, run: Run, before: int | None) -> None:
        """Give `run` the rows of lines before `before`, all where it is None."""
        end = len(self._lines) if before is None else bisect.bisect_left(self._lines, before, self._row)
        if end > self._row:
            self._extend(run.iterations, self._row, end)
            self._row = end
        for index, (name, lines, values) in enumerate(self._timers):
            start = self._timer_rows[index]
            stop = len(lines) // 8 if before is None else bisect.bisect_left(_lines(lines), before, start)
            if stop > start:
                run.timers.setdefault(name, array("d")).frombytes(_part(values, start, stop, 8))
                self._timer_rows[index] = stop

    def _extend(self, columns: Columns, start: int, end: int) -> None:
        rows = len(columns)
        for name, data in self._whole.items():
            column = getattr(columns, name)
            column.frombytes(_part(data, start, end, column.itemsize))
        for name in self._losses:
            columns.losses.setdefault(name, _missing(rows))
        for name, losses in columns.losses.items():
            if name in self._losses:
                losses.frombytes(_part(self._losses[name], start, end, 8))
            else:
                losses.extend(_missing(end - start))


def _lines(data: bytes) -> memoryview:
    return memoryview(data).cast("q")


def _part(data: bytes, start: int, end: int, size: int) -> memoryview:
    return memoryview(data)[start * size : end * size]


def _missing(rows: int) -> array[float]:
    return array("d", [math.nan]) * rows


def assemble(file: str, batches: Sequence[Batch], last_line: int, *, is_own: bool = False) -> list[Run]:
    """The runs in batches that are already there; for tests and short texts."""
    assembly = Assembly(file)
    for batch in batches:
        assembly.add(batch)
    return assembly.finish(last_line, is_own=is_own)
