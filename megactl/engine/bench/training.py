"""Times training steps of many configurations in one start: the ranks join once and go through the list together.

A start of its own for each would take ten times as long as its steps. Between two configurations everything is freed and the peak
of allocated memory reset, so a row is what a run of its own shows.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megactl.config.schema import Run
from megactl.config.validate import Resolved
from megactl.engine import checkpoint
from megactl.engine.attention import gives_masks, preferred_attention
from megactl.engine.data import build_datasets
from megactl.engine.data.loader import BatchLoader
from megactl.engine.launch import RankContext
from megactl.engine.mesh import Mesh, build_mesh, degrees
from megactl.engine.training_step import StepOutcome, TrainingStep
from megactl.engine.world import joined

ROWS_FILE = "rows.jsonl"
WARM_UP = 3


@dataclass(frozen=True)
class Cell:
    """One configuration to time: its key in the caller's table, and the resolved run."""

    key: tuple[str, ...]
    resolved: Resolved


@dataclass(frozen=True)
class Measured:
    """What a cell took: milliseconds of each timed iteration (the slowest rank's), and the largest peak of allocated MiB over the ranks.

    `peak_mib` is None on CPUs, whose allocations torch does not count. `loss` is the last iteration's. `device`: the GPU's name, or cpu.
    """

    key: tuple[str, ...]
    milliseconds: tuple[float, ...]
    peak_mib: float | None
    loss: float
    world_size: int
    device: str

    @property
    def median_ms(self) -> float:
        """Median milliseconds of an iteration."""
        return statistics.median(self.milliseconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        times = sorted(self.milliseconds)
        return (times[-1 - len(times) // 4] - times[len(times) // 4]) / 2 / self.median_ms


def time_cells(cells: Sequence[Cell], iterations: int) -> Callable[[Run, Any, RankContext], int]:
    """A worker for `launch` that times `iterations` steps of each cell, and appends a line for each to ROWS_FILE of the run directory.

    Asked to stop, it ends after the cell it is at.
    """

    def work(run: Run, resolved: Any, context: RankContext) -> int:
        del resolved
        with joined(run, context) as device:
            meshes: dict[tuple, Mesh] = {}
            for cell in cells:
                measured, asked_to_stop = _time(cell, iterations, _mesh_of(cell.resolved.run, device, meshes), context)
                _report(context, measured)
                if asked_to_stop:
                    break
        return 0

    return work


def read_rows(run_dir: Path) -> list[Measured]:
    """The lines that the ranks have left so far."""
    try:
        lines = (run_dir / ROWS_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found = [json.loads(line) for line in lines]
    return [Measured(**{**row, "key": tuple(row["key"]), "milliseconds": tuple(row["milliseconds"])}) for row in found]


def _mesh_of(run: Run, device: torch.device, meshes: dict[tuple, Mesh]) -> Mesh:
    """One mesh a layout: its groups hold memory of the network library for as long as they live."""
    key = tuple(degrees(run.parallel).values())
    if key not in meshes:
        meshes[key] = build_mesh(run.parallel, device)
    return meshes[key]


def _report(context: RankContext, measured: Measured) -> None:
    if context.rank == 0:
        with (context.run_dir / ROWS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(measured)) + "\n")


def _time(cell: Cell, iterations: int, mesh: Mesh, context: RankContext) -> tuple[Measured, bool]:
    """What the cell took, and whether a rank was asked to stop meanwhile: the same answer on all."""
    device = mesh.device
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    outcome, milliseconds = _steps(cell.resolved, iterations, mesh, context)
    name = torch.cuda.get_device_name(device) if is_cuda else "cpu"
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if is_cuda else None
    loss, asked_to_stop = outcome.loss.item(), bool(outcome.stop)
    gc.collect()
    if is_cuda:
        torch.cuda.empty_cache()
    group = checkpoint.ProcessGroup(mesh.objects) if mesh.world_size > 1 else checkpoint.SingleProcess()
    gathered = group.gather((milliseconds, peak))
    if gathered is None:
        return Measured(cell.key, tuple(milliseconds), peak, loss, mesh.world_size, name), asked_to_stop
    slowest = tuple(max(values) for values in zip(*(times for times, _ in gathered), strict=True))
    peaks = [value for _, value in gathered if value is not None]
    return Measured(cell.key, slowest, max(peaks) if peaks else None, loss, mesh.world_size, name), asked_to_stop


def _steps(resolved: Resolved, iterations: int, mesh: Mesh, context: RankContext) -> tuple[StepOutcome, list[float]]:
    """The outcome of the last step, and milliseconds of each after the warm-up; what was built for it is dropped at the return."""
    run, size = resolved.run, resolved.batch.global_batch_size
    total = WARM_UP + iterations
    engine = TrainingStep(run, mesh)
    eod = next((item.value for item in resolved.derived if item.key == "eod"), None)
    dataset = build_datasets(run, {"train": size * total}, run.model.vocab_size, eod, log=lambda _: None).train
    loader = BatchLoader(dataset, run.training.micro_batch_size, mesh.dp.rank, mesh.dp.size, eod=eod)
    # One batch again and again: making data is not what is timed.
    held = [loader.micro_batch(0, index).to(mesh.device) for index in range(resolved.batch.micro_batches(0))]
    clock = _Clock(mesh.device)
    with preferred_attention(masked=gives_masks(run)):
        for iteration in range(1, total + 1):
            stop = float(context.stop.requested is not None)
            outcome = engine.step(iteration, held.__getitem__, global_batch_size=size, learning_rate=1e-5, stop=stop)
            clock.tick()
            context.heartbeat.beat(iteration)
    return outcome, clock.milliseconds()[WARM_UP - 1 :]


class _Clock:
    """Times between ticks: by events on a GPU, read at the end, so that nothing waits in between."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._ticks: list[Any] = []

    def tick(self) -> None:
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._ticks.append(event)
        else:
            self._ticks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        if not self._is_cuda:
            return [1e3 * (after - before) for before, after in zip(self._ticks, self._ticks[1:], strict=False)]
        self._ticks[-1].synchronize()
        return [before.elapsed_time(after) for before, after in zip(self._ticks, self._ticks[1:], strict=False)]
