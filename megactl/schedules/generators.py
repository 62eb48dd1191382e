"""Generators of pipeline orders, and the registry by name. A new schedule is one function and one row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from megactl.errors import ScheduleError
from megactl.schedules.actions import FORWARD, WEIGHT_GRADIENT, WEIGHTS, Kind, Order, Programs, Schedule
from megactl.schedules.interleaved import interleaved_max_live, interleaved_order, interleaved_rank_live
from megactl.schedules.zero_bubble import (
    handcrafted_max_live,
    v_place,
    zb_h1_order,
    zb_h2_order,
    zb_v_max_live,
    zb_v_order,
    zb_v_rank_live,
)


@dataclass(frozen=True)
class Generator:
    """One kind of schedule.

    `order(rank, num_ranks, num_microbatches, chunks)` is a rank's computations; `place(stage, num_ranks, chunks)` is the rank
    that holds a virtual stage. The published bounds: `max_live(stage, num_ranks, num_microbatches, chunks)` on the micro-batches
    one virtual stage holds at once, `rank_live(rank, ...)` on those of all virtual stages of a rank together (less than the sum,
    since the stages are not full at the same time). `chunks` is the number of model chunks a rank holds (None: any).
    `splits_backward` says that orders contain I and W.
    """

    order: Callable[[int, int, int, int], Order]
    place: Callable[[int, int, int], int]
    max_live: Callable[[int, int, int, int], int]
    rank_live: Callable[[int, int, int, int], int]
    source: str
    chunks: int | None = 1
    splits_backward: bool = False


def _gpipe_order(rank: int, num_ranks: int, num_microbatches: int, chunks: int) -> Order:
    """All forwards, then all backwards, both in micro-batch order: the first micro-batch's gradients arrive first."""
    del num_ranks, chunks
    return [(kind, rank, microbatch) for kind in (Kind.F, Kind.B) for microbatch in range(num_microbatches)]


def _in_rank_order(stage: int, num_ranks: int, chunks: int) -> int:
    """Stage s on rank s mod p: one stage a rank, or several in turns."""
    del chunks
    return stage % num_ranks


GENERATORS: Mapping[str, Generator] = MappingProxyType(
    {
        "gpipe": Generator(
            order=_gpipe_order,
            place=_in_rank_order,
            max_live=lambda stage, num_ranks, num_microbatches, chunks: num_microbatches,
            rank_live=lambda rank, num_ranks, num_microbatches, chunks: num_microbatches,
            source="Huang et al. 2019, arXiv:1811.06965",
        ),
        "1f1b": Generator(
            order=interleaved_order,
            place=_in_rank_order,
            max_live=interleaved_max_live,
            rank_live=interleaved_rank_live,
            chunks=None,
            source="PipeDream-Flush and its interleaved form: Narayanan et al. 2021, arXiv:2104.04473, section 2.2",
        ),
        "zb-h1": Generator(
            order=zb_h1_order,
            place=_in_rank_order,
            max_live=lambda stage, num_ranks, num_microbatches, chunks: handcrafted_max_live(num_ranks, num_microbatches, 1),
            rank_live=lambda rank, num_ranks, num_microbatches, chunks: handcrafted_max_live(num_ranks, num_microbatches, 1),
            splits_backward=True,
            source="Qi et al. 2023, arXiv:2401.10241, section 2",
        ),
        "zb-h2": Generator(
            order=zb_h2_order,
            place=_in_rank_order,
            max_live=lambda stage, num_ranks, num_microbatches, chunks: handcrafted_max_live(num_ranks, num_microbatches, 2),
            rank_live=lambda rank, num_ranks, num_microbatches, chunks: handcrafted_max_live(num_ranks, num_microbatches, 2),
            splits_backward=True,
            source="Qi et al. 2023, arXiv:2401.10241, section 2",
        ),
        "zb-v": Generator(
            order=zb_v_order,
            place=v_place,
            max_live=zb_v_max_live,
            rank_live=zb_v_rank_live,
            chunks=2,
            splits_backward=True,
            source="V-ZB: Qi et al. 2024, arXiv:2405.15362",
        ),
    }
)


def generate(name: str, *, num_ranks: int, num_microbatches: int, chunks: int | None = None) -> Schedule:
    """The named schedule for `num_ranks` pipeline ranks, any number (>= 1) of micro-batches, `chunks` model chunks a rank.

    `chunks` None is what the schedule runs with: 2 for zb-v, 1 for all others. 1f1b takes any number (interleaved). One rank gives
    plain gradient accumulation (F B F B ...), except under gpipe. Raises ScheduleError for an unknown name or a number that the
    schedule cannot run with.
    """
    generator = _lookup(name)
    chunks = num_chunks(name) if chunks is None else chunks
    for label, value in (("num_ranks", num_ranks), ("num_microbatches", num_microbatches), ("chunks", chunks)):
        if value < 1:
            raise ScheduleError(f"{label} = {value}: a schedule needs at least 1", f"set {label} to 1 or more")
    if generator.chunks not in (None, chunks):
        rule = f"schedule {name} runs with {generator.chunks} model chunk(s) a rank"
        raise ScheduleError(f"chunks = {chunks}: {rule}", f"set chunks to {generator.chunks}")
    placed = placement(name, num_ranks=num_ranks, chunks=chunks)
    orders = [
        fused(order, placed) if generator.splits_backward else order
        for order in (generator.order(rank, num_ranks, num_microbatches, chunks) for rank in range(num_ranks))
    ]
    return Schedule(name, num_ranks, num_microbatches, len(placed), placed, Programs(orders))


def fused(order: Order, stage_to_rank: Sequence[int]) -> Order:
    """Make an I and the W of the same micro-batch behind it one B where no other rank waits for the I.

    The time is the same, and a whole backward keeps nothing in between. On a stage that sends its gradient to another rank they
    stay two, or the gradient would leave later.
    """
    written: list[tuple[Kind | str, int, int]] = []
    for action in order:
        kind, stage, microbatch = action
        waited_for = stage > 0 and stage_to_rank[stage - 1] != stage_to_rank[stage]
        if kind is WEIGHTS and not waited_for and written[-1] == (Kind.I, stage, microbatch):
            written[-1] = (Kind.B, stage, microbatch)
        else:
            written.append(action)
    return written


def num_chunks(name: str, virtual_pipeline: int = 1) -> int:
    """Model chunks (virtual stages) a rank holds: `virtual_pipeline` where the schedule takes any number, else the schedule's own."""
    own = _lookup(name).chunks
    return virtual_pipeline if own is None else own


def placement(name: str, *, num_ranks: int, chunks: int | None = None) -> tuple[int, ...]:
    """The rank that holds each virtual stage, for all `num_ranks` x `chunks` stages (None: the schedule's own number)."""
    chunks = num_chunks(name) if chunks is None else chunks
    return tuple(_lookup(name).place(stage, num_ranks, chunks) for stage in range(num_ranks * chunks))


def max_live_microbatches(name: str, *, stage: int, num_ranks: int, num_microbatches: int, chunks: int | None = None) -> int:
    """The published bound on micro-batches that a virtual stage holds at once (1F1B: min(m, p - stage); GPipe: m)."""
    return _lookup(name).max_live(stage, num_ranks, num_microbatches, num_chunks(name) if chunks is None else chunks)


def max_live_on_rank(name: str, *, rank: int, num_ranks: int, num_microbatches: int, chunks: int | None = None) -> int:
    """The published bound on micro-batches that all virtual stages of a rank hold at once, each counted once a stage."""
    return _lookup(name).rank_live(rank, num_ranks, num_microbatches, num_chunks(name) if chunks is None else chunks)


def peak_live(
    name: str, kept: Mapping[int, int], *, rank: int, num_ranks: int, num_microbatches: int, chunks: int | None = None
) -> tuple[int, dict[int, int]]:
    """The fullest moment of a rank, where each live micro-batch of virtual stage s keeps `kept[s]`: that sum, and the live ones a stage.

    A micro-batch is live from its F to its B or W. The order itself is walked, since the stages of a rank are not full at the
    same time, and need not be equally large.
    """
    return peak_of(_lookup(name).order(rank, num_ranks, num_microbatches, num_chunks(name) if chunks is None else chunks), kept)


def peak_of(order: Order, kept: Mapping[int, int]) -> tuple[int, dict[int, int]]:
    """`peak_live` of one rank's order that is at hand."""
    live, held, peak, at_peak = dict.fromkeys(kept, 0), 0, 0, dict.fromkeys(kept, 0)
    for kind, stage, _ in order:
        if kind is FORWARD:
            live[stage] += 1
            held += kept[stage]
            if held > peak:
                peak, at_peak = held, dict(live)
        elif kind in WEIGHT_GRADIENT:
            live[stage] -= 1
            held -= kept[stage]
    return peak, at_peak


def _lookup(name: str) -> Generator:
    if name not in GENERATORS:
        raise ScheduleError(f"schedule = {name!r}: no such schedule", f"set one of {', '.join(GENERATORS)}")
    return GENERATORS[name]
