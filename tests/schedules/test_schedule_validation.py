"""The validator against mutations: whatever changes the meaning of a valid schedule is found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from schedule_handmade import fold, greedy, interleaved
from schedule_oracle import is_right

from megactl.errors import ScheduleError
from megactl.schedules import (
    Action,
    Dates,
    Exchange,
    Kind,
    LoweredSchedule,
    Schedule,
    check_rank,
    checked_program,
    generate,
    lower,
    validate,
    validate_lowered,
)

SCHEDULES = {
    "1f1b": generate("1f1b", num_ranks=3, num_microbatches=4),
    "1f1b-short": generate("1f1b", num_ranks=3, num_microbatches=2),
    "gpipe": generate("gpipe", num_ranks=2, num_microbatches=3),
    "accumulation": generate("1f1b", num_ranks=1, num_microbatches=3),
    "interleaved": interleaved(2, 4, 2),
    "folded": greedy(3, fold(2), split=False),
    "split": greedy(3, [0, 1, 2], split=True),
    "folded-split": greedy(3, fold(2), split=True),
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def found(check, subject) -> bool:
    try:
        check(subject)
    except ScheduleError as error:
        # A message that does not say where is of no use.
        assert "rank " in str(error) or "stage" in str(error)
        return True
    return False


def with_program(subject, rank: int, program) -> Schedule | LoweredSchedule:
    programs = list(subject.programs)
    programs[rank] = tuple(program)
    return replace(subject, programs=tuple(programs))


def positions(subject) -> Iterator[tuple[int, int]]:
    return ((rank, position) for rank, program in enumerate(subject.programs) for position in range(len(program)))


def changed_fields(action: Action) -> Iterator[Action]:
    """Every way of making one field of an action wrong."""
    yield from (action._replace(kind=kind) for kind in Kind if kind is not action.kind)
    yield from (action._replace(virtual_stage=action.virtual_stage + d) for d in (-1, 1))
    yield from (action._replace(microbatch=action.microbatch + d) for d in (-1, 1))
    yield from (action._replace(slot=action.slot + d) for d in (-1, 1))
    yield action._replace(peer=0 if action.peer is None else action.peer + 1)
    yield from (action._replace(payload=payload) for payload in ("activation", "gradient") if payload != action.payload)


@each_schedule
def test_valid_to_begin_with(schedule: Schedule) -> None:
    validate(schedule)
    lowered, dates = lower(schedule), Dates(schedule)
    validate_lowered(lowered)
    for rank in range(schedule.num_ranks):
        check_rank(lowered.rank_program(rank), dates)
        assert checked_program(schedule, rank) == lowered.rank_program(rank)


@each_schedule
def test_computations_dropped_doubled_or_changed(schedule: Schedule) -> None:
    for rank, position in positions(schedule):
        program = schedule.programs[rank]
        assert found(validate, with_program(schedule, rank, program[:position] + program[position + 1 :]))
        assert found(validate, with_program(schedule, rank, program[: position + 1] + program[position:]))
        for wrong in changed_fields(program[position]):
            assert found(validate, with_program(schedule, rank, (*program[:position], wrong, *program[position + 1 :]))), wrong


@each_schedule
def test_computations_moved(schedule: Schedule) -> None:
    """A computation moved anywhere else in its program: either found, or another order that computes the same."""
    outcomes = set()
    for rank, position in positions(schedule):
        program = list(schedule.programs[rank])
        action = program.pop(position)
        for target in range(len(program) + 1):
            moved = with_program(schedule, rank, [*program[:target], action, *program[target:]])
            outcome = found(validate, moved)
            outcomes.add(outcome)
            assert outcome or is_right(lower(moved))
    assert True in outcomes


def lowered_mutations(lowered: LoweredSchedule, rank: int, position: int) -> Iterator[LoweredSchedule]:
    """Mutations that always change the meaning: drop, double, split off or change one action of one item."""
    program = lowered.programs[rank]
    head, item, tail = program[:position], program[position], program[position + 1 :]
    yield with_program(lowered, rank, (*head, *tail))
    yield with_program(lowered, rank, (*head, item, item, *tail))
    if isinstance(item, Action):
        yield from (with_program(lowered, rank, (*head, wrong, *tail)) for wrong in changed_fields(item))
        return
    for index, action in enumerate(item.actions):
        before, after = item.actions[:index], item.actions[index + 1 :]
        yield with_program(lowered, rank, (*head, Exchange((*before, *after)), *tail))
        yield with_program(lowered, rank, (*head, Exchange((*before, action, action, *after)), *tail))
        for wrong in changed_fields(action):
            yield with_program(lowered, rank, (*head, Exchange((*before, wrong, *after)), *tail))


@each_schedule
def test_items_dropped_doubled_or_changed(schedule: Schedule) -> None:
    lowered, dates = lower(schedule), Dates(schedule)
    for rank, position in positions(lowered):
        for mutant in lowered_mutations(lowered, rank, position):
            assert found(validate_lowered, mutant), (rank, position, lowered.programs[rank][position])
            assert refused_alone(mutant, rank, dates), (rank, position, lowered.programs[rank][position])


@each_schedule
def test_items_moved(schedule: Schedule) -> None:
    """An item moved elsewhere: either found, or the programs still compute what one process would."""
    dates, wrong = Dates(schedule), 0
    for rank, mutant in moves(lower(schedule)):
        right = is_right(mutant)
        wrong += not right
        # What all programs together show, the rank alone sees as well. It takes no other order than the common one, though some are right.
        seen, alone = found(validate_lowered, mutant), refused_alone(mutant, rank, dates)
        assert (seen or right) and (alone or not seen)
    assert wrong


def moves(lowered: LoweredSchedule) -> Iterator[tuple[int, LoweredSchedule]]:
    for rank, position in positions(lowered):
        program = list(lowered.programs[rank])
        item = program.pop(position)
        for target in range(max(0, position - 4), min(len(program), position + 4) + 1):
            if target != position:
                yield rank, with_program(lowered, rank, [*program[:target], item, *program[target:]])


def refused_alone(lowered: LoweredSchedule, rank: int, dates: Dates) -> bool:
    """Whether the rank refuses its own program, of which it knows what was dated and no other rank's program."""
    return found(lambda subject: check_rank(subject.rank_program(rank), dates), lowered)


def test_sends_must_match_receives_in_order() -> None:
    lowered = lower(generate("gpipe", num_ranks=2, num_microbatches=4))
    program = lowered.programs[1]
    receives = [(i, item) for i, item in enumerate(program) if isinstance(item, Exchange) and item.actions[0].kind is Kind.RECV]
    (_, first), (second_at, second) = receives[0], receives[1]
    swapped = (Exchange((*second.actions, *first.actions)), *(item for i, item in enumerate(program[1:], 1) if i != second_at))
    rule = r"rank 1, position 0: receives the activation of micro-batch 1 .* sends the activation of micro-batch 0"
    with pytest.raises(ScheduleError, match=rule):
        validate_lowered(with_program(lowered, 1, swapped))
    with pytest.raises(
        ScheduleError, match=r"rank 1, position 0: .*micro-batch 1.* is posted where the order of all ranks has .*micro-batch 0"
    ):
        check_rank(with_program(lowered, 1, swapped).rank_program(1), Dates(generate("gpipe", num_ranks=2, num_microbatches=4)))


def test_plain_blocking_sends_deadlock_1f1b() -> None:
    """Each exchange torn into single calls, sends first: fine in the background, a deadlock where every call blocks."""
    lowered = lower(generate("1f1b", num_ranks=2, num_microbatches=4))

    def torn(program):
        for item in program:
            members = sorted(item.actions, key=lambda a: a.kind is Kind.RECV) if isinstance(item, Exchange) else ()
            yield from [Exchange((action,)) for action in members] or [item]

    naive = replace(lowered, programs=tuple(tuple(torn(program)) for program in lowered.programs))
    with pytest.raises(ScheduleError, match="communication deadlock where every batch blocks"):
        validate_lowered(naive)


def test_waiting_before_sending_deadlocks_in_any_case() -> None:
    lowered = lower(generate("gpipe", num_ranks=2, num_microbatches=2))
    program = list(lowered.programs[0])
    # The second activation leaves only after the first backward, which needs a gradient that is computed after its arrival.
    send = next(action for item in program if isinstance(item, Exchange) for action in item.actions if sends_activation(action, 1))
    program = [Exchange(tuple(a for a in item.actions if a != send)) if isinstance(item, Exchange) else item for item in program]
    program = [item for item in program if isinstance(item, Action) or item.actions]
    backward = next(i for i, item in enumerate(program) if isinstance(item, Action) and item.kind is Kind.B)
    program.insert(backward + 1, Exchange((send,)))
    late = with_program(lowered, 0, program)
    with pytest.raises(ScheduleError, match="communication deadlock where batches complete in the background"):
        validate_lowered(late)
    assert refused_alone(late, 0, Dates(generate("gpipe", num_ranks=2, num_microbatches=2)))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_no_rank_starts_a_schedule_in_which_any_ranks_wait_in_a_circle(rank: int) -> None:
    """Rank 2 begins with what rank 1 only does after an answer; rank 0, whose own program is right, must not start either."""
    schedule = generate("gpipe", num_ranks=3, num_microbatches=2)
    f0, f1, b0, b1 = schedule.programs[2]
    one_by_one = [schedule.programs[1][position] for position in (0, 2, 1, 3)]
    circle = with_program(with_program(schedule, 1, one_by_one), 2, (f1, b1, f0, b0))
    rule = r"rank 1, position 1: B.*waits for the input gradient.*rank 2, position 0: F.*waits for the forward.*no rank can go on"
    with pytest.raises(ScheduleError, match=rule):
        checked_program(circle, rank)


def test_a_rank_starts_only_what_was_dated() -> None:
    """The same computations in another order may be right on their own, but nothing is known of how ranks would meet."""
    schedule = generate("gpipe", num_ranks=2, num_microbatches=3)
    other = replace(schedule, programs=generate("1f1b", num_ranks=2, num_microbatches=3).programs)
    with pytest.raises(ScheduleError, match="rank 1: its computations are not those that were dated"):
        check_rank(lower(other).rank_program(1), Dates(schedule))


def sends_activation(action: Action, microbatch: int) -> bool:
    return (action.kind, action.payload, action.microbatch) == (Kind.SEND, "activation", microbatch)


def test_computation_deadlock_names_both_sides() -> None:
    schedule = generate("1f1b", num_ranks=2, num_microbatches=2)
    f0, b0, f1, b1 = schedule.programs[1]
    wrong = with_program(schedule, 1, (f1, b1, f0, b0))
    first = with_program(wrong, 0, [schedule.programs[0][i] for i in (0, 2, 1, 3)])
    one_slot = tuple(tuple(a._replace(slot=0) for a in program) for program in first.programs)
    rule = r"rank 0, position 1: B.*waits for the input gradient.*rank 1, position 0: F.*waits for the forward"
    with pytest.raises(ScheduleError, match=rule):
        validate(replace(first, name="handmade", programs=one_slot))


def test_memory_bound_of_the_named_schedule() -> None:
    gpipe = generate("gpipe", num_ranks=2, num_microbatches=4)
    with pytest.raises(ScheduleError, match=r"rank 0, position 2: 3 live micro-batches on stage 0; 1f1b holds at most 2"):
        validate(replace(gpipe, name="1f1b"))


def test_a_micro_batch_left_out_on_one_stage() -> None:
    schedule = generate("1f1b", num_ranks=2, num_microbatches=3)
    without = [action for action in schedule.programs[1] if action.microbatch != 2]
    with pytest.raises(ScheduleError, match="rank 1: micro-batch 2 has no F on stage 1"):
        validate(with_program(schedule, 1, without))
    lowered = lower(schedule)
    halved = [a for a in lowered.programs[1] if isinstance(a, Exchange) or a.microbatch != 2 or a.kind is Kind.F]
    with pytest.raises(ScheduleError, match="rank 1: micro-batch 2 has no B on stage 1"):
        validate_lowered(with_program(lowered, 1, halved))


def test_unused_and_shared_slots() -> None:
    schedule = generate("1f1b", num_ranks=2, num_microbatches=3)
    high = tuple(a._replace(slot=5) if a.microbatch == 0 else a for a in schedule.programs[0])
    with pytest.raises(ScheduleError, match="needs exactly slots 0 to 1"):
        validate(with_program(schedule, 0, high))
    shared = tuple(a._replace(slot=0) for a in schedule.programs[0])
    with pytest.raises(ScheduleError, match="micro-batch 0 is still live"):
        validate(with_program(schedule, 0, shared))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_ranks": 3}, "2 programs for 3 ranks"),
        ({"num_microbatches": 0}, "num_microbatches = 0"),
        ({"num_stages": 3}, "stage_to_rank has 2 entries"),
        ({"stage_to_rank": (0, 2)}, "stage 1 lies on rank 2"),
        ({"stage_to_rank": (0, 0)}, "rank 1 holds no stage"),
    ],
)
def test_shape(change: dict, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        validate(replace(generate("1f1b", num_ranks=2, num_microbatches=2), **change))


def test_unshard_and_reshard() -> None:
    """Sharded weights (a later ZeRO stage): a stage computes only while its weights are gathered."""
    lowered = lower(generate("1f1b", num_ranks=2, num_microbatches=2))
    gather, drop = Action(Kind.UNSHARD, 0), Action(Kind.RESHARD, 0)
    program = lowered.programs[0]
    validate_lowered(with_program(lowered, 0, (gather, *program, drop)))
    for wrong in [(*program, gather, drop), (gather, *program), (gather, gather, *program, drop), (program[0], gather, *program[1:], drop)]:
        assert found(validate_lowered, with_program(lowered, 0, wrong))
