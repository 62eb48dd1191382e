"""Lines that say how a run went, sorted into kinds. What they mean for the run as a whole is decided where its status is."""

from __future__ import annotations

import re

from megactl.report.logs.records import EVENT_KINDS, Event, Run

LONGEST_TEXT = 400
# Of each kind: the first ones of the run, and the first ones since the last iteration lines, which say how it ended.
KEPT = 8

# The first rule with one of its texts in the line decides, so what says most stands first: "RuntimeError: CUDA out of memory" is no
# mere crash. A pattern makes a rule stricter. Sources: messages of PyTorch, NCCL, Slurm, torchrun, DeepSpeed and Megatron-LM.
_RULES: tuple[tuple[str, tuple[str, ...], re.Pattern[str] | None], ...] = (
    ("oom-gpu", ("CUDA out of memory", "CUDA error: out of memory", "HIP out of memory", "OutOfMemoryError"), None),
    ("oom-host", ("oom-kill", "oom_kill", "Out Of Memory", "ut of memory: Kill", "OUT_OF_MEMORY"), None),
    ("oom-host", ("return code = -9", "exitcode: -9", "exitcode  : -9", "Exited with exit code 137"), re.compile(r"(-9|137)\b")),
    ("oom-host", ("(SIGKILL)", "Cannot allocate memory", "DefaultCPUAllocator"), None),
    ("time-limit", ("DUE TO TIME LIMIT",), None),
    ("node-failure", ("NODE FAILURE",), None),
    ("cancelled", ("CANCELLED AT", "PREEMPTION"), None),
    ("hardware", ("ECC error", "NVRM: Xid", "illegal memory access", "us error", "launch failure", "device-side assert"), None),
    ("nccl", ("NCCL error", "Watchdog caught", "DistBackendError", "Connection closed by", "initializing process group"), None),
    ("nccl", ("ncclSystemError", "ncclInternalError", "ncclRemoteError", "ncclUnhandledCudaError"), None),
    ("config", ("error: unrecognized arguments", "error: argument ", "error: the following arguments", "error: ambiguous option"), None),
    ("config", ("Check batch related parameters", "are incompatible with", "but the current world size is", "ConfigError"), None),
    ("config", ("AnnealingLR", "OptimizerParamScheduler"), re.compile(r"do(es)? not match")),
    ("nan", ("found NaN in", "found Inf in", "already at minimum"), None),
    ("killed-subprocess", ("Killing subprocess", "received SIGTERM, exiting"), None),
    ("stopped", ("[exiting program",), None),
    ("completed", ("after training is done", "Training completed.", "train metrics *****", "'train_runtime'"), None),
    ("no-weights", ("Did not save the model",), None),
    ("overflow", ("OVERFLOW!",), None),
    ("assertion", ("AssertionError",), None),
    ("traceback", ("Traceback (most recent",), None),
    ("crash", ("Error: ", "Exception: ", "ChildFailedError", "KeyboardInterrupt", "core dumped", "terminate called"), None),
    ("crash", ("Segmentation fault", "received SIGTERM", "error: "), None),
)
# Lines that only look like errors: warnings that quote one, the trace of a shell, what NCCL tells of itself.
_HARMLESS = ("FutureWarning", "DeprecationWarning", "UserWarning", "warnings.warn", "NCCL INFO", "WARNING:", "[WARNING]", " WARN ")


_TEXTS = tuple((text, kind, pattern) for kind, texts, pattern in _RULES for text in texts)


def classify(line: str) -> str | None:
    """The kind of an event line; None where it is not one after all. `assertion` and `traceback` are settled when the run is over."""
    for text, kind, pattern in _TEXTS:
        if text in line and (pattern is None or pattern.search(line)):
            return None if kind in ("crash", "assertion") and _is_harmless(line) else kind
    return None


def _is_harmless(line: str) -> bool:
    return line.startswith("+") or any(part in line for part in _HARMLESS)


class EventLog:
    """The events of one run, bounded: what is kept does not grow with the log."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._first: dict[str, list[Event]] = {}
        self._last: dict[str, list[Event]] = {}

    def add(self, kind: str, line: int, text: str, *, survived: int = 0) -> None:
        """Keep an event. `survived`: the line up to which the run is known to have gone on; what came before it may be dropped."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        event = Event(kind, line, text.strip()[:LONGEST_TEXT])
        first = self._first.setdefault(kind, [])
        if len(first) < KEPT:
            first.append(event)
            return
        last = [old for old in self._last.get(kind, []) if old.line > survived]
        self._last[kind] = last if len(last) == KEPT else [*last, event]

    def has(self, *kinds: str) -> bool:
        """Whether any event of these kinds was seen."""
        return any(kind in self.counts for kind in kinds)

    def settle(self, run: Run) -> None:
        """Hand the events to `run`, which has its iterations: an assertion before the first one is a setting that was refused."""
        first_row = run.iterations.line[0] if len(run.iterations) else None
        found: list[Event] = []
        for kept in (self._first, self._last):
            for event in (event for events in kept.values() for event in events):
                found.append(Event(_final(event, first_row), event.line, event.text))
        # A traceback says nothing that the error under it does not say better.
        named = any(event.kind not in ("traceback", "killed-subprocess", "completed", "no-weights", "overflow") for event in found)
        kept_events = [event for event in found if event.kind != "traceback" or not named]
        run.events = sorted((Event("crash", e.line, e.text) if e.kind == "traceback" else e for e in kept_events), key=_order)
        run.event_counts = dict(self.counts)


def _final(event: Event, first_row: int | None) -> str:
    if event.kind != "assertion":
        return event.kind
    return "config" if first_row is None or event.line < first_row else "crash"


def _order(event: Event) -> tuple[int, int]:
    return event.line, EVENT_KINDS.index(event.kind)
