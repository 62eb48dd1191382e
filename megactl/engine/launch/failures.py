"""Which rank failed first, and how to say it. A rank that merely lost its connection is a witness, not a cause."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

from megactl.engine.launch.context import error_path, log_path
from megactl.errors import MegactlError

_LOST_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError", "ConnectionError"}
_LOST_WORDS = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|socket timeout|timed out (waiting|after)|wait timeout|"
    r"remote process exited|communicator was aborted|nccl.*(remote error|unhandled system error|watchdog)|"
    r"application timeout caused pair closure|gloo.*(pair|enforce|transport)",
    re.IGNORECASE,
)
_TRACEBACK_LINES = 14
_LOG_TAIL_LINES = 12


@dataclass(frozen=True)
class Report:
    """What a rank wrote about the exception that ended it (`rank-N.error.json`). `time` is Unix time."""

    type: str
    message: str
    traceback: str
    time: float
    secondary: bool
    expected: bool  # a MegactlError: the message is written for the user and needs no traceback
    exit_code: int = 1


@dataclass(frozen=True)
class Failure:
    """One rank's abnormal end. Exactly one of `signal` and `code` is set; `seen` is Unix time."""

    rank: int
    pid: int
    iteration: int
    seen: float
    signal: int | None = None
    code: int | None = None
    report: Report | None = None
    peak_memory_gib: float | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def secondary(self) -> bool:
        """Whether this rank only noticed that another one was gone."""
        return self.report is not None and self.report.secondary

    @property
    def when(self) -> float:
        """Unix time of the failure itself where the rank told it, else when the launcher saw it."""
        return self.report.time if self.report else self.seen

    @property
    def exit_code(self) -> int:
        """Exit code the run takes from this failure: a MegactlError's own, otherwise 1."""
        return self.report.exit_code if self.report and self.report.expected else 1


def report_of(error: BaseException) -> Report:
    """The report of an exception; follows `raise ... from` to see whether a lost connection is behind it."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__
    expected = isinstance(error, MegactlError)
    return Report(
        type=type(error).__name__,
        message=str(error) or type(error).__name__,
        traceback="".join(traceback.format_exception(type(error), error, _below_launcher(error.__traceback__))),
        time=time.time(),
        secondary=any(_lost_connection(link) for link in chain),
        expected=expected,
        exit_code=error.exit_code if isinstance(error, MegactlError) else 1,
    )


def _below_launcher(trace: TracebackType | None) -> TracebackType | None:
    # Every traceback would begin with the same frames of this package; the reader wants the worker's.
    package = os.path.dirname(__file__)
    while trace is not None and os.path.dirname(trace.tb_frame.f_code.co_filename) == package:
        trace = trace.tb_next
    return trace


def _lost_connection(error: BaseException) -> bool:
    # By name: torch's types cannot be imported here without importing torch.
    if any(kind.__name__ in _LOST_TYPES for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_LOST_WORDS.search(str(error)))


def write_report(run_dir: Path, rank: int, report: Report) -> None:
    """Leave the report for the launcher. Written aside and renamed, so that it is never read half."""
    path = error_path(run_dir, rank)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(report), indent=1) + "\n")
    os.replace(temporary, path)


def read_report(run_dir: Path, rank: int) -> Report | None:
    """The report of `rank`, None if it left none."""
    try:
        return Report(**json.loads(error_path(run_dir, rank).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def root_cause(failures: Sequence[Failure]) -> Failure:
    """The earliest failure that is not a mere lost connection; if all are, the earliest."""
    return min(failures, key=lambda failure: (failure.secondary, failure.when))


def describe(failure: Failure, run_dir: Path, *, local_ranks: int, same_message: int = 1) -> str:
    """The text for the user: one line that says what happened, then what helps. `same_message` ranks failed alike."""
    if failure.report is not None and failure.report.expected and failure.report.exit_code == 2:
        # A user's mistake is the same on every rank, so which rank met it says nothing.
        who = "" if local_ranks == 1 or same_message > 1 else f"rank {failure.rank}: "
        return f"error: {who}{failure.report.message}"
    lines = [f"error: {_headline(failure, same_message)}"]
    if failure.report is None:
        tail = _log_tail(log_path(run_dir, failure.rank))
        lines += [f"  last lines of rank {failure.rank}'s log:", *(f"    {line}" for line in tail)] if tail else []
    elif not failure.report.expected:
        lines += [f"    {line}" for line in failure.report.traceback.rstrip().splitlines()[-_TRACEBACK_LINES:]]
    lines += [f"  {note}" for note in failure.notes]
    lines += [f"  hint: {hint}" for hint in _hints(failure)]
    lines.append(f"  log: {log_path(run_dir, failure.rank)}")
    return "\n".join(lines)


def _headline(failure: Failure, same_message: int) -> str:
    at = f" at iteration ~{failure.iteration}" if failure.iteration > 0 else " before its first iteration"
    if failure.signal is not None:
        return f"rank {failure.rank} (pid {failure.pid}) was killed by signal {failure.signal} ({signal_name(failure.signal)}){at}"
    if failure.report is None:
        return f"rank {failure.rank} (pid {failure.pid}) exited with code {failure.code}{at}"
    others = f" (and {same_message - 1} more with the same message)" if same_message > 1 else ""
    kind = "" if failure.report.expected else f"{failure.report.type}: "
    return f"rank {failure.rank} (pid {failure.pid}) failed{at}{others}: {kind}{failure.report.message}"


def signal_name(number: int) -> str:
    """SIGKILL for 9; real-time signals have no name of their own."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return "a real-time signal"


def _hints(failure: Failure) -> list[str]:
    memory = f"; its peak was {failure.peak_memory_gib:.2f} GiB of host memory" if failure.peak_memory_gib else ""
    if failure.signal == signal.SIGKILL and not failure.notes:
        return [f"somebody sent it, or the kernel's out-of-memory killer did (dmesg, or sacct's MaxRSS, tells){memory}"]
    if failure.signal == signal.SIGBUS:
        return ["SIGBUS often means that /dev/shm or the disk under a memory-mapped file is full (df -h /dev/shm)"]
    if failure.report is not None and failure.report.type == "OutOfMemoryError":
        return ["GPU memory is full: lower --micro-batch-size or --seq-length, or raise --tp or --pp"]
    if failure.secondary:
        return ["this rank lost its connection to another one; no local rank failed before it, so look at the other nodes' logs"]
    return []


def _log_tail(path: Path) -> list[str]:
    try:
        with path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 8192))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    own = lines[max((i + 1 for i, line in enumerate(lines) if line.startswith(LOG_HEADER)), default=0) :]
    return own[-_LOG_TAIL_LINES:]


LOG_HEADER = "=== megactl rank"
