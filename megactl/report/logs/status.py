"""How a run ended, and the line that says so.

The rules, in order: memory that ran out explains every other end, since ranks that lost a peer fail in NCCL and then the job is
cancelled; numbers that are lost by the last line make the rest worthless; then the earliest end there is; then the number of
iterations that was asked for. An end counts only behind the last iteration line but one: a run that went on has survived what was
printed before, while one line of another rank may still come after the error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megactl.report.logs.events import classify
from megactl.report.logs.records import Event, Run
from megactl.report.logs.run_folder import ENDS

STATUSES = ("completed", "time-limit", "cancelled", "oom-gpu", "oom-host", "nccl", "nan", "config", "crashed", "no-iterations")

_CAUSES = ("oom-gpu", "oom-host")
_KINDS = {
    "oom-gpu": "oom-gpu",
    "oom-host": "oom-host",
    "time-limit": "time-limit",
    "cancelled": "cancelled",
    "nccl": "nccl",
    "config": "config",
    "nan": "nan",
    "crash": "crashed",
    "hardware": "crashed",
    "node-failure": "crashed",
    "completed": "completed",
    "stopped": "cancelled",
}


@dataclass(frozen=True)
class Status:
    """`status` is one of STATUSES, or None where the log ends without a reason. `evidence` says why, "line 6117: ..." where a line does."""

    status: str | None
    evidence: str


def status_of(run: Run) -> Status:
    """How `run` ended."""
    lines = run.iterations.line
    survived = lines[-2] if len(lines) > 1 else max(lines, default=0)
    ends = sorted((event for event in run.events if event.kind in _KINDS and event.line > survived), key=lambda event: event.line)
    cause = next((event for event in ends if event.kind in _CAUSES), None)
    if cause is not None:
        return _from(cause)
    if _lost(run):
        return Status("nan", f"{_at(run)}: the loss or the gradients are no longer numbers")
    own = _from_summary(run)
    if own is not None:
        return own
    if ends:
        return _from(_first(ends))
    if _finished(run):
        return Status("completed", f"{_at(run)}, the last that was asked for")
    if "train_runtime" in run.summary:
        return Status("completed", f"train_runtime = {run.summary['train_runtime']:g} s, which the Trainer states when training is over")
    return _without_an_event(run)


def _from_summary(run: Run) -> Status | None:
    """What the run's own summary.json says; its error is read as the same line of a log would be."""
    stated, error = run.summary.get("own_status"), run.summary.get("own_error")
    if stated not in ENDS:
        return None
    kind = classify(str(error)) if stated == "failed" and error else None
    text = f"summary.json: {stated}" + (f": {error}" if error else "")
    return Status(_KINDS.get(kind or "", ENDS[stated]), text)


def _from(event: Event) -> Status:
    return Status(_stopped(event.text) if event.kind == "stopped" else _KINDS[event.kind], f"line {event.line}: {event.text.strip()}")


def _stopped(text: str) -> str:
    """A run that ended itself: after the minutes it was given, at the iteration it was given, or because it was told to."""
    if "minute" in text:
        return "time-limit"
    return "completed" if "at iteration" in text else "cancelled"


def _first(ends: list[Event]) -> Event:
    """The earliest end. A traceback says less than what stands around it: a cause named within the run wins over it."""
    named = [event for event in ends if event.kind != "crash"]
    first = ends[0]
    if first.kind == "crash" and named and named[0].kind in ("nccl", "config", "hardware", "node-failure"):
        return named[0]
    return first


def _finished(run: Run) -> bool:
    return bool(run.iterations.iteration) and run.iterations.total[-1] > 0 and run.iterations.iteration[-1] >= run.iterations.total[-1]


def _at(run: Run) -> str:
    columns = run.iterations
    of = f" of {columns.total[-1]}" if columns.total[-1] > 0 else ""
    line = f"line {columns.line[-1]}: " if columns.line[-1] > 0 else ""
    return f"{line}iteration {columns.iteration[-1]}{of}"


def _lost(run: Run) -> bool:
    """Whether the last line says that the numbers are lost: NaN iterations, an infinite loss or norm, or a loss that is gone.

    Megatron-LM leaves the loss out where it is NaN; it does so, too, where every iteration of the line was skipped, which is no loss.
    """
    columns = run.iterations
    if not len(columns):
        return False
    printed = [values[-1] for values in columns.losses.values()]
    gone = bool(printed) and all(math.isnan(value) for value in printed) and columns.skipped[-1] == 0
    return columns.nan[-1] > 0 or gone or any(math.isinf(value) for value in (*printed, columns.grad_norm[-1]))


def _without_an_event(run: Run) -> Status:
    killed = run.evidence("killed-subprocess")
    if killed is not None:
        times = run.event_counts.get("killed-subprocess", 1)
        text = f"line {killed.line}: {killed.text.strip()} ({times} times, and no other error: most often the host's memory ran out)"
        return Status("oom-host", text)
    if not len(run.iterations):
        return Status("no-iterations", f"no iteration line in lines {run.first_line} to {run.last_line}")
    return Status(None, f"the log ends after {_at(run)} and does not say why")
