"""Evaluation's order: complete, without idle time inside, and free of deadlock on every placement."""

from __future__ import annotations

from itertools import pairwise

import pytest

from megactl.schedules import Exchange, Kind, forward_only, lower, placement, simulate
from megactl.schedules.validation_lowered import check_exchanges

PLACEMENTS = [("1f1b", 1), ("1f1b", 2), ("1f1b", 3), ("zb-v", 2)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("name", "chunks"), PLACEMENTS)
def test_every_micro_batch_passes_every_stage_once(name: str, chunks: int, num_ranks: int) -> None:
    stages = placement(name, num_ranks=num_ranks, chunks=chunks)
    for count in (1, num_ranks, num_ranks + 1, 3 * num_ranks):
        schedule = forward_only(stages, count)
        for rank, program in enumerate(schedule.programs):
            expected = {(stage, m) for stage in schedule.stages_of(rank) for m in range(count)}
            assert {(a.virtual_stage, a.microbatch) for a in program} == expected and len(program) == len(expected)
            assert all(action.kind is Kind.F for action in program)
        lowered = lower(schedule)
        check_exchanges(lowered)
        moved = [a for program in lowered.programs for item in program if isinstance(item, Exchange) for a in item.actions]
        # Both ends of each activation between ranks, and nothing else: there are no gradients.
        between = sum(before != after for before, after in pairwise(stages))
        assert len(moved) == 2 * count * between and {action.payload for action in moved} <= {"activation"}


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize(("name", "chunks"), PLACEMENTS)
def test_no_time_is_lost_but_to_fill_and_to_empty_the_pipeline(name: str, chunks: int, num_ranks: int) -> None:
    count = 3 * num_ranks
    stages = placement(name, num_ranks=num_ranks, chunks=chunks)
    assert simulate(forward_only(stages, count)).makespan == count * chunks + (num_ranks - 1) * (1 if name == "1f1b" else 2)
