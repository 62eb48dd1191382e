"""Event simulation of a schedule: when every computation runs, how long an iteration takes, how large the bubble is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from megactl.errors import ScheduleError
from megactl.schedules.actions import Action, Kind, Schedule


class Span(NamedTuple):
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
    def bubble(self) -> float:
        """Idle time of the busiest rank, from the first start of any rank to the last end of any."""
        return self.makespan - self.ideal

    @property
    def bubble_fraction(self) -> float:
        """Idle time over ideal time: (p-1)/m for GPipe and 1F1B with equal stages and free transfers."""
        return self.bubble / self.ideal if self.ideal else 0.0

    @property
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
    split = backward / 2
    durations = {
        Kind.F: forward,
        Kind.B: backward if input_gradient is None or weight_gradient is None else input_gradient + weight_gradient,
        Kind.I: split if input_gradient is None else input_gradient,
        Kind.W: split if weight_gradient is None else weight_gradient,
    }
    ends = run_times(schedule, durations, transfer)
    rows = zip(schedule.programs, ends, strict=True)
    return Timeline(tuple(tuple(_spans(program, row, durations)) for program, row in rows))


def _spans(program: tuple[Action, ...], ends: list[float], durations: Mapping[Kind, float]) -> Iterator[Span]:
    for action, end in zip(program, ends, strict=True):
        yield Span(action, end - durations[action.kind], end)


UNIT_TIMES: Mapping[Kind, float] = MappingProxyType({Kind.F: 1.0, Kind.B: 2.0, Kind.I: 1.0, Kind.W: 1.0})
"""What a schedule is dated with where no durations are known: a backward does twice the work of a forward."""


def run_times(schedule: Schedule, durations: Mapping[Kind, float], transfer: float = 0.0) -> list[list[float]]:
    """When each computation of each rank ends. See `simulate`, which makes spans of it; long schedules have millions of those.

    Every rank runs its program in order, each action as early as its inputs allow; a rank blocked on an input waits in a table.
    """
    return _Simulation(schedule, durations, transfer).run()


class _Simulation:
    """Results are numbered: the forward of micro-batch b on stage s is s x m + b, its input gradient that plus (stages x m)."""

    def __init__(self, schedule: Schedule, durations: Mapping[Kind, float], transfer: float) -> None:
        self.schedule = schedule
        self.durations = durations
        self.transfer = transfer
        self.ready: dict[int, float] = {}
        self.waiting: dict[int, list[int]] = {}
        self.ends: list[list[float]] = [[] for _ in range(schedule.num_ranks)]

    def run(self) -> list[list[float]]:
        runnable = deque(range(self.schedule.num_ranks))
        while runnable:
            runnable.extend(self._advance(runnable.popleft()))
        self._refuse_deadlock()
        return self.ends

    def _advance(self, rank: int) -> list[int]:
        """Run a rank until it blocks or ends; returns the ranks its results set free. (One flat loop: it runs for every action.)"""
        ready, waiting, owners, durations = self.ready, self.waiting, self.schedule.stage_to_rank, self.durations
        count, last, ends = self.schedule.num_microbatches, self.schedule.num_stages - 1, self.ends[rank]
        gradients = (last + 1) * count
        freed: list[int] = []
        clock = ends[-1] if ends else 0.0
        for kind, stage, microbatch, _, _, _ in self.schedule.programs[rank][len(ends) :]:
            result, needs, neighbour = stage * count + microbatch, None, stage
            if kind is Kind.F:
                if stage:
                    needs, neighbour = result - count, stage - 1
            else:
                # The part of the same micro-batch before it is on the same rank.
                own = result + gradients if kind is Kind.W else result
                if own not in ready:
                    waiting.setdefault(own, []).append(rank)
                    break
                result += gradients
                if stage < last and kind is not Kind.W:
                    needs, neighbour = result + count, stage + 1
            if needs is not None:
                date = ready.get(needs)
                if date is None:
                    waiting.setdefault(needs, []).append(rank)
                    break
                if owners[neighbour] != rank:
                    date += self.transfer
                if date > clock:
                    clock = date
            clock += durations[kind]
            ends.append(clock)
            if result not in ready:
                ready[result] = clock
                if result in waiting:
                    freed += waiting.pop(result)
        return freed

    def _refuse_deadlock(self) -> None:
        stuck = [rank for rank, ends in enumerate(self.ends) if len(ends) < len(self.schedule.programs[rank])]
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
        gradients = self.schedule.num_stages * count
        if action.kind is Kind.F:
            return f"the forward of micro-batch {microbatch} on stage {stage - 1}"
        if action.kind is not Kind.W and stage * count + microbatch not in self.ready:
            return f"the forward of micro-batch {microbatch} on stage {stage}"
        if action.kind is Kind.W and gradients + stage * count + microbatch not in self.ready:
            return f"the input gradient of micro-batch {microbatch} on stage {stage}"
        return f"the input gradient of micro-batch {microbatch} on stage {stage + 1}"
