"""Generators of pipeline orders, and the registry by name. A new schedule is one function and one row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megactl.errors import ScheduleError
from megactl.schedules.actions import Kind, Order, Schedule, build


@dataclass(frozen=True)
class Generator:
    """One kind of schedule.

    `order(rank, num_ranks, num_microbatches, chunks)` is a rank's computations; `place(stage, num_ranks, chunks)` is the rank
    that holds a virtual stage; `max_live(stage, num_ranks, num_microbatches, chunks)` is the published bound on micro-batches
    a virtual stage holds at once. `max_chunks` is the largest number of model chunks a rank may hold (None: any).
    """

    order: Callable[[int, int, int, int], Order]
    place: Callable[[int, int, int], int]
    max_live: Callable[[int, int, int, int], int]
    max_chunks: int | None
    source: str


def _gpipe_order(rank: int, num_ranks: int, num_microbatches: int, chunks: int) -> Order:
    """All forwards, then all backwards, both in micro-batch order: the first micro-batch's gradients arrive first."""
    del num_ranks, chunks
    return [(kind, rank, microbatch) for kind in (Kind.F, Kind.B) for microbatch in range(num_microbatches)]


def _one_f_one_b_order(rank: int, num_ranks: int, num_microbatches: int, chunks: int) -> Order:
    """Warm-up forwards until the first gradient can be back, then one forward and one backward in turn, then the rest."""
    del chunks
    warmup = min(num_ranks - rank - 1, num_microbatches)
    steady = num_microbatches - warmup
    order: list[tuple[Kind | str, int, int]] = [(Kind.F, rank, microbatch) for microbatch in range(warmup)]
    for index in range(steady):
        order += [(Kind.F, rank, warmup + index), (Kind.B, rank, index)]
    order += [(Kind.B, rank, microbatch) for microbatch in range(steady, num_microbatches)]
    return order


def _one_stage_a_rank(stage: int, num_ranks: int, chunks: int) -> int:
    del num_ranks, chunks
    return stage


GENERATORS: Mapping[str, Generator] = MappingProxyType(
    {
        "gpipe": Generator(
            order=_gpipe_order,
            place=_one_stage_a_rank,
            max_live=lambda stage, num_ranks, num_microbatches, chunks: num_microbatches,
            max_chunks=1,
            source="Huang et al. 2019, arXiv:1811.06965",
        ),
        "1f1b": Generator(
            order=_one_f_one_b_order,
            place=_one_stage_a_rank,
            max_live=lambda stage, num_ranks, num_microbatches, chunks: min(num_microbatches, num_ranks - stage),
            max_chunks=1,
            source="PipeDream-Flush: Narayanan et al. 2021, arXiv:2104.04473, section 2.2",
        ),
    }
)


def generate(name: str, *, num_ranks: int, num_microbatches: int, chunks: int = 1) -> Schedule:
    """The named schedule for `num_ranks` pipeline ranks, any number (>= 1) of micro-batches, `chunks` model chunks a rank.

    One rank gives plain gradient accumulation under 1f1b (F B F B ...). Raises ScheduleError for an unknown name or a
    number that the schedule cannot run with.
    """
    generator = _lookup(name)
    for label, value in (("num_ranks", num_ranks), ("num_microbatches", num_microbatches), ("chunks", chunks)):
        if value < 1:
            raise ScheduleError(f"{label} = {value}: a schedule needs at least 1", f"set {label} to 1 or more")
    if generator.max_chunks is not None and chunks > generator.max_chunks:
        limit = generator.max_chunks
        raise ScheduleError(f"chunks = {chunks}: schedule {name} runs at most {limit} model chunk(s) a rank", f"set chunks to {limit}")
    stage_to_rank = [generator.place(stage, num_ranks, chunks) for stage in range(num_ranks * chunks)]
    orders = [generator.order(rank, num_ranks, num_microbatches, chunks) for rank in range(num_ranks)]
    return build(name, orders, num_microbatches=num_microbatches, stage_to_rank=stage_to_rank)


def max_live_microbatches(name: str, *, stage: int, num_ranks: int, num_microbatches: int, chunks: int = 1) -> int:
    """The published bound on micro-batches that a virtual stage holds at once (1F1B: min(m, p - stage); GPipe: m)."""
    return _lookup(name).max_live(stage, num_ranks, num_microbatches, chunks)


def _lookup(name: str) -> Generator:
    if name not in GENERATORS:
        raise ScheduleError(f"schedule = {name!r}: no such schedule", f"set one of {', '.join(GENERATORS)}")
    return GENERATORS[name]
