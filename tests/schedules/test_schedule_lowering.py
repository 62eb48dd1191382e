"""Lowering: placement of exchanges, and orders no generator makes yet (interleaved, folded, split backward, random)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_handmade import fold, greedy, interleaved
from schedule_oracle import is_right

from megactl.schedules import Action, Exchange, Kind, LoweredSchedule, generate, lower, simulate, text_view, validate, validate_lowered


def check(lowered: LoweredSchedule) -> None:
    validate_lowered(lowered)
    assert is_right(lowered)


@pytest.mark.parametrize(("num_ranks", "num_microbatches", "chunks"), [(2, 2, 2), (2, 6, 3), (4, 8, 2), (3, 6, 4), (1, 3, 2)])
def test_interleaved(num_ranks: int, num_microbatches: int, chunks: int) -> None:
    schedule = interleaved(num_ranks, num_microbatches, chunks)
    validate(schedule)
    check(lower(schedule))
    assert simulate(schedule).bubble_fraction == pytest.approx((num_ranks - 1) / (num_microbatches * chunks))
    assert schedule.stages_of(0) == tuple(range(0, num_ranks * chunks, num_ranks))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("split", [False, True])
def test_folded(num_ranks: int, split: bool) -> None:
    schedule = greedy(5, fold(num_ranks), split=split)
    validate(schedule)
    lowered = lower(schedule)
    check(lowered)
    assert lowered.stages_of(0) == (0, 2 * num_ranks - 1)
    # The turn of the V lies inside the last rank: its two stages exchange nothing.
    turn = {num_ranks - 1, num_ranks}
    assert all({a.transfer.producer, a.transfer.consumer} != turn for a in communications(lowered, num_ranks - 1))


@settings(max_examples=60, deadline=None)
@given(
    stages=st.lists(st.integers(0, 3), min_size=1, max_size=7),
    num_microbatches=st.integers(1, 5),
    split=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_order_that_respects_dependencies(stages: list[int], num_microbatches: int, split: bool, seed: int) -> None:
    names = sorted(set(stages))
    schedule = greedy(num_microbatches, [names.index(rank) for rank in stages], split=split, seed=seed)
    validate(schedule)
    check(lower(schedule))
    text_view(schedule)


def communications(lowered: LoweredSchedule, rank: int) -> list[Action]:
    return [action for item in lowered.program(rank) if isinstance(item, Exchange) for action in item.actions]


def test_ends_of_the_pipeline_and_single_rank() -> None:
    lowered = lower(generate("1f1b", num_ranks=3, num_microbatches=4))
    assert not any(a.kind is Kind.RECV and a.payload == "activation" for a in communications(lowered, 0))
    assert not any(a.kind is Kind.SEND and a.payload == "activation" for a in communications(lowered, 2))
    assert {a.peer for a in communications(lowered, 1)} == {0, 2}
    alone = lower(generate("1f1b", num_ranks=1, num_microbatches=3))
    assert [str(item)[0] for item in alone.program(0)] == list("FBFBFBR")


def test_gpipe_receives_while_it_computes() -> None:
    """The next input is posted together with the last output, in front of a computation that does not need it."""
    program = lower(generate("gpipe", num_ranks=3, num_microbatches=6)).program(1)
    members = [item.actions if isinstance(item, Exchange) else (item,) for item in program]
    kinds = [" ".join(f"{action.kind.value}{action.microbatch}" for action in actions) for actions in members]
    assert kinds[:9] == ["RECV0", "RECV1", "F0", "SEND0 RECV2", "F1", "SEND1 RECV3", "F2", "SEND2 RECV4", "F3"]


def test_1f1b_keeps_received_inputs_within_its_slots() -> None:
    """An input may arrive early, but not before the slot it goes into is free: the memory bound holds for receives too."""
    for rank in range(4):
        live: set[int] = set()
        lowered = lower(generate("1f1b", num_ranks=4, num_microbatches=9))
        for item in lowered.program(rank):
            for action in item.actions if isinstance(item, Exchange) else (item,):
                if action.kind is Kind.F or (action.kind is Kind.RECV and action.payload == "activation"):
                    live.add(action.microbatch)
                elif action.kind is Kind.B:
                    live.remove(action.microbatch)
                assert len(live) <= 4 - rank


def test_reduce_follows_the_last_gradient_of_its_stage() -> None:
    lowered = lower(interleaved(2, 4, 2))
    for rank in range(2):
        program = lowered.program(rank)
        reduces = [(i, item.virtual_stage) for i, item in enumerate(program) if isinstance(item, Action) and item.kind is Kind.REDUCE]
        assert sorted(stage for _, stage in reduces) == list(lowered.stages_of(rank))
        for index, stage in reduces:
            computed = [(i, item) for i, item in enumerate(program) if isinstance(item, Action) and item.kind is Kind.B]
            last = max(i for i, item in computed if item.virtual_stage == stage)
            between = program[last + 1 : index]
            assert last < index and all(isinstance(item, Exchange) for item in between)
    # Later stages finish first on a rank, so their reduction starts while earlier ones still compute.
    stages = [i.virtual_stage for i in lowered.program(0) if isinstance(i, Action) and i.kind is Kind.REDUCE]
    assert stages == [2, 0]


def test_split_backward_accumulates_in_weight_gradient_order() -> None:
    lowered = lower(greedy(4, [0, 1], split=True, seed=7))
    for stage in range(2):
        order = [a.microbatch for a in lowered.compute_program(stage) if a.kind is Kind.W]
        assert (lowered.first_backward(stage), lowered.last_backward(stage)) == (order[0], order[-1])
