"""From an order of computations to what the executor walks: communication batches and gradient reductions.

Why this cannot deadlock. The schedule is simulated once, which dates every computation. Every transfer gets one date: when its
tensor exists and, for an activation, when the slot that receives it is free. Both ends then post the transfer in front of their
first computation that ENDS after that date. Ordering everything in the whole pipeline by end time is therefore one order that every rank's
program agrees with, and a program that follows one common order cannot wait in a circle, even where each batch blocks until it is
complete. The order of transfers between two ranks is that common order on both, so sends match receives pairwise.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

from megactl.schedules.actions import WEIGHT_GRADIENT, Action, Exchange, Item, Kind, LoweredSchedule, Schedule, Transfer
from megactl.schedules.simulation import Span, simulate

_DATING = {"forward": 1.0, "backward": 2.0, "transfer": 0.25}
"""Durations used to date transfers. A backward does twice the work of a forward. A transfer takes some time, or no receive would
ever be seen to have a computation that it could run behind."""


@dataclass
class _Gap:
    """What is posted in front of one computation: first what is there already when the rank arrives, then what arrives meanwhile."""

    before: list[Action] = field(default_factory=list)
    reduces: list[Action] = field(default_factory=list)
    ahead: list[Action] = field(default_factory=list)

    def items(self) -> list[Item]:
        """One batch, or two where the computation reads a receive of the first: it must not wait for what only a later one needs."""
        if any(action.kind is Kind.RECV for action in self.before) and self.ahead:
            return [Exchange(tuple(self.before)), *self.reduces, Exchange(tuple(self.ahead))]
        batch = (*self.before, *self.ahead)
        return [Exchange(batch), *self.reduces] if batch else list(self.reduces)


def lower(schedule: Schedule) -> LoweredSchedule:
    """Add SEND, RECV (grouped in exchanges) and REDUCE to a schedule of computations.

    Tensors between two stages of the same rank are not communicated: the executor hands them over locally.
    Raises ScheduleError when the computations themselves deadlock.
    """
    rows = simulate(schedule, **_DATING).spans
    gaps = [[_Gap() for _ in range(len(row) + 1)] for row in rows]
    ends = [[span.end for span in row] for row in rows]
    for date, send, receive in _dated_transfers(schedule, rows):
        for action, rank in ((send, schedule.stage_to_rank[send.virtual_stage]), (receive, schedule.stage_to_rank[receive.virtual_stage])):
            index = bisect_right(ends[rank], date)
            idle_until = rows[rank][index].start if index < len(rows[rank]) else date
            (gaps[rank][index].before if date <= idle_until else gaps[rank][index].ahead).append(action)
    for rank, row in enumerate(rows):
        for stage, position in _last_backward_positions(row).items():
            gaps[rank][position + 1].reduces.append(Action(Kind.REDUCE, stage))
    programs = tuple(_interleave(row, rank_gaps) for row, rank_gaps in zip(rows, gaps, strict=True))
    return LoweredSchedule(
        schedule.name, schedule.num_ranks, schedule.num_microbatches, schedule.num_stages, schedule.stage_to_rank, programs
    )


def _interleave(row: tuple[Span, ...], gaps: list[_Gap]) -> tuple[Item, ...]:
    program: list[Item] = []
    for gap, span in zip(gaps, row, strict=False):
        program += [*gap.items(), span.action]
    return tuple(program + gaps[-1].items())


def _last_backward_positions(row: tuple[Span, ...]) -> dict[int, int]:
    return {span.action.virtual_stage: position for position, span in enumerate(row) if span.action.kind in WEIGHT_GRADIENT}


def _dated_transfers(schedule: Schedule, rows: tuple[tuple[Span, ...], ...]) -> list[tuple[float, Action, Action]]:
    """Every transfer between ranks as (date, SEND, RECV), in the order both ends post them."""
    free = _slot_free_dates(rows)
    slots = {(span.action.virtual_stage, span.action.microbatch): span.action.slot for row in rows for span in row}
    dated = []
    for row in rows:
        for span in row:
            transfer = schedule.sent_by(span.action)
            if transfer is None:
                continue
            # Only an activation opens a slot; a gradient arrives in one that its own forward has opened.
            date = max(span.end, free[transfer.consumer, transfer.microbatch]) if transfer.payload == "activation" else span.end
            dated.append((date, transfer))
    # The second key makes the order total, hence equal at both ends of every pair.
    dated.sort()
    return [(date, *_ends_of(transfer, schedule, slots)) for date, transfer in dated]


def _ends_of(transfer: Transfer, schedule: Schedule, slots: dict[tuple[int, int], int]) -> tuple[Action, Action]:
    producer, consumer, microbatch = transfer.producer, transfer.consumer, transfer.microbatch
    ranks = schedule.stage_to_rank
    send = Action(Kind.SEND, producer, microbatch, slots[producer, microbatch], transfer.payload, ranks[consumer])
    receive = Action(Kind.RECV, consumer, microbatch, slots[consumer, microbatch], transfer.payload, ranks[producer])
    return send, receive


def _slot_free_dates(rows: tuple[tuple[Span, ...], ...]) -> dict[tuple[int, int], float]:
    """Per (stage, micro-batch): when the slot its forward takes has been left by the micro-batch before it."""
    left: dict[tuple[int, int], float] = {}
    free: dict[tuple[int, int], float] = {}
    for row in rows:
        for span in row:
            action = span.action
            if action.kind is Kind.F:
                free[action.virtual_stage, action.microbatch] = left.get((action.virtual_stage, action.slot), 0.0)
            elif action.kind in WEIGHT_GRADIENT:
                left[action.virtual_stage, action.slot] = span.end
    return free
