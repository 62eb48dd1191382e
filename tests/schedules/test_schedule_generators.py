"""Generated schedules: their order, memory, time, and that they lower to something that runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_oracle import is_right

from megactl.errors import ScheduleError
from megactl.schedules import (
    GENERATORS,
    UNIT_TIMES,
    Kind,
    build,
    checked_program,
    generate,
    lower,
    max_live_microbatches,
    run_times,
    simulate,
    text_view,
    validate_lowered,
)

NAMES = sorted(GENERATORS)
PLAIN = ("1f1b", "gpipe")


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_every_small_size_is_valid_and_runs(name: str, num_ranks: int) -> None:
    for num_microbatches in range(1, 17):
        schedule = generate(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
        lowered = lower(schedule)
        # `validate` is part of it.
        validate_lowered(lowered)
        timeline = simulate(schedule)
        assert timeline.bubble_fraction == pytest.approx((num_ranks - 1) / num_microbatches)
        assert timeline.makespan == pytest.approx(3.0 * (num_microbatches + num_ranks - 1))
        for stage in range(num_ranks):
            # Both orders reach their published bound, so it is an equality.
            bound = max_live_microbatches(name, stage=stage, num_ranks=num_ranks, num_microbatches=num_microbatches)
            assert lowered.num_slots(stage, stage) == bound
            assert all(lowered.num_slots(other, stage) == 0 for other in range(num_ranks) if other != stage)
            assert lowered.stages_of(stage) == (stage,)
            assert (lowered.first_backward(stage), lowered.last_backward(stage)) == (0, num_microbatches - 1)


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_one_process(name: str) -> None:
    for num_ranks in range(1, 6):
        for num_microbatches in (1, 2, 3, 5, 9):
            assert is_right(lower(generate(name, num_ranks=num_ranks, num_microbatches=num_microbatches)))


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(PLAIN), num_ranks=st.integers(9, 24), num_microbatches=st.integers(1, 48))
def test_larger_sizes(name: str, num_ranks: int, num_microbatches: int) -> None:
    schedule = generate(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    validate_lowered(lower(schedule))
    assert simulate(schedule).bubble_fraction == pytest.approx((num_ranks - 1) / num_microbatches)


def orders(name: str, num_ranks: int, num_microbatches: int) -> list[str]:
    schedule = generate(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    return [" ".join(f"{action.kind.value}{action.microbatch}" for action in program) for program in schedule.programs]


def test_orders_by_hand() -> None:
    assert orders("1f1b", 3, 5) == [
        "F0 F1 F2 B0 F3 B1 F4 B2 B3 B4",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 B4",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4",
    ]
    assert orders("1f1b", 4, 2) == ["F0 F1 B0 B1", "F0 F1 B0 B1", "F0 F1 B0 B1", "F0 B0 F1 B1"]
    assert orders("1f1b", 1, 3) == ["F0 B0 F1 B1 F2 B2"]
    assert orders("gpipe", 2, 3) == ["F0 F1 F2 B0 B1 B2"] * 2


def test_slots_are_reused_smallest_first() -> None:
    program = generate("1f1b", num_ranks=3, num_microbatches=5).programs[0]
    assert [action.slot for action in program if action.kind is Kind.F] == [0, 1, 2, 0, 1]


def test_1f1b_saves_memory_but_not_time() -> None:
    gpipe, alternating = (generate(name, num_ranks=4, num_microbatches=16) for name in ("gpipe", "1f1b"))
    assert simulate(gpipe).makespan == simulate(alternating).makespan
    assert [gpipe.num_slots(rank, rank) for rank in range(4)] == [16] * 4
    assert [alternating.num_slots(rank, rank) for rank in range(4)] == [4, 3, 2, 1]


def test_transfer_time_lengthens_the_pipeline() -> None:
    schedule = generate("gpipe", num_ranks=4, num_microbatches=8)
    # GPipe hides all transfers but those that fill and drain the pipeline: p-1 each way.
    assert simulate(schedule, 1.0, 2.0, 0.5).makespan == pytest.approx(simulate(schedule).makespan + 2 * 3 * 0.5)
    one = generate("1f1b", num_ranks=1, num_microbatches=8)
    assert simulate(one, 1.0, 2.0, 0.5).makespan == 24.0


def test_a_rank_that_starts_assigns_the_slots_of_its_own_program_and_of_those_it_sends_activations_to() -> None:
    for name, chunks, asked in (("gpipe", 1, {4, 5}), ("1f1b", 3, {4, 5}), ("zb-h2", 1, {4, 5}), ("zb-v", 2, {3, 4, 5})):
        schedule = generate(name, num_ranks=8, num_microbatches=16, chunks=chunks)
        run_times(schedule, UNIT_TIMES).totals()
        assert not schedule.programs.made
        checked_program(schedule, 4)
        assert set(schedule.programs.made) == asked, name


def test_programs_are_made_once_and_are_those_of_tuples() -> None:
    schedule = generate("zb-h1", num_ranks=3, num_microbatches=5)
    eager = build("zb-h1", schedule.programs.orders, num_microbatches=5, stage_to_rank=schedule.stage_to_rank)
    assert schedule == eager and hash(schedule) == hash(eager) and eager.programs == schedule.programs
    assert schedule.programs[-1] is schedule.programs[2] and len(schedule.programs) == 3
    assert [schedule.order(rank) for rank in range(3)] == [eager.order(rank) for rank in range(3)]
    assert schedule != generate("zb-h1", num_ranks=3, num_microbatches=6)
    with pytest.raises(IndexError):
        schedule.programs[3]


def test_refusals() -> None:
    with pytest.raises(ScheduleError, match=r"'zigzag'.*\n.*gpipe, 1f1b"):
        generate("zigzag", num_ranks=2, num_microbatches=2)
    for wrong in ({"num_ranks": 0}, {"num_microbatches": 0}, {"chunks": 0}):
        with pytest.raises(ScheduleError, match="at least 1"):
            generate("1f1b", **{"num_ranks": 2, "num_microbatches": 2, **wrong})
    for name, chunks in (("gpipe", 2), ("zb-h1", 2), ("zb-v", 1), ("zb-v", 4)):
        with pytest.raises(ScheduleError, match=f"chunks = {chunks}: schedule {name} runs with"):
            generate(name, num_ranks=2, num_microbatches=2, chunks=chunks)


def test_text_view() -> None:
    view = text_view(generate("1f1b", num_ranks=2, num_microbatches=3))
    assert view.splitlines() == [
        "rank 0 |F0 F1 ......B0=== F2 B1=== ...B2=== ",
        "rank 1 |...F0 B0=== F1 B1=== F2 B2=== ......",
        "1f1b: 2 ranks, 3 micro-batches, 2 stages; time 12, bubble 33.3 % of ideal",
    ]
    wide = generate("gpipe", num_ranks=2, num_microbatches=120)
    rows = text_view(wide, max_width=60).splitlines()[:2]
    assert all(len(row) == 60 and row.endswith(">") for row in rows)


def test_pictures_of_the_documentation_are_what_the_view_draws() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "schedules.md").read_text()
    pictures = [("gpipe", 3, 4, 1), ("1f1b", 4, 8, 1), ("1f1b", 2, 4, 2), ("zb-h1", 3, 6, 1), ("zb-h2", 3, 6, 1), ("zb-v", 2, 4, 2)]
    for name, num_ranks, num_microbatches, chunks in pictures:
        view = text_view(generate(name, num_ranks=num_ranks, num_microbatches=num_microbatches, chunks=chunks))
        assert "\n".join(line.rstrip() for line in view.splitlines()) in text, name
