"""Event simulation of a schedule: when every computation runs, how long an iteration takes, how large the bubble is."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

from megactl.errors import ScheduleError
from megactl.schedules.actions import FORWARD, WEIGHTS, Action, Kind, Schedule


class Span(NamedTuple):
    """One computation on the time axis (unit: that of the durations given)."""

    action: Action
    start: float
    end: float


class _Bubble:
    """What follows from the length of an iteration and the computing time of its busiest rank."""

    makespan: float
    ideal: float

    @property
    def bubble(self) -> float:
        """Idle time of the busiest rank, from the first start of any rank to the last end of any."""
        return self.makespan - self.ideal

    @property
    def bubble_fraction(self) -> float:
        """Idle time over ideal time: (p-1)/m for GPipe and 1F1B with equal stages and free transfers."""
        return self.bubble / self.ideal if self.ideal else 0.0


@dataclass(frozen=True)
class Totals(_Bubble):
    """The numbers of a `Timeline`, which has the same names."""

    makespan: float
    ideal: float
    own_bubble: float


@dataclass(frozen=True)
class Timeline(_Bubble):
    """Spans per rank, in program order."""

    spans: tuple[tuple[Span, ...], ...]

    @cached_property
    def makespan(self) -> float:
        """Time from the first start to the last end over all ranks."""
        return max((row[-1].end for row in self.spans if row), default=0.0)

    @cached_property
    def ideal(self) -> float:
        """Computing time of the busiest rank: no order of the same work can be shorter."""
        return max((sum(span.end - span.start for span in row) for row in self.spans), default=0.0)

    @cached_property
    def own_bubble(self) -> float:
        """The longest idle time of a rank between its own first start and its own last end.

        What the zero-bubble papers count: there a rank starts its next iteration without waiting for the others, since the optimizer
        step needs no number of all ranks (Qi et al. 2023, section 4). Where it does (a gradient norm), `bubble` is what is lost.
        """
        return max((row[-1].end - row[0].start - sum(span.end - span.start for span in row) for row in self.spans if row), default=0.0)


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
    durations = durations_of(forward, backward, input_gradient=input_gradient, weight_gradient=weight_gradient)
    return run_times(schedule, durations, transfer).timeline()


def durations_of(
    forward: float = 1.0, backward: float = 2.0, *, input_gradient: float | None = None, weight_gradient: float | None = None
) -> dict[Kind, float]:
    """The time of each kind of computation, from those that `simulate` takes."""
    split = backward / 2
    return {
        Kind.F: forward,
        Kind.B: backward if input_gradient is None or weight_gradient is None else input_gradient + weight_gradient,
        Kind.I: split if input_gradient is None else input_gradient,
        Kind.W: split if weight_gradient is None else weight_gradient,
    }


UNIT_TIMES: Mapping[Kind, float] = MappingProxyType({Kind.F: 1.0, Kind.B: 2.0, Kind.I: 1.0, Kind.W: 1.0})
"""What a schedule is dated with where no durations are known: a backward does twice the work of a forward."""


NEVER = -1.0
"""The date of what is not there."""


@dataclass(frozen=True)
class Times:
    """When what is there, in a schedule run with these durations. `ends[rank]` has the end of each computation in program order; the
    others, at stage x (micro-batches) + micro-batch, the end of each forward and of each input gradient, or NEVER.
    """

    schedule: Schedule
    durations: Mapping[Kind, float]
    ends: list[list[float]]
    forwards: list[float]
    input_gradients: list[float]

    def timeline(self) -> Timeline:
        """All of it as spans."""
        return Timeline(tuple(tuple(self._spans(rank)) for rank in range(self.schedule.num_ranks)))

    def _spans(self, rank: int) -> Iterator[Span]:
        for action, end in zip(self.schedule.programs[rank], self.ends[rank], strict=True):
            yield Span(action, end - self.durations[action.kind], end)

    def totals(self) -> Totals:
        """What the timeline would say in numbers, without one: the spans of a long schedule take longer than its simulation."""
        makespan = ideal = own = 0.0
        for rank, ends in enumerate(self.ends):
            order = self.schedule.order(rank)
            if not order:
                continue
            counts = Counter(kind for kind, _, _ in order)
            work = sum(self.durations[kind] * count for kind, count in counts.items())
            makespan, ideal = max(makespan, ends[-1]), max(ideal, work)
            own = max(own, ends[-1] - (ends[0] - self.durations[order[0][0]]) - work)
        return Totals(makespan, ideal, own)


def run_times(schedule: Schedule, durations: Mapping[Kind, float], transfer: float = 0.0) -> Times:
    """Run the schedule with the durations of `durations_of`. See `simulate`, which makes spans of it; long schedules have millions.

    Every rank runs its program in order, each action as early as its inputs allow; a rank blocked on an input waits in a table.
    Raises ScheduleError when no rank can go on, naming what each one waits for.
    """
    return _Simulation(schedule, durations, transfer).run()


class _Simulation:
    """The dates of results, in lists with one stage more than there are: what the first forwards and the last gradients need is there at 0.

    The forward of micro-batch b on stage s is at (s + 1) m + b of `forwards`, its input gradient at s m + b of `gradients`.
    """

    def __init__(self, schedule: Schedule, durations: Mapping[Kind, float], transfer: float) -> None:
        self.schedule, self.durations = schedule, durations
        self.orders = [schedule.order(rank) for rank in range(schedule.num_ranks)]
        count, owners = schedule.num_microbatches, schedule.stage_to_rank
        self.forwards = [0.0] * count + [NEVER] * (schedule.num_stages * count)
        self.gradients = [NEVER] * (schedule.num_stages * count) + [0.0] * count
        # How long a stage's tensor is on its way from the stage before it, and from the one behind it.
        hops = [transfer if before != after else 0.0 for before, after in pairwise(owners)]
        self.hops_ahead, self.hops_back = [0.0, *hops], [*hops, 0.0]
        # Ranks by the result they wait for: a forward's index, or behind all of those a gradient's.
        self.waiting: dict[int, list[int]] = {}
        self.ends: list[list[float]] = [[] for _ in range(schedule.num_ranks)]

    def run(self) -> Times:
        runnable = deque(range(self.schedule.num_ranks))
        while runnable:
            rank = runnable.popleft()
            needed = self._advance(rank, runnable)
            if needed is not None:
                self.waiting.setdefault(needed, []).append(rank)
        self._refuse_deadlock()
        count = self.schedule.num_microbatches
        gradients = self.gradients[: len(self.gradients) - count]
        return Times(self.schedule, self.durations, self.ends, self.forwards[count:], gradients)

    def _advance(self, rank: int, runnable: deque[int]) -> int | None:
        """Run a rank until it blocks or ends; returns the result it waits for. (One flat loop: it runs for every computation.)"""
        forwards, gradients, waiting, durations = self.forwards, self.gradients, self.waiting, self.durations
        hops_ahead, hops_back, count, behind = self.hops_ahead, self.hops_back, self.schedule.num_microbatches, len(self.forwards)
        order, ends, whole_forward = self.orders[rank], self.ends[rank], self.durations[Kind.F]
        clock = ends[-1] if ends else 0.0
        # Not a slice of the rest: it is copied each time that a rank goes on, half of its program on average.
        for position in range(len(ends), len(order)):
            kind, stage, microbatch = order[position]
            result = stage * count + microbatch
            if kind is FORWARD:
                date = forwards[result]
                if date < 0.0:
                    return result
                date += hops_ahead[stage]
                clock = (date if date > clock else clock) + whole_forward
                result += count
                if forwards[result] < 0.0:
                    forwards[result] = clock
                    if result in waiting:
                        runnable.extend(waiting.pop(result))
            elif kind is WEIGHTS:
                # The part of the same micro-batch before it is on the same rank.
                if gradients[result] < 0.0:
                    return behind + result
                clock += durations[kind]
            else:
                date = gradients[result + count]
                if date < 0.0 or forwards[result + count] < 0.0:
                    return result + count if forwards[result + count] < 0.0 else behind + result + count
                date += hops_back[stage]
                clock = (date if date > clock else clock) + durations[kind]
                if gradients[result] < 0.0:
                    gradients[result] = clock
                    if behind + result in waiting:
                        runnable.extend(waiting.pop(behind + result))
            ends.append(clock)
        return None

    def _refuse_deadlock(self) -> None:
        stuck = [rank for rank, ends in enumerate(self.ends) if len(ends) < len(self.orders[rank])]
        if not stuck:
            return
        lines = []
        for rank in stuck:
            position = len(self.ends[rank])
            action = self.schedule.programs[rank][position]
            lines.append(f"rank {rank}, position {position}: {action} waits for {self._awaited(action)}")
        raise ScheduleError("; ".join(lines) + "; no rank can go on", "order the computations so that every input is produced first")

    def _awaited(self, action: Action) -> str:
        """The first thing an action lacks, in words."""
        count, stage, microbatch = self.schedule.num_microbatches, action.virtual_stage, action.microbatch
        own = stage * count + microbatch
        if action.kind is Kind.F:
            return f"the forward of micro-batch {microbatch} on stage {stage - 1}"
        if action.kind is Kind.W:
            return f"the input gradient of micro-batch {microbatch} on stage {stage}"
        if self.forwards[own + count] < 0.0:
            return f"the forward of micro-batch {microbatch} on stage {stage}"
        return f"the input gradient of micro-batch {microbatch} on stage {stage + 1}"
