"""From an order of computations to what the executor walks: communication batches and gradient reductions.

Why this cannot deadlock. The schedule is simulated once, which dates every computation. Every transfer gets one date: when its
tensor exists and, for an activation, when the slot that receives it is free. Both ends then post the transfer in front of their
first computation that ENDS after that date. Ordering everything in the whole pipeline by end time is therefore one order that every rank's
program agrees with, and a program that follows one common order cannot wait in a circle, even where each batch blocks until it is
complete. The order of transfers between two ranks is that common order on both, so sends match receives pairwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from megactl.schedules.actions import (
    FORWARD,
    NONE,
    RECV,
    SEND,
    WEIGHT_GRADIENT,
    Action,
    Exchange,
    Item,
    Kind,
    LoweredSchedule,
    RankProgram,
    Schedule,
)
from megactl.schedules.simulation import NEVER, UNIT_TIMES, Times, run_times

_TRANSFER = 0.25
"""A transfer takes some time, or no receive would ever be seen to have a computation that it could run behind."""


def lower(schedule: Schedule, dates: Dates | None = None) -> LoweredSchedule:
    """Add SEND, RECV (grouped in exchanges) and REDUCE to a schedule of computations; `dates` are its own, where they are at hand.

    Tensors between two stages of the same rank are not communicated: the executor hands them over locally.
    Raises ScheduleError when the computations themselves deadlock.
    """
    dates = Dates(schedule) if dates is None else dates
    programs = tuple(lower_rank(dates, rank).items for rank in range(schedule.num_ranks))
    return LoweredSchedule(
        schedule.name, schedule.num_ranks, schedule.num_microbatches, schedule.num_stages, schedule.stage_to_rank, programs
    )


def lower_rank(dates: Dates, rank: int) -> RankProgram:
    """One rank's part of `lower`, from the dates of the whole schedule: its own program and its neighbours' slots are all it takes."""
    schedule = dates.schedule
    writer = _Writer(schedule.programs[rank], dates.times.ends[rank])
    for date, _, action in dates.transfers(rank):
        writer.post(date, action)
    return RankProgram(
        schedule.name, rank, schedule.num_ranks, schedule.num_microbatches, schedule.num_stages, schedule.stage_to_rank, writer.finish()
    )


Dated = tuple[float, int, Action]
"""A rank's end of a transfer, with its date and its number. The number makes the order of dates total, hence equal at both ends.

The number of the activation of micro-batch b from stage s is s m + b, that of the gradient from s is larger by (stages x m).
"""


class Dates:
    """When everything in a schedule happens, and from that the one order of all transfers, of which each rank asks for its own.

    Raises ScheduleError when the computations deadlock.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.times: Times = run_times(schedule, UNIT_TIMES, _TRANSFER)
        self._slots: dict[int, dict[int, _StageSlots]] = {}

    def transfers(self, rank: int) -> list[Dated]:
        """Those that a rank sends or receives, in the order in which it and its peers post them."""
        found: list[Dated] = []
        for stage, pair in enumerate(pairwise(self.schedule.stage_to_rank)):
            if rank in pair and pair[0] != pair[1]:
                sends = pair[0] == rank
                own, peer = (stage, pair[1]) if sends else (stage + 1, pair[0])
                found += self._activations(stage, SEND if sends else RECV, own, peer)
                found += self._gradients(stage + 1, RECV if sends else SEND, own, peer)
        found.sort()
        return found

    def _activations(self, producer: int, kind: Kind, own: int, peer: int) -> Iterator[Dated]:
        """Of a stage's outputs. Only an activation opens a slot; a gradient arrives in one that its own forward has opened."""
        count = self.schedule.num_microbatches
        first, free, slots = producer * count, self._slots_of(producer + 1).free, self._slots_of(own).slots
        for microbatch, end in enumerate(self.times.forwards[first : first + count]):
            if end != NEVER:
                date = max(end, free[microbatch])
                yield date, first + microbatch, Action(kind, own, microbatch, slots[microbatch], "activation", peer)

    def _gradients(self, producer: int, kind: Kind, own: int, peer: int) -> Iterator[Dated]:
        """Of a stage's input gradients; none of an evaluation."""
        count = self.schedule.num_microbatches
        first, slots = producer * count, self._slots_of(own).slots
        number = first + self.schedule.num_stages * count
        for microbatch, end in enumerate(self.times.input_gradients[first : first + count]):
            if end != NEVER:
                yield end, number + microbatch, Action(kind, own, microbatch, slots[microbatch], "gradient", peer)

    def _slots_of(self, stage: int) -> _StageSlots:
        rank = self.schedule.stage_to_rank[stage]
        if rank not in self._slots:
            self._slots[rank] = _walk_slots(self.schedule, rank, self.times.ends[rank])
        return self._slots[rank][stage]


class _StageSlots(NamedTuple):
    """Of each micro-batch on a stage: the slot its forward takes, and when the micro-batch before it has left that."""

    slots: list[int]
    free: list[float]


def _walk_slots(schedule: Schedule, rank: int, ends: list[float]) -> dict[int, _StageSlots]:
    count = schedule.num_microbatches
    found = {stage: _StageSlots([NONE] * count, [0.0] * count) for stage in schedule.stages_of(rank)}
    left: dict[tuple[int, int], float] = {}
    for (kind, stage, microbatch, slot, _, _), end in zip(schedule.programs[rank], ends, strict=True):
        if kind is FORWARD:
            slots, free = found[stage]
            slots[microbatch], free[microbatch] = slot, left.get((stage, slot), 0.0)
        elif kind in WEIGHT_GRADIENT:
            left[stage, slot] = end
    return found


class _Writer:
    """Writes one rank's program. Transfers come in the order of their dates and are posted in front of the first computation that
    ends after theirs."""

    def __init__(self, computations: tuple[Action, ...], ends: list[float]) -> None:
        self.computations, self.ends = computations, ends
        self.program: list[Item] = []
        self.position = 0
        # In front of the computation at `position`: what is there when the rank arrives, and what arrives while it computes.
        self.before: list[Action] = []
        self.ahead: list[Action] = []
        self.reduces: list[Action] = []
        self.last = {a.virtual_stage: position for position, a in enumerate(computations) if a.kind in WEIGHT_GRADIENT}

    def post(self, date: float, action: Action) -> None:
        ends = self.ends
        while self.position < len(ends) and ends[self.position] <= date:
            self._compute()
        if self.position < len(ends) and date > ends[self.position] - UNIT_TIMES[self.computations[self.position].kind]:
            self.ahead.append(action)
        else:
            self.before.append(action)

    def finish(self) -> tuple[Item, ...]:
        while self.position < len(self.computations):
            self._compute()
        self._flush()
        return tuple(self.program)

    def _compute(self) -> None:
        self._flush()
        action = self.computations[self.position]
        self.program.append(action)
        if self.last.get(action.virtual_stage) == self.position:
            self.reduces.append(Action(Kind.REDUCE, action.virtual_stage))
        self.position += 1

    def _flush(self) -> None:
        """One batch, or two where the computation reads a receive of the first: it must not wait for what only a later one needs."""
        if self.ahead and any(action.kind is RECV for action in self.before):
            self.program += [Exchange(tuple(self.before)), *self.reduces, Exchange(tuple(self.ahead))]
        elif self.before or self.ahead:
            self.program += [Exchange((*self.before, *self.ahead)), *self.reduces]
        else:
            self.program += self.reduces
        self.before, self.ahead, self.reduces = [], [], []
