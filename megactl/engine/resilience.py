"""Stopping cleanly and noticing a hang: stop requests, heartbeats in memory shared by the ranks of a machine, time limits.

Nothing here acts on the training state. A signal only sets a flag, which the trainer reads between steps (and reduces over
ranks, so that all stop at the same one); a heartbeat only stores numbers, which the launcher reads from outside.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

from megactl.errors import MegactlError

# SIGHUP is among them because a closed terminal or a dropped ssh connection must not cost the steps since the last save.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)

HANG_FLOOR_SECONDS = 120.0
HANG_STEP_FACTOR = 20.0
# Until a rank's second step ends there is no step to go by: it connects, builds indices, compiles, allocates.
START_SECONDS = 900.0
# Saving and evaluating are rarer and far longer than a step (a rank may wait for another one's file): they get this many times its limit.
PHASE_FACTOR = 15.0
# The same for what is loaded, and evaluated, before the first step.
START_PHASE_FACTOR = 2.0
PHASES = ("start", "step", "evaluate", "save", "end")

_ROW = 4  # beat (monotonic seconds), iteration, median step (seconds, 0: not known yet), phase
_WARMED_UP = 1  # intervals between beats before the limit of a step holds: the first step compiles, allocates and connects
# Without a watch, a collective's own timeout is all there is: torch's default for NCCL.
_COLLECTIVE_SECONDS = 600.0


class Board:
    """One page of shared memory: the stop request, and a row a local rank. Made before the fork, so that all see the same page.

    Every cell is one aligned float64, which the processor stores whole; a reader never sees half of a value.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._cells = memoryview(mmap.mmap(-1, 8 * (1 + _ROW * ranks))).cast("d")

    @property
    def stop_signal(self) -> int:
        """Number of the signal that asked for a stop, 0 if none."""
        return int(self._cells[0])

    @stop_signal.setter
    def stop_signal(self, number: int) -> None:
        self._cells[0] = number

    def write(self, index: int, column: int, value: float) -> None:
        """Store one cell of the row of local rank `index`."""
        self._cells[1 + _ROW * index + column] = value

    def pulse(self, index: int) -> Pulse:
        """What local rank `index` last reported."""
        start = 1 + _ROW * index
        beat, iteration, median, phase = self._cells[start : start + _ROW]
        return Pulse(beat, int(iteration), median, PHASES[int(phase)])


@dataclass(frozen=True)
class Pulse:
    """A rank's last heartbeat: time.monotonic() of it (0: none yet), iteration, median seconds a step (0: unknown), phase."""

    beat: float
    iteration: int
    median: float
    phase: str


class Heartbeat:
    """A rank's own pen on the board. A beat costs about a microsecond, so the trainer beats every step without thought."""

    def __init__(self, board: Board, index: int) -> None:
        self._board = board
        self._index = index
        self._intervals: deque[float] = deque(maxlen=51)
        self._last: tuple[int, float] | None = None

    def beat(self, iteration: int | None = None) -> None:
        """Say that this rank is alive; with `iteration` (counted from 1) also that this step begins or has ended."""
        now = time.monotonic()
        if iteration is not None:
            if self._last is not None and iteration > self._last[0]:
                self._intervals.append((now - self._last[1]) / (iteration - self._last[0]))
                if len(self._intervals) >= _WARMED_UP:
                    self._board.write(self._index, 2, statistics.median(self._intervals))
                    self._board.write(self._index, 3, PHASES.index("step"))
            if self._last is None or iteration > self._last[0]:
                self._last = (iteration, now)
            self._board.write(self._index, 1, iteration)
        self._board.write(self._index, 0, now)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within `name` ("evaluate", "save", or "start" and "end", which have the limit of the start) a longer limit holds."""
        before = PHASES.index(self._board.pulse(self._index).phase)
        self._board.write(self._index, 3, PHASES.index(name))
        self.beat()
        try:
            yield
        finally:
            self._board.write(self._index, 3, before)
            # The pause is no step: without this the next interval would count the save as one.
            if self._last is not None:
                self._last = (self._last[0], time.monotonic())
            self.beat()


@dataclass(frozen=True)
class Limits:
    """Seconds without progress after which a rank counts as hung.

    `step`: once its steps are known; None derives it from them, 0 switches the whole watch off. `start`: before; 0 switches that off.
    """

    step: float | None = None
    start: float = START_SECONDS

    @classmethod
    def from_environment(cls) -> Limits:
        """MEGACTL_HANG_TIMEOUT and MEGACTL_START_TIMEOUT, where they are set. Raises MegactlError for what is no number of seconds."""
        step, start = _seconds("MEGACTL_HANG_TIMEOUT", "600"), _seconds("MEGACTL_START_TIMEOUT", "3600")
        return cls(step, START_SECONDS if start is None else start)

    @property
    def collective(self) -> float:
        """Timeout of a collective: longer than the watch takes. The watch knows who is late, a collective only that it waits."""
        if self.step == 0:
            return _COLLECTIVE_SECONDS
        step = HANG_FLOOR_SECONDS if self.step is None else self.step
        return max(_COLLECTIVE_SECONDS, START_PHASE_FACTOR * self.start + 60.0, PHASE_FACTOR * step + 60.0)


def _seconds(name: str, example: str) -> float | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise MegactlError(f"{name}={text}: must be a number of seconds", f"set 0 to switch the watch off, or for example {example}")
    return seconds


@dataclass(frozen=True)
class Overdue:
    """A rank whose heartbeat is older than its limit (both in seconds)."""

    index: int
    pulse: Pulse
    silent: float
    limit: float

    def __str__(self) -> str:
        iteration = f"at iteration {self.pulse.iteration}" if self.pulse.iteration else "before its first iteration was done"
        limit = f"; limit {self.limit:.0f} s" if self.limit < float("inf") else ""
        return f"made no progress for {self.silent:.0f} s {iteration} ({self.pulse.phase}{limit})"

    @property
    def hint(self) -> str:
        """Which variable sets the limit."""
        name = "MEGACTL_START_TIMEOUT" if _is_starting(self.pulse) else "MEGACTL_HANG_TIMEOUT"
        return f"{name}=SECONDS sets the limit, 0 switches it off"


def _is_starting(pulse: Pulse) -> bool:
    """Whether the limit of the start holds, which is also that of the end: neither has a step to go by."""
    return pulse.median <= 0 or pulse.phase in ("start", "end")


class HangWatch:
    """Decides which ranks are overdue. Made before the ranks start: until its first beat a rank counts as silent from here on."""

    def __init__(self, board: Board, limits: Limits) -> None:
        self._board = board
        self._limits = limits
        self._last_check: float | None = None
        self._excused_until = time.monotonic()

    def limit(self, pulse: Pulse) -> float:
        """Seconds this rank may be silent now; infinite while it is not watched."""
        step, start = self._limits.step, self._limits.start
        if step == 0 or (start == 0 and _is_starting(pulse)):
            return float("inf")
        if _is_starting(pulse):
            return start * START_PHASE_FACTOR if pulse.phase in ("evaluate", "save") else start
        step = step if step is not None else max(HANG_FLOOR_SECONDS, HANG_STEP_FACTOR * pulse.median)
        return step * PHASE_FACTOR if pulse.phase in ("evaluate", "save") else step

    def silence(self, index: int, now: float | None = None) -> Overdue:
        """How long local rank `index` has been silent, overdue or not."""
        pulse = self._board.pulse(index)
        now = time.monotonic() if now is None else now
        return Overdue(index, pulse, now - max(pulse.beat, self._excused_until), self.limit(pulse))

    def check(self, alive: Iterable[int], now: float | None = None) -> list[Overdue]:
        """Overdue ranks among the local ranks `alive`, worst first. Call it about once a second."""
        now = time.monotonic() if now is None else now
        # Where the watcher itself did not run for a while (Ctrl-Z, a blocked terminal), the ranks may have been stopped with it:
        # they get a full limit from here before anyone is called hung.
        if self._last_check is not None and now - self._last_check > 5.0:
            self._excused_until = now
        self._last_check = now
        silences = [self.silence(index, now) for index in alive]
        return sorted((item for item in silences if item.silent > item.limit), key=lambda overdue: -overdue.silent)


class LocalWatch:
    """A rank that watches itself from a thread, for runs whose parent is not ours (torchrun, one srun task a GPU)."""

    def __init__(self, watch: HangWatch, *, log: IO[str], on_hang: Callable[[Overdue], None]) -> None:
        self._watch, self._log, self._on_hang = watch, log, on_hang
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="megactl-hang-watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End the watch and wait for its thread."""
        self._done.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._done.wait(0.5):
            if overdue := self._watch.check((0,)):
                faulthandler.dump_traceback(file=self._log, all_threads=True)
                self._on_hang(overdue[0])
                return


class StopFlag:
    """Remembers that somebody asked this run to stop. Handlers store the name and return: saving happens at a step boundary."""

    def __init__(self, board: Board | None = None) -> None:
        self._board = board
        self._name: str | None = None
        self._previous: dict[int, Any] = {}
        self._interrupts = 0

    @property
    def requested(self) -> str | None:
        """Name of the signal (or other reason) that asked for the stop, None while nobody has."""
        if self._name is None and self._board is not None and self._board.stop_signal:
            self._name = signal.Signals(self._board.stop_signal).name
        return self._name

    def request(self, reason: str) -> None:
        """Ask for a stop from inside the process, for example when a time limit is reached. The first reason is kept."""
        self._name = self._name or reason

    def install(self, *, own_interrupts: bool) -> None:
        """Take the stop signals. With `own_interrupts` a second SIGINT raises KeyboardInterrupt; without, SIGINT is left to the parent.

        A SIGHUP that is ignored already (nohup) stays ignored. Must be called in the main thread.
        """
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            ignored = number == signal.SIGINT and not own_interrupts
            self._previous[number] = signal.signal(number, signal.SIG_IGN if ignored else self._handle)

    def restore(self) -> None:
        """Give the signals back to whoever had them before `install`."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts >= 2:
            raise KeyboardInterrupt
        self._name = self._name or signal.Signals(number).name


def exit_duration_reached(minutes: float, started: float, *, margin: float = 0.0, now: float | None = None) -> bool:
    """Whether `minutes` (0: no limit) have passed since `started` (time.monotonic()), or would within `margin` seconds more."""
    elapsed = (time.monotonic() if now is None else now) - started
    return minutes > 0 and elapsed + margin >= 60.0 * minutes


def enable_stack_dumps(log: IO[str]) -> None:
    """Write Python stacks to `log`: all threads on SIGQUIT (`kill -QUIT pid` shows where a rank is), and on a fatal signal to stderr."""
    faulthandler.register(signal.SIGQUIT, file=log, all_threads=True, chain=False)
    faulthandler.enable(file=sys.stderr, all_threads=True)


def disable_stack_dumps() -> None:
    """Undo `enable_stack_dumps`, before its log is closed."""
    faulthandler.unregister(signal.SIGQUIT)
    faulthandler.disable()
