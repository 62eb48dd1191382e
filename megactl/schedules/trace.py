"""What ranks really did, read back: a recorded step as a timeline, and its bubble counted in slots.

A trace is [(rank, action, start, end)], one entry a computation, with all times on one clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megactl.errors import ScheduleError
from megactl.schedules.actions import INPUT_GRADIENT, WEIGHT_GRADIENT, Action, Kind, Schedule, build
from megactl.schedules.simulation import Span, Timeline, simulate

TracedSpan = tuple[int, Action, float, float]
"""(pipeline rank, computation, start, end)."""

Result = tuple[str, int, int]
"""('forward' | 'input gradient' | 'weight gradient', virtual stage, micro-batch)."""


def measured(trace: Iterable[TracedSpan]) -> Timeline:
    """The trace as it happened, in its own unit, from rank 0 to the highest rank in it; time zero is the first start."""
    rows: dict[int, list[Span]] = {}
    for rank, action, start, end in trace:
        rows.setdefault(rank, []).append(Span(action, start, end))
    if not rows:
        raise ScheduleError("an empty trace has no timeline", "record at least one step")
    first = min(span.start for row in rows.values() for span in row)
    shifted = [[Span(a, start - first, end - first) for a, start, end in rows.get(rank, [])] for rank in range(max(rows) + 1)]
    return Timeline(tuple(tuple(sorted(row, key=lambda span: span.start)) for row in shifted))


def executed(trace: Iterable[TracedSpan], stage_to_rank: Sequence[int]) -> Schedule:
    """The schedule that ranks followed: each one's computations in the order in which they started.

    Raises ScheduleError where a backward ran without its forward.
    """
    rows = measured(trace).spans
    orders = [[(span.action.kind, span.action.virtual_stage, span.action.microbatch) for span in row] for row in rows]
    count = 1 + max(microbatch for order in orders for _, _, microbatch in order)
    return build("executed", orders, num_microbatches=count, stage_to_rank=stage_to_rank)


def in_slots(trace: Iterable[TracedSpan], stage_to_rank: Sequence[int], *, forward: float = 1.0, backward: float = 2.0) -> Timeline:
    """The order that was executed, with equal times: the trace's bubble without what the machine adds.

    Each computation takes its slots (on one virtual stage) and starts as soon as its inputs are there. `own_bubble` of the result is
    what papers count, `bubble` what a step loses whose end waits for all ranks.
    """
    return simulate(executed(trace, stage_to_rank), forward, backward)


def premature(trace: Sequence[TracedSpan], num_stages: int) -> list[TracedSpan]:
    """Computations that started before something they read had been made: none, if clock and trace are right."""
    made = {result: end for _, action, _, end in trace for result in results_of(action)}
    late = float("inf")
    return [span for span in trace if any(made.get(need, late) > span[2] for need in needs_of(span[1], num_stages))]


def results_of(action: Action) -> tuple[Result, ...]:
    """What a computation makes available to others."""
    stage, microbatch = action.virtual_stage, action.microbatch
    if action.kind is Kind.F:
        return (("forward", stage, microbatch),)
    parts = (("input gradient", INPUT_GRADIENT), ("weight gradient", WEIGHT_GRADIENT))
    return tuple((name, stage, microbatch) for name, kinds in parts if action.kind in kinds)


def needs_of(action: Action, num_stages: int) -> tuple[Result, ...]:
    """What a computation waits for: the neighbour's tensor, and the earlier part of its own micro-batch."""
    stage, microbatch = action.virtual_stage, action.microbatch
    if action.kind is Kind.F:
        return (("forward", stage - 1, microbatch),) if stage > 0 else ()
    if action.kind is Kind.W:
        return (("input gradient", stage, microbatch),)
    own: tuple[Result, ...] = (("forward", stage, microbatch),)
    return (*own, ("input gradient", stage + 1, microbatch)) if stage < num_stages - 1 else own
