"""Event simulation of a schedule: when every computation runs, how long an iteration takes, how large the bubble is."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from megactl.errors import ScheduleError
from megactl.schedules.actions import INPUT_GRADIENT, WEIGHT_GRADIENT, Action, Kind, Schedule


@dataclass(frozen=True, slots=True)
class Span:
    """One computation on the time axis (unit: that of the durations given)."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Spans per rank, in program order."""

    spans: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        """Time from the first start to the last end over all ranks."""
        return max((row[-1].end for row in self.spans if row), default=0.0)

    @property
    def ideal(self) -> float:
        """Computing time of the busiest rank: no order of the same work can be shorter."""
        return max((sum(span.end - span.start for span in row) for row in self.spans), default=0.0)

    @property
    def bubble_fraction(self) -> float:
        """Idle time over ideal time: (p-1)/m for GPipe and 1F1B with equal stages and free transfers."""
        return self.makespan / self.ideal - 1.0 if self.ideal else 0.0


Need = tuple[str, int, int]
"""A result some computation waits for: ('forward' | 'input gradient' | 'weight gradient', virtual stage, micro-batch)."""


def results_of(action: Action) -> tuple[Need, ...]:
    """What a computation makes available to others."""
    stage, microbatch = action.virtual_stage, action.microbatch
    if action.kind is Kind.F:
        return (("forward", stage, microbatch),)
    made: list[Need] = []
    if action.kind in INPUT_GRADIENT:
        made.append(("input gradient", stage, microbatch))
    if action.kind in WEIGHT_GRADIENT:
        made.append(("weight gradient", stage, microbatch))
    return tuple(made)


def needs_of(action: Action, num_stages: int) -> tuple[Need, ...]:
    """What a computation waits for: the neighbour's tensor, and the earlier part of its own micro-batch."""
    stage, microbatch = action.virtual_stage, action.microbatch
    if action.kind is Kind.F:
        return (("forward", stage - 1, microbatch),) if stage > 0 else ()
    if action.kind is Kind.W:
        return (("input gradient", stage, microbatch),)
    own: tuple[Need, ...] = (("forward", stage, microbatch),)
    return (*own, ("input gradient", stage + 1, microbatch)) if stage < num_stages - 1 else own


def simulate(
    schedule: Schedule,
    forward: float = 1.0,
    backward: float = 2.0,
    transfer: float = 0.0,
    *,
    input_gradient: float | None = None,
    weight_gradient: float | None = None,
) -> Timeline:
    """Run the schedule with one duration a kind.

    `forward` and `backward` are the times of one micro-batch on one virtual stage; I and W take half of `backward` each unless
    given. A tensor for another rank is usable `transfer` after it was produced; within a rank it is free.
    Raises ScheduleError when no rank can go on, naming what each one waits for.
    """
    durations = {
        Kind.F: forward,
        Kind.B: backward,
        Kind.I: backward / 2 if input_gradient is None else input_gradient,
        Kind.W: backward / 2 if weight_gradient is None else weight_gradient,
    }
    return _Simulation(schedule, durations, transfer).run()


class _Simulation:
    """Every rank runs its program in order, each action as early as its inputs allow; ranks blocked on an input wait in a table."""

    def __init__(self, schedule: Schedule, durations: dict[Kind, float], transfer: float) -> None:
        self.schedule = schedule
        self.durations = durations
        self.transfer = transfer
        self.ready: dict[Need, tuple[float, int]] = {}
        self.waiting: dict[Need, list[int]] = {}
        self.spans: list[list[Span]] = [[] for _ in range(schedule.num_ranks)]

    def run(self) -> Timeline:
        runnable = deque(range(self.schedule.num_ranks))
        while runnable:
            rank = runnable.popleft()
            runnable.extend(self._advance(rank))
        self._refuse_deadlock()
        return Timeline(tuple(tuple(row) for row in self.spans))

    def _advance(self, rank: int) -> list[int]:
        """Run a rank until it blocks or ends; returns the ranks its results set free."""
        freed: list[int] = []
        program = self.schedule.programs[rank]
        while len(self.spans[rank]) < len(program):
            action = program[len(self.spans[rank])]
            needs = needs_of(action, self.schedule.num_stages)
            missing = next((need for need in needs if need not in self.ready), None)
            if missing is not None:
                self.waiting.setdefault(missing, []).append(rank)
                break
            end = self._run(rank, action, needs)
            for result in results_of(action):
                self.ready.setdefault(result, (end, rank))
                freed += self.waiting.pop(result, [])
        return freed

    def _run(self, rank: int, action: Action, needs: tuple[Need, ...]) -> float:
        row = self.spans[rank]
        start = row[-1].end if row else 0.0
        for need in needs:
            time, producer = self.ready[need]
            start = max(start, time if producer == rank else time + self.transfer)
        row.append(Span(action, start, start + self.durations[action.kind]))
        return row[-1].end

    def _refuse_deadlock(self) -> None:
        stuck = [rank for rank, row in enumerate(self.spans) if len(row) < len(self.schedule.programs[rank])]
        if not stuck:
            return
        lines = []
        for rank in stuck:
            position = len(self.spans[rank])
            action = self.schedule.programs[rank][position]
            missing = next(need for need in needs_of(action, self.schedule.num_stages) if need not in self.ready)
            awaited = f"the {missing[0]} of micro-batch {missing[2]} on stage {missing[1]}"
            lines.append(f"rank {rank}, position {position}: {action} waits for {awaited}")
        raise ScheduleError("; ".join(lines) + "; no rank can go on", "order the computations so that every input is produced first")
