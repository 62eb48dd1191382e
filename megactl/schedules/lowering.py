"""From an order of computations to what the executor walks: communication batches and gradient reductions.

Why this cannot deadlock. The schedule is simulated once, which dates every computation. Every transfer gets one date: when its
tensor exists and, for an activation, when the slot that receives it is free. Both ends then post the transfer in front of their
first computation that ENDS after that date. Ordering everything in the whole pipeline by end time is therefore one order that every rank's
program agrees with, and a program that follows one common order cannot wait in a circle, even where each batch blocks until it is
complete. The order of transfers between two ranks is that common order on both, so sends match receives pairwise.
"""

from __future__ import annotations

from megactl.schedules.actions import INPUT_GRADIENT, WEIGHT_GRADIENT, Action, Exchange, Item, Kind, LoweredSchedule, Payload, Schedule
from megactl.schedules.simulation import UNIT_TIMES, run_times

_TRANSFER = 0.25
"""A transfer takes some time, or no receive would ever be seen to have a computation that it could run behind."""


def lower(schedule: Schedule) -> LoweredSchedule:
    """Add SEND, RECV (grouped in exchanges) and REDUCE to a schedule of computations.

    Tensors between two stages of the same rank are not communicated: the executor hands them over locally.
    Raises ScheduleError when the computations themselves deadlock.
    """
    ends = run_times(schedule, UNIT_TIMES, _TRANSFER)
    writers = [_Writer(program, row) for program, row in zip(schedule.programs, ends, strict=True)]
    owners, count, gradients = schedule.stage_to_rank, schedule.num_microbatches, schedule.num_stages * schedule.num_microbatches
    slots = _slots(schedule)
    for date, number in _dated_transfers(schedule, ends):
        payload: Payload = "activation" if number < gradients else "gradient"
        producer, microbatch = divmod(number % gradients, count)
        consumer = producer + 1 if payload == "activation" else producer - 1
        source, target = owners[producer], owners[consumer]
        writers[source].post(date, Action(Kind.SEND, producer, microbatch, slots[producer * count + microbatch], payload, target))
        writers[target].post(date, Action(Kind.RECV, consumer, microbatch, slots[consumer * count + microbatch], payload, source))
    programs = tuple(writer.finish() for writer in writers)
    return LoweredSchedule(
        schedule.name, schedule.num_ranks, schedule.num_microbatches, schedule.num_stages, schedule.stage_to_rank, programs
    )


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
        if self.ahead and any(action.kind is Kind.RECV for action in self.before):
            self.program += [Exchange(tuple(self.before)), *self.reduces, Exchange(tuple(self.ahead))]
        elif self.before or self.ahead:
            self.program += [Exchange((*self.before, *self.ahead)), *self.reduces]
        else:
            self.program += self.reduces
        self.before, self.ahead, self.reduces = [], [], []


def _slots(schedule: Schedule) -> list[int]:
    """The slot of micro-batch b on stage s, at s m + b."""
    slots = [0] * (schedule.num_stages * schedule.num_microbatches)
    for program in schedule.programs:
        for kind, stage, microbatch, slot, _, _ in program:
            if kind is Kind.F:
                slots[stage * schedule.num_microbatches + microbatch] = slot
    return slots


def _dated_transfers(schedule: Schedule, ends: list[list[float]]) -> list[tuple[float, int]]:
    """Every transfer between ranks as (date, number), in the order both ends post them.

    The number of the activation of micro-batch b from stage s is s m + b, that of the gradient from s is larger by (stages x m).
    """
    owners, last, count = schedule.stage_to_rank, schedule.num_stages - 1, schedule.num_microbatches
    free, gradients = _slot_free_dates(schedule, ends), (last + 1) * count
    dated: list[tuple[float, int]] = []
    for program, row in zip(schedule.programs, ends, strict=True):
        for (kind, stage, microbatch, _, _, _), end in zip(program, row, strict=True):
            number = stage * count + microbatch
            if kind is Kind.F:
                if stage < last and owners[stage] != owners[stage + 1]:
                    # Only an activation opens a slot; a gradient arrives in one that its own forward has opened.
                    dated.append((max(end, free[number + count]), number))
            elif kind in INPUT_GRADIENT and stage and owners[stage] != owners[stage - 1]:
                dated.append((end, gradients + number))
    # The number makes the order total, hence equal at both ends of every pair.
    dated.sort()
    return dated


def _slot_free_dates(schedule: Schedule, ends: list[list[float]]) -> list[float]:
    """For micro-batch b on stage s, at s m + b: when the slot its forward takes has been left by the micro-batch before it."""
    left: dict[tuple[int, int], float] = {}
    free = [0.0] * (schedule.num_stages * schedule.num_microbatches)
    for program, row in zip(schedule.programs, ends, strict=True):
        for (kind, stage, microbatch, slot, _, _), end in zip(program, row, strict=True):
            if kind is Kind.F:
                free[stage * schedule.num_microbatches + microbatch] = left.get((stage, slot), 0.0)
            elif kind in WEIGHT_GRADIENT:
                left[stage, slot] = end
    return free
