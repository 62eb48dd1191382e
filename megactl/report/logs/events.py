"""Lines that say how a run went, sorted into kinds. What they mean for the run as a whole is decided where its status is."""

from __future__ import annotations

import re

from megactl.report.logs.records import EVENT_KINDS, Event, Run

LONGEST_TEXT = 400
# Of each kind: the first ones of the run, and the first ones since the last iteration lines, which say how it ended.
KEPT = 8

# The first rule that fits decides. Sources: PyTorch, NCCL, Slurm, torchrun, DeepSpeed and Megatron-LM's own messages.
_RULES: tuple[tuple[str, str], ...] = (
    ("oom-gpu", r"(CUDA|HIP)( error:)? out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED"),
    ("oom-host", r"oom[-_]kill|Out Of Memory|[Oo]ut of memory: Kill|OUT_OF_MEMORY|return code = -9\b|exitcode *: -9\b|\(SIGKILL\)"),
    ("oom-host", r"Cannot allocate memory|DefaultCPUAllocator|Exited with exit code 137\b"),
    ("time-limit", r"DUE TO TIME LIMIT"),
    ("node-failure", r"DUE TO NODE FAILURE|NODE FAILURE"),
    ("cancelled", r"CANCELLED AT|PREEMPTION"),
    ("hardware", r"ECC error|NVRM: Xid|illegal memory access|[Bb]us error|launch failure|device-side assert"),
    ("nccl", r"NCCL error|Watchdog caught|DistBackendError|nccl\w*Error|Connection closed by|initializing process group"),
    ("config", r"error: (unrecognized arguments|argument |the following arguments are required|ambiguous option)|invalid choice: "),
    (
        "config",
        r"Check batch related parameters|are incompatible with|value \S+ and checkpoint ?value|but the current world size is|ConfigError",
    ),
    ("nan", r"found (NaN|Inf) in|already at minimum|[Ll]oss is (nan|NaN)"),
    ("killed-subprocess", r"Killing subprocess|received SIGTERM, exiting"),
    ("stopped", r"\[exiting program"),
    ("completed", r"after training is done|Training completed\.|train metrics \*\*\*\*\*|'train_runtime'"),
    ("no-weights", r"Did not save the model"),
    ("overflow", r"OVERFLOW!"),
    ("assertion", r"AssertionError"),
    ("traceback", r"Traceback \(most recent"),
    ("crash", r"[A-Za-z]Error: |Exception: |^error: |: error: |ChildFailedError|KeyboardInterrupt|core dumped|terminate called"),
    ("crash", r"Segmentation fault|received SIGTERM"),
)
_PATTERN = re.compile("|".join(f"(?P<rule{index}>{pattern})" for index, (_, pattern) in enumerate(_RULES)))
# What DeepSpeed and Megatron print of a step that they skip, and lines that only look like errors.
_HARMLESS = re.compile(r"FutureWarning|DeprecationWarning|UserWarning|^\s*warnings\.warn|NCCL INFO|^\++ |set -o |WARNING:|\bWARN\b")


def classify(text: str) -> str | None:
    """The kind of an event line; None where it is not one after all. `assertion` and `traceback` are settled when the run is over."""
    kinds = [_RULES[int(match.lastgroup[4:])] for match in _PATTERN.finditer(text) if match.lastgroup]
    if not kinds:
        return None
    # A line may hold several: "RuntimeError: CUDA out of memory" says more by its second half.
    kind = min(kinds, key=_RULES.index)[0]
    return None if kind in ("crash", "assertion") and _HARMLESS.search(text) else kind


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
