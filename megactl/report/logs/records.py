"""What is read out of a log: runs, their iterations in columns, and the events that say how they ended."""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

SYSTEMS = ("megatron-lm", "megatron-deepspeed", "deepspeed", "hf-trainer", "megactl", "unknown")

# Columns of float64 in the order in which the scanner emits them; NaN: the line had no such field.
VALUE_COLUMNS = (
    "seconds",
    "learning_rate",
    "grad_norm",
    "loss_scale",
    "global_batch",
    "consumed_samples",
    "tflops_logged",
    "skipped",
    "nan",
    "samples_per_second",
    "params_norm",
    "num_zeros",
)


def _floats() -> array[float]:
    return array("d")


def _integers() -> array[int]:
    return array("q")


@dataclass
class Columns:
    """A row an iteration line, in file order; every column has the same length, 8 bytes a value.

    iteration, total: as printed, "iteration 5/ 500" (-1: not printed). line: number of the line in the file, from 1.
    seconds: of one iteration, mean over the log interval; loss: the language model's (`lm loss`), else the only one there is.
    losses: every loss by its printed name, `lm-loss` as `lm loss`. tflops_logged: as printed, never recomputed.
    samples_per_second: as printed. interrupted: 1 where a save or an evaluation lies between this line and the one before:
    Megatron-LM counted both into the time of an iteration until November 2023.
    Floats are NaN where the line had no such field (a loss that is NaN is not printed by Megatron-LM: look at `skipped` and `grad_norm`).
    """

    iteration: array[int] = field(default_factory=_integers)
    total: array[int] = field(default_factory=_integers)
    line: array[int] = field(default_factory=_integers)
    interrupted: array[int] = field(default_factory=lambda: array("b"))
    seconds: array[float] = field(default_factory=_floats)
    learning_rate: array[float] = field(default_factory=_floats)
    grad_norm: array[float] = field(default_factory=_floats)
    loss_scale: array[float] = field(default_factory=_floats)
    global_batch: array[float] = field(default_factory=_floats)
    consumed_samples: array[float] = field(default_factory=_floats)
    tflops_logged: array[float] = field(default_factory=_floats)
    skipped: array[float] = field(default_factory=_floats)
    nan: array[float] = field(default_factory=_floats)
    samples_per_second: array[float] = field(default_factory=_floats)
    params_norm: array[float] = field(default_factory=_floats)
    num_zeros: array[float] = field(default_factory=_floats)
    losses: dict[str, array[float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.iteration)

    @property
    def loss(self) -> array[float]:
        """The loss to show: `lm loss` where there is one, else `loss`, else the first by name; all NaN where none was printed."""
        for name in ("lm loss", "loss", *self.losses):
            if name in self.losses:
                return self.losses[name]
        return array("d", [math.nan]) * len(self)

    def append(self, iteration: int, *, total: int = -1, line: int = 0, losses: dict[str, float] | None = None, **values: float) -> None:
        """Add one row; names of `values` are VALUE_COLUMNS, what is not given is NaN."""
        self.iteration.append(iteration)
        self.total.append(total)
        self.line.append(line)
        self.interrupted.append(0)
        for name in VALUE_COLUMNS:
            getattr(self, name).append(values.get(name, math.nan))
        for name in losses or {}:
            self.losses.setdefault(name, array("d", [math.nan]) * (len(self) - 1))
        for name, column in self.losses.items():
            column.append((losses or {}).get(name, math.nan))


@dataclass(frozen=True)
class Event:
    """Something that says how a run went: `kind` is one of EVENT_KINDS, `line` counts from 1, `text` its beginning."""

    kind: str
    line: int
    text: str


# In the order of what explains an end best. killed-subprocess alone (no other event) is how a host's out-of-memory killer looks.
EVENT_KINDS = (
    "oom-gpu",
    "oom-host",
    "time-limit",
    "cancelled",
    "node-failure",
    "hardware",
    "nccl",
    "config",
    "nan",
    "crash",
    "killed-subprocess",
    "stopped",
    "completed",
    "no-weights",
    "overflow",
)


@dataclass(frozen=True)
class Evaluation:
    """One printed evaluation. `name`: validation, test, ...; iteration None: "at the end of training"; losses by printed name."""

    name: str
    iteration: int | None
    losses: dict[str, float]
    line: int


@dataclass
class Memory:
    """Maxima in GiB over ranks and time; None: never printed."""

    allocated: float | None = None
    reserved: float | None = None
    host: float | None = None


@dataclass
class Run:
    """One run of one file.

    run: 0 for the first in the file. arguments: settings as printed, under one spelling (see arguments.py), values are raw text.
    timers: milliseconds by name (save-checkpoint, load-checkpoint, forward-compute ...), in file order; those that were asked for.
    events: first evidences of each kind, `event_counts` how often each was seen.
    model_parameters: the exact number where a line states one, else the sum that was printed (`summary` says which line).
    started_at: first date seen, ISO 8601 without zone. summary: end-of-run figures (train_runtime, train_samples_per_second,
    effective_tflops, checkpoint_gb ...). warnings: sentences on what of the file could not be read.
    """

    file: str
    run: int
    system: str = "unknown"
    iterations: Columns = field(default_factory=Columns)
    arguments: dict[str, str] = field(default_factory=dict)
    timers: dict[str, array[float]] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    events: list[Event] = field(default_factory=list)
    event_counts: dict[str, int] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    first_line: int = 1
    last_line: int = 0
    started_at: str | None = None
    ended_at: str | None = None
    model_parameters: int | None = None
    world_size: int | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def evidence(self, *kinds: str) -> Event | None:
        """The earliest event of these kinds."""
        return min((event for event in self.events if event.kind in kinds), key=lambda event: event.line, default=None)


@dataclass(frozen=True)
class Unreadable:
    """A path that gave no run. `reason`: a sentence; `kind`: missing, unreadable, binary, empty, damaged, unsupported."""

    path: str
    kind: str
    reason: str


def read_runs(path: str, *, cap: int = 1 << 16, timers: Collection[str] | None = None) -> list[Run]:
    """The runs in one log. cap: bytes of a line that are looked at, the rest is skipped. timers: those to keep (None: all).

    Raises DataError where nothing can be read.
    """
    from megactl.report.logs.reading import read_runs as read

    return read(path, cap=cap, timers=timers)


def read_many(paths: list[str], *, cap: int = 1 << 16, timers: Collection[str] | None = None) -> Iterator[Run | Unreadable]:
    """Every run of every path, in the order given; a path that gives none is one Unreadable, and the rest is still read."""
    from megactl.report.logs.reading import read_many as read

    yield from read(paths, cap=cap, timers=timers)
