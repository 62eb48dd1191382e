"""From operators to the rows of the table: builds the work, checks that all contestants agree, times them, compares."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megactl.engine import ops
from megactl.engine.bench.measure import Clock, Contestant, Timing, cache_bytes, clock_for, clock_name, compare, interleave
from megactl.engine.bench.operators import OPERATORS
from megactl.engine.bench.sizes import Size
from megactl.engine.bench.work import COMPILE, COPY, OURS, Work, copy_of, disagreement
from megactl.engine.environment import collect_environment

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# ||a - b|| / ||b|| between implementations that round in different places. float32 is wide for torch's norm, which is 1e-4 off on a CPU.
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 1e-9}


@dataclass(frozen=True)
class Plan:
    """What to time: operators by name, sizes, types (keys of DTYPES); `seconds` of rounds a row, after the warm-up."""

    operators: Sequence[str]
    sizes: Sequence[Size]
    dtypes: Sequence[str]
    device: torch.device
    seconds: float = 1.0
    compile: bool = True


@dataclass
class Row:
    """One line. `timings` by contestant (megactl, torch's ways, torch.compile, copy); `failures` says why another one has no timing.

    verdict: faster, equal, slower than torch; "not built" or "failed" where there is nothing of ours to time; "differs" where ours
    gives other values than torch (then nothing was timed).
    """

    op: str
    size: str
    dtype: str
    direction: str = ""
    variant: str = ""
    shape: tuple[int, ...] = ()
    bytes_moved: int = 0
    moves: str = ""
    in_cache: bool = False
    verdict: str = ""
    timings: dict[str, Timing] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def fastest_torch(self) -> str | None:
        """The fastest of torch's ways, torch.compile included."""
        names = [name for name in self.timings if name not in (OURS, COPY)]
        return min(names, key=lambda name: self.timings[name].median, default=None)

    @property
    def fastest_eager(self) -> str | None:
        """The fastest of torch's ways without torch.compile."""
        names = [name for name in self.timings if name not in (OURS, COPY, COMPILE)]
        return min(names, key=lambda name: self.timings[name].median, default=None)

    @property
    def is_slower_than_eager(self) -> bool:
        """Whether ours loses against torch without torch.compile, by more than the noise."""
        name = self.fastest_eager
        return OURS in self.timings and name is not None and compare(self.timings[OURS], self.timings[name]).verdict == "slower"

    def gb_per_s(self, name: str) -> float | None:
        """The bytes that must be moved over the median time, in 1e9 bytes a second."""
        return self.bytes_moved / self.timings[name].median / 1e9 if name in self.timings else None

    def speed_against(self, name: str | None) -> float | None:
        """How many times as fast as `name` ours is: the median over the rounds."""
        if name is None or OURS not in self.timings or name not in self.timings:
            return None
        return 1.0 / compare(self.timings[OURS], self.timings[name]).ratio

    def as_dict(self) -> dict[str, Any]:
        """For JSON; times in seconds, speeds in GB/s, ratios as "ours is this many times as fast"."""
        facts = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "timings"}
        timings = {name: timing.as_dict() | {"gb_per_s": self.gb_per_s(name)} for name, timing in self.timings.items()}
        speeds = {name: self.speed_against(name) for name in self.timings if name != OURS}
        return {
            **facts, "timings": timings, "speed_against": speeds, "fastest_torch": self.fastest_torch,
            "fastest_eager": self.fastest_eager, "slower_than_eager": self.is_slower_than_eager,
        }  # fmt: skip


def run_operators(plan: Plan, report: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """Time everything in `plan`; `report` gets each row as it is done. What fails is in its row and stops nothing."""
    clock, rows = clock_for(plan.device), []
    for size in plan.sizes:
        for dtype in plan.dtypes:
            for name in plan.operators:
                for row in _rows_of(plan, clock, Row(name, size.name, dtype), size):
                    rows.append(row)
                    report(row)
    return rows


def _rows_of(plan: Plan, clock: Clock, blank: Row, size: Size) -> Iterator[Row]:
    if not hasattr(ops, blank.op):
        yield dataclasses.replace(blank, verdict="not built")
        return
    torch.manual_seed(0)
    try:
        works = OPERATORS[blank.op](size, DTYPES[blank.dtype], plan.device)
    except torch.OutOfMemoryError as error:
        yield dataclasses.replace(blank, verdict="failed", failures={OURS: _sentence(error)})
        return
    while works:
        # Popped, so that a finished piece of work gives its tensors back before the next one is timed.
        yield _timed(plan, clock, blank, works.pop(0))
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
    # A function is compiled for each of its shapes and types; without this the compiler gives up after eight of them.
    if plan.compile:
        torch.compiler.reset()


def _timed(plan: Plan, clock: Clock, blank: Row, work: Work) -> Row:
    cache = cache_bytes(plan.device)
    row = dataclasses.replace(
        blank, direction=work.direction, variant=work.variant, shape=work.shape, bytes_moved=work.bytes_moved, moves=work.moves,
        in_cache=plan.device.type == "cpu" and cache is not None and work.bytes_moved < cache, timings={}, failures={}, errors={},
    )  # fmt: skip
    contestants = _able(plan, row, work)
    if OURS not in {item.name for item in contestants}:
        row.verdict = "failed"
        return row
    if row.errors and max(row.errors.values()) > _TOLERANCES[DTYPES[row.dtype]]:
        row.verdict = "differs"
        return row
    try:
        row.timings = interleave([*contestants, copy_of(work.bytes_moved, plan.device)], clock, seconds=plan.seconds, warm=row.in_cache)
    except torch.OutOfMemoryError as error:
        row.verdict, row.failures = "failed", {**row.failures, OURS: _sentence(error)}
        return row
    peer = row.fastest_torch
    verdict = compare(row.timings[OURS], row.timings[peer]).verdict if peer is not None else "no peer"
    row.verdict = "slower than torch" if verdict == "slower" else verdict
    return row


def _able(plan: Plan, row: Row, work: Work) -> list[Contestant]:
    """The contestants that run. Their first results are compared with ours here, before anything is timed."""
    able, ours = [], None
    makers: list[Callable[[], Contestant]] = [lambda item=item: item for item in (work.ours, *work.peers)]
    names = [item.name for item in (work.ours, *work.peers)]
    if work.compiled is not None and plan.compile:
        makers.append(work.compiled)
        names.append(COMPILE)
    for name, make in zip(names, makers, strict=True):
        # torch.compile raises whatever its compilers raise; a peer that cannot run is shown with its reason, not hidden.
        try:
            contestant = make()
            result = contestant.run(contestant.prepare())
            if name == OURS:
                ours = _kept(result) if work.agree else None
            elif ours is not None:
                row.errors[name] = disagreement(ours, result)
        except Exception as error:
            row.failures[name] = _sentence(error)
            continue
        able.append(contestant)
    return able


def _kept(result: Any) -> tuple[torch.Tensor, ...]:
    """A copy, for operators that work in place write into the same tensors at the next call."""
    tensors = (result,) if isinstance(result, torch.Tensor) else result
    return tuple(tensor.detach().clone() for tensor in tensors)


def _sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def bench_environment(device: torch.device) -> dict[str, Any]:
    """What the times depend on: versions, commit, device with its clocks, threads, cache, other load, how the operators were built."""
    return {
        **collect_environment(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "operators": ops.describe(),
        "threads": torch.get_num_threads(),
        "timed_by": clock_name(device),
        "load_average": os.getloadavg()[0],
        "cache_bytes": cache_bytes(device),
        "clocks": _clocks() if device.type == "cuda" else None,
    }


def _clocks() -> dict[str, str] | None:
    """What nvidia-smi says of the clocks now, their limits and the power limit; None without it."""
    import subprocess

    names = ["clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu"]
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(names, (value.strip() for value in done.stdout.splitlines()[0].split(",")), strict=False))
