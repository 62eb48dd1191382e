"""The parent's side of a run: wait for every rank, pass stop requests on, and end all ranks when one fails, hangs or is told to."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from megactl.engine.launch.context import RankContext, log_path
from megactl.engine.launch.failures import Failure, read_report
from megactl.engine.launch.host import oom_kills, process_state
from megactl.engine.launch.stacks import innermost_frame, waits_for_others
from megactl.engine.resilience import STOP_SIGNALS, Board, HangWatch, Overdue

POLL_SECONDS = 0.25
# Other ranks' reports arrive within this time of the first failure; where all we have is lost connections, the cause may take longer to die
# (it may be writing a core file), so those wait longer.
REPORT_SECONDS = 1.0
WITNESS_SECONDS = 5.0
DUMP_SECONDS = 1.5
KILL_SECONDS = 10.0
_OK = (0, 75)


@dataclass
class Child:
    """A forked rank. `status` is the raw wait status once it has ended."""

    pid: int
    context: RankContext
    status: int | None = None


@dataclass
class Outcome:
    """How the ranks of this machine ended: exit codes by rank, failures, a hang's description, and whether the user aborted."""

    codes: dict[int, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    hang: str | None = None
    aborted: bool = False


class Supervisor:
    """Supervises `children`; `stderr_pipe` carries rank 0's stderr to the console and its log; `stopping`: see `Job`. Use `run` once."""

    def __init__(
        self, children: list[Child], board: Board, watch: HangWatch, run_dir: Path, stderr_pipe: int | None, stopping: str
    ) -> None:  # fmt: skip
        self._children = children
        self._board = board
        self._watch = watch
        self._run_dir = run_dir
        self._pipe = stderr_pipe
        self._stopping = stopping
        self._pipe_log = log_path(run_dir, 0).open("ab", buffering=0) if stderr_pipe is not None else None
        self._live_line = stderr_pipe is not None and sys.stderr.isatty()
        self._unfinished = b""
        self._signals: list[int] = []
        self._announced = 0
        self._interrupts = 0
        self._oom_before = oom_kills()
        self._outcome = Outcome()

    def run(self) -> Outcome:
        """Block until every rank has ended, by itself or by us. Ranks only outlive this call if the kernel cannot kill them."""
        with self._listening() as selector:
            deadline: float | None = None
            while self._alive() and not self._outcome.aborted and self._outcome.hang is None:
                self._wait(selector)
                self._reap()
                self._pass_on_signals()
                if self._outcome.failures:
                    deadline = self._deadline()
                    if time.time() >= deadline:
                        # Ranks that lost a connection are witnesses; a rank that is stopped is what they waited for.
                        if all(failure.secondary for failure in self._outcome.failures) and self._stopped():
                            self._outcome.hang = self._describe_hang([])
                        break
                elif overdue := self._watch.check(child.context.local_rank for child in self._alive()):
                    self._outcome.hang = self._describe_hang(overdue)
            self._kill_rest()
            self._drain()
        return self._outcome

    def record_signal(self, number: int, frame: FrameType | None = None) -> None:
        """Signal handler of the parent: keep the number; the loop acts on it."""
        self._signals.append(number)

    @contextmanager
    def _listening(self) -> Iterator[selectors.BaseSelector]:
        # The wake-up socket makes select return at once on any signal, also when a signal arrives just before it is called.
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        before = {number: signal.signal(number, self.record_signal) for number in (*self._taken(), signal.SIGCHLD)}
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(reader, selectors.EVENT_READ)
                if self._pipe is not None:
                    os.set_blocking(self._pipe, False)
                    selector.register(self._pipe, selectors.EVENT_READ)
                yield selector
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            reader.close()
            writer.close()
            if self._pipe_log is not None:
                self._pipe_log.close()

    @staticmethod
    def _taken() -> list[int]:
        return [number for number in STOP_SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]

    def _wait(self, selector: selectors.BaseSelector) -> None:
        for key, _ in selector.select(POLL_SECONDS):
            if key.fileobj == self._pipe:
                if not self._relay():
                    selector.unregister(key.fileobj)
            elif isinstance(key.fileobj, socket.socket):
                key.fileobj.recv(4096)

    def _alive(self) -> list[Child]:
        return [child for child in self._children if child.status is None]

    def _reap(self) -> None:
        for child in self._alive():
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid == 0:
                continue
            child.status = status
            code = os.waitstatus_to_exitcode(status)
            self._outcome.codes[child.context.rank] = code
            if code not in _OK:
                self._outcome.failures.append(self._failure(child, code, usage.ru_maxrss / 2**20))

    def _failure(self, child: Child, code: int, peak_gib: float) -> Failure:
        rank = child.context.rank
        failure = Failure(
            rank=rank,
            pid=child.pid,
            iteration=self._board.pulse(child.context.local_rank).iteration,
            seen=time.time(),
            signal=-code if code < 0 else None,
            code=code if code >= 0 else None,
            # A rank killed while it wrote an earlier report failed by the signal, so the report counts only with an exit code.
            report=read_report(self._run_dir, rank) if code > 0 else None,
            peak_memory_gib=peak_gib,
        )
        after = oom_kills()
        if code == -signal.SIGKILL and after is not None and self._oom_before is not None and after > self._oom_before:
            killed = f"the kernel's out-of-memory killer ended {after - self._oom_before} process(es) meanwhile"
            failure = replace(failure, notes=(f"{killed}; this rank's peak was {peak_gib:.2f} GiB of host memory",))
        return failure

    def _deadline(self) -> float:
        first = min(failure.seen for failure in self._outcome.failures)
        only_witnesses = all(failure.secondary for failure in self._outcome.failures)
        return first + (WITNESS_SECONDS if only_witnesses else REPORT_SECONDS)

    def _pass_on_signals(self) -> None:
        while self._announced < len(self._signals):
            number = self._signals[self._announced]
            self._announced += 1
            if number == signal.SIGCHLD:
                continue
            self._interrupts += number == signal.SIGINT
            if self._interrupts >= 2:
                self._outcome.aborted = True
            elif not self._board.stop_signal:
                self._board.stop_signal = number
                again = "; press Ctrl-C again to end at once" if number == signal.SIGINT else ""
                name = signal.Signals(number).name
                self.say(f"{name} received: {self._stopping}{again}")

    def _stopped(self) -> list[Child]:
        return [child for child in self._alive() if process_state(child.pid) in ("T", "t")]

    def _describe_hang(self, overdue: list[Overdue]) -> str:
        """Ask every rank for its stacks, then name the likeliest cause: one that is stopped, is behind, or waits for nobody.

        A stopped rank is suspected also where another one's limit ran out first: it began to wait earlier than this one was stopped.
        """
        sizes = {child.pid: _size(log_path(self._run_dir, child.context.rank)) for child in self._alive()}
        for child in self._alive():
            os.kill(child.pid, signal.SIGQUIT)
        end = time.monotonic() + DUMP_SECONDS
        while time.monotonic() < end and any(_size(log_path(self._run_dir, c.context.rank)) == sizes[c.pid] for c in self._alive()):
            time.sleep(0.05)
        time.sleep(0.1)
        lines, suspects = [], []
        stopped_ranks = self._stopped()
        silent = {child.context.local_rank: self._watch.silence(child.context.local_rank) for child in stopped_ranks}
        silent |= {item.index: item for item in overdue}
        for child in self._alive():
            rank, pulse = child.context.rank, self._board.pulse(child.context.local_rank)
            frame = innermost_frame(log_path(self._run_dir, rank), sizes[child.pid])
            stopped = child in stopped_ranks
            where = "stopped by a signal (SIGSTOP)" if stopped else frame or "gave no stack"
            lines.append(f"    rank {rank} (pid {child.pid}): iteration {pulse.iteration}, {pulse.phase}: {where}")
            if child.context.local_rank in silent:
                likely = (not stopped, pulse.iteration, waits_for_others(frame), pulse.beat)
                suspects.append((likely, child, silent[child.context.local_rank], where))
        _, child, item, where = min(suspects, key=lambda suspect: suspect[0])
        head = f"rank {child.context.rank} (pid {child.pid}) {item}: {where}"
        lines += [f"    rank {failure.rank} (pid {failure.pid}): {_last_word(failure)}" for failure in self._outcome.failures]
        every = "  every rank on this machine, innermost frame (all stacks are in logs/rank-N.log):"
        return "\n".join([head, every, *lines, f"  hint: {item.hint}"])

    def _kill_rest(self) -> None:
        for child in self._alive():
            os.kill(child.pid, signal.SIGKILL)
        # SIGKILL waits for a rank inside the kernel (a dead network file system, a wedged driver): it must not hold the report back.
        end = time.monotonic() + KILL_SECONDS
        while self._alive() and time.monotonic() < end:
            for child in self._alive():
                pid, status, _ = os.wait4(child.pid, os.WNOHANG)
                if pid:
                    child.status = status
                    self._outcome.codes[child.context.rank] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        for child in self._alive():
            who = f"rank {child.context.rank} (pid {child.pid})"
            self.say(f"warning: {who} is stuck in the kernel (state {process_state(child.pid)}) and did not die on SIGKILL")

    def _drain(self) -> None:
        while self._pipe is not None and self._relay():
            pass
        if self._unfinished:
            self._to_console(self._unfinished)

    def _relay(self) -> bool:
        """Move what rank 0 wrote to the console and its log; False when there is nothing more."""
        try:
            data = os.read(self._pipe, 65536) if self._pipe is not None else b""
        except BlockingIOError:
            return False
        if not data:
            return False
        if self._pipe_log is not None:
            self._pipe_log.write(data)
        # Beside a live line only whole lines are shown: Python writes a line and its newline apart, and the wipe would fall between.
        data = self._unfinished + data
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1 if self._live_line else len(data)
        data, self._unfinished = data[:end], data[end:]
        if data:
            self._to_console(data)
        return True

    def say(self, text: str) -> None:
        """Write a line of our own to the console."""
        self._to_console(text.encode() + b"\n")

    def _to_console(self, data: bytes) -> None:
        # Rank 0 may have a progress line on the terminal: wipe it first, it is drawn again at its next update.
        wipe = b"\r\x1b[2K" if self._live_line else b""
        try:
            sys.stderr.flush()
            os.write(2, wipe + data)
        except OSError:
            # The console is gone (closed terminal, broken pipe). The logs have everything, and the run is worth more than its console.
            self._live_line = False


def _last_word(failure: Failure) -> str:
    return "ended" if failure.report is None else f"ended with {failure.report.type}: {failure.report.message.splitlines()[0][:160]}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
