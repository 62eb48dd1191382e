"""A recorded step read back: the order that ranks followed, its bubble in slots, and computations that started too early."""

from __future__ import annotations

import random

import pytest

from megactl.errors import ScheduleError
from megactl.schedules import GENERATORS, Kind, TracedSpan, executed, generate, in_slots, measured, premature, simulate


def recorded(name: str, *, noise: float = 0.0, seed: int = 1) -> tuple[list[TracedSpan], tuple[int, ...]]:
    """What a recorder would have seen of 4 ranks and 8 micro-batches, in any order: each computation ends early by up to `noise`."""
    schedule = generate(name, num_ranks=4, num_microbatches=8)
    chooser = random.Random(seed)
    spans = [
        (rank, action, 100 + start, 100 + end - noise * chooser.random())
        for rank, row in enumerate(simulate(schedule, 0.5, 1.25, 0.125).spans)
        for action, start, end in row
    ]
    chooser.shuffle(spans)
    return spans, schedule.stage_to_rank


@pytest.mark.parametrize("name", GENERATORS)
def test_the_order_and_its_bubble_come_back(name: str) -> None:
    schedule = generate(name, num_ranks=4, num_microbatches=8)
    spans, placed = recorded(name, noise=0.1)
    assert executed(spans, placed).programs == schedule.programs
    # In slots nothing of the clock is left: neither transfers nor what a computation really took.
    counted = in_slots(spans, placed)
    assert (counted.bubble, counted.own_bubble) == (simulate(schedule).bubble, simulate(schedule).own_bubble)
    assert premature(spans, len(placed)) == []


def test_as_measured_it_starts_at_zero_and_keeps_its_times() -> None:
    spans, _ = recorded("1f1b")
    timeline = measured(spans)
    assert timeline.spans[0][0].start == 0.0
    assert timeline.makespan == pytest.approx(simulate(generate("1f1b", num_ranks=4, num_microbatches=8), 0.5, 1.25, 0.125).makespan)
    assert [len(row) for row in timeline.spans] == [16] * 4


def test_a_computation_before_its_input_is_found() -> None:
    spans, placed = recorded("zb-h1")
    early = next(span for span in spans if span[1].kind is Kind.I and span[0] == 1)
    moved = [(*span[:2], span[2] - 50, span[3] - 50) if span is early else span for span in spans]
    assert premature(moved, len(placed)) == [(*early[:2], early[2] - 50, early[3] - 50)]
    # An input that nobody recorded was not there either.
    without = [span for span in spans if not (span[1].kind is Kind.F and span[1].virtual_stage == 0 and span[1].microbatch == 3)]
    assert {span[1].microbatch for span in premature(without, len(placed))} == {3}


def test_nothing_recorded() -> None:
    with pytest.raises(ScheduleError, match="empty trace"):
        measured([])


def test_a_backward_without_forward_is_refused() -> None:
    spans, placed = recorded("1f1b")
    with pytest.raises(ScheduleError, match="has no forward before it"):
        executed([span for span in spans if span[1].kind is not Kind.F], placed)
