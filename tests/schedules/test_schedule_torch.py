"""torch.distributed.pipelining as an oracle: the same computations on each rank, in the same order where both follow the same paper.

What differs by design: torch leaves I and W of one micro-batch apart where no rank waits for the I, and refuses numbers of micro-batches
that its rounds do not divide. Its table of Schedule1F1B starts the last rank at micro-batch 1 (torch 2.13), so that rank is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from megactl.schedules import Kind, Schedule, build, generate, simulate

schedules = pytest.importorskip("torch.distributed.pipelining.schedules", reason="this torch has no pipeline schedules")

Unit = tuple[str, int, int]
_KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


def torch_orders(kind: str, p: int, m: int, v: int) -> list[list[Unit]]:
    """Each rank's computations, from the method that plans one rank; the object is made without stages, which need processes."""
    planner = object.__new__(getattr(schedules, kind))
    rounds = max(1, m // p)
    facts = {"pp_group_size": p, "n_local_stages": v, "num_stages": p * v, "_num_stages": p * v, "_n_microbatches": m}
    vars(planner).update(facts, number_of_rounds=rounds, microbatches_per_round=m // rounds)
    try:
        if kind == "Schedule1F1B":
            table = planner._get_pipeline_order()
        else:
            table = {rank: planner._calculate_single_rank_operations(rank) for rank in range(p)}
    except AttributeError as error:
        pytest.skip(f"this torch plans {kind} from other facts: {error}")
    return [[unit for action in table[rank] if action is not None for unit in units(action)] for rank in range(p)]


def units(action) -> Iterator[Unit]:
    """(kind, stage, micro-batch) of a computation; REDUCE_GRAD and the like are none."""
    # The names have stayed; what str() makes of them has not.
    name = action.computation_type.name
    if name in _KINDS:
        yield _KINDS[name], action.stage_index, action.microbatch_index


def our_orders(schedule: Schedule) -> list[list[Unit]]:
    """With each whole backward of a split schedule taken apart, as torch has it."""
    split = any(action.kind is Kind.I for program in schedule.programs for action in program)
    return [
        [(kind, a.virtual_stage, a.microbatch) for a in program for kind in (("I", "W") if split and a.kind is Kind.B else (a.kind.value,))]
        for program in schedule.programs
    ]


def compare(schedule: Schedule, theirs: list[list[Unit]]) -> None:
    ours = our_orders(schedule)
    assert [Counter(order) for order in ours] == [Counter(order) for order in theirs]
    assert ours == theirs
    plan = build("torch", theirs, num_microbatches=schedule.num_microbatches, stage_to_rank=schedule.stage_to_rank)
    for forward, backward in ((1.0, 2.0), (1.0, 2.5)):
        assert simulate(schedule, forward, backward).makespan == simulate(plan, forward, backward).makespan


@pytest.mark.parametrize(("p", "m"), [(2, 2), (4, 4), (4, 9), (8, 16)])
def test_1f1b_is_torchs(p: int, m: int) -> None:
    ours = our_orders(generate("1f1b", num_ranks=p, num_microbatches=m))
    theirs = torch_orders("Schedule1F1B", p, m, 1)
    assert ours[:-1] == theirs[:-1]
    if ("F", p - 1, 0) in theirs[-1]:
        assert ours[-1] == theirs[-1]


@pytest.mark.parametrize(("p", "m", "v"), [(2, 2, 2), (2, 8, 3), (4, 8, 2), (4, 10, 2), (4, 12, 4), (8, 16, 2), (8, 3, 2), (3, 5, 2)])
def test_interleaved_is_torchs(p: int, m: int, v: int) -> None:
    compare(generate("1f1b", num_ranks=p, num_microbatches=m, chunks=v), torch_orders("ScheduleInterleaved1F1B", p, m, v))


@pytest.mark.parametrize(("p", "m"), [(2, 2), (2, 7), (4, 4), (4, 8), (8, 24), (4, 2), (3, 7)])
def test_zb_h1_is_torchs_with_one_stage_a_rank(p: int, m: int) -> None:
    compare(generate("zb-h1", num_ranks=p, num_microbatches=m), torch_orders("ScheduleInterleavedZeroBubble", p, m, 1))


@pytest.mark.parametrize(("p", "m"), [(2, 2), (2, 8), (4, 7), (4, 8), (4, 3), (8, 32), (3, 5)])
def test_zb_v_is_torchs(p: int, m: int) -> None:
    compare(generate("zb-v", num_ranks=p, num_microbatches=m), torch_orders("ScheduleZBVZeroBubble", p, m, 2))


def test_a_wrong_order_would_be_seen() -> None:
    theirs = torch_orders("ScheduleInterleaved1F1B", 2, 4, 2)
    theirs[0][0], theirs[0][1] = theirs[0][1], theirs[0][0]
    with pytest.raises(AssertionError):
        compare(generate("1f1b", num_ranks=2, num_microbatches=4, chunks=2), theirs)
