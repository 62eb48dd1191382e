"""Interleaved and zero-bubble schedules: every size up to 8 ranks, 16 micro-batches and 4 chunks, then a sample of larger ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
from schedule_oracle import is_right

from megactl.config.pipeline_split import model_chunks
from megactl.config.schema import Parallel
from megactl.errors import ScheduleError
from megactl.schedules import (
    GENERATORS,
    Dates,
    Kind,
    Schedule,
    Totals,
    Work,
    check_rank,
    durations_of,
    generate,
    lower,
    max_live_microbatches,
    max_live_on_rank,
    num_chunks,
    peak_live,
    peak_of,
    placement,
    published_bubble,
    run_times,
)
from megactl.schedules.interleaved import group_sizes
from megactl.schedules.validation_lowered import check_exchanges

FAMILIES = ("1f1b", "zb-h1", "zb-h2", "zb-v")


def sizes(name: str, ranks: int, micro_batches: int, chunks: int) -> Iterator[tuple[int, int, int]]:
    """(ranks, micro-batches, chunks) up to these; schedules with a number of chunks of their own have that one."""
    for p in range(1, ranks + 1):
        for m in range(1, micro_batches + 1):
            for v in range(1, chunks + 1) if GENERATORS[name].chunks is None else (num_chunks(name),):
                yield p, m, v


def timed(schedule: Schedule, forward: float = 1.0, inputs: float = 1.0, weights: float = 1.0) -> Totals:
    """With the same work on a rank whatever the number of chunks."""
    v = schedule.num_stages // schedule.num_ranks
    durations = durations_of(forward / v, (inputs + weights) / v, input_gradient=inputs / v, weight_gradient=weights / v)
    return run_times(schedule, durations).totals()


def check(name: str, p: int, m: int, v: int) -> None:
    schedule = generate(name, num_ranks=p, num_microbatches=m, chunks=v)
    dates = Dates(schedule)
    lowered = lower(schedule, dates)
    # All rules of `validate_lowered`: those on one rank's program as the rank checks them when it starts, and those on how ranks meet.
    for rank in range(p):
        check_rank(lowered.rank_program(rank), dates)
    check_exchanges(lowered)
    for stage in range(p * v):
        bound = max_live_microbatches(name, stage=stage, num_ranks=p, num_microbatches=m, chunks=v)
        # The bounds are reached, so they are equalities: one that is merely large enough is found.
        assert schedule.num_slots(schedule.stage_to_rank[stage], stage) == bound, (name, p, m, v, stage)
    for rank in range(p):
        live, _ = peak_of(schedule.order(rank), dict.fromkeys(schedule.stages_of(rank), 1))
        bound = max_live_on_rank(name, rank=rank, num_ranks=p, num_microbatches=m, chunks=v)
        # With fewer micro-batches than the V needs, some of its ranks never hold all of them at once.
        assert live == bound or (name == "zb-v" and m < 2 * p and live < bound), (name, p, m, v, rank)
    timeline = timed(schedule)
    plain = 3 * (m + p - 1)
    assert timeline.makespan <= plain + 1e-9, (name, p, m, v)
    published = published_bubble(name, num_ranks=p, num_microbatches=m, chunks=v)
    if published is not None:
        assert timeline.own_bubble == pytest.approx(published.idle, abs=1e-9), (name, p, m, v)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_size_is_valid_within_its_bounds_as_fast_as_published_and_never_slower_than_1f1b(name: str) -> None:
    for p, m, v in sizes(name, 8, 16, 4):
        check(name, p, m, v)


def drawn(count: int, most: int, seed: int) -> Iterator[tuple[str, int, int, int]]:
    """Sizes up to 64 ranks, 512 micro-batches and 8 chunks with at most so many forwards in all."""
    chooser = random.Random(seed)
    while count:
        name, p, m = chooser.choice(FAMILIES), chooser.randint(2, 64), chooser.randint(1, 512)
        v = chooser.randint(1, 8) if GENERATORS[name].chunks is None else num_chunks(name)
        if p * m * v <= most:
            yield name, p, m, v
            count -= 1


@pytest.mark.parametrize(("name", "p", "m", "v"), [*drawn(16, 6000, seed=5), ("1f1b", 64, 65, 1), ("zb-v", 48, 20, 2)])
def test_larger_sizes_by_chance(name: str, p: int, m: int, v: int) -> None:
    check(name, p, m, v)


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "p", "m", "v"), [*drawn(60, 270_000, seed=6), ("1f1b", 64, 512, 8), ("zb-v", 64, 512, 2)])
def test_large_sizes_by_chance(name: str, p: int, m: int, v: int) -> None:
    check(name, p, m, v)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_values_are_those_of_one_process(name: str) -> None:
    for p, m, v in [(1, 3, 2), (2, 1, 2), (2, 5, 3), (3, 7, 2), (4, 8, 2), (4, 5, 3), (5, 3, 2)]:
        chunks = v if GENERATORS[name].chunks is None else num_chunks(name)
        assert is_right(lower(generate(name, num_ranks=p, num_microbatches=m, chunks=chunks))), (name, p, m, chunks)


def orders(name: str, p: int, m: int, v: int | None = None) -> list[str]:
    schedule = generate(name, num_ranks=p, num_microbatches=m, chunks=v)
    label = "{}{}.{}" if schedule.num_stages > p else "{}{}"
    return [" ".join(label.format(a.kind.value, a.microbatch, a.virtual_stage) for a in program) for program in schedule.programs]


def test_family_orders_by_hand() -> None:
    assert orders("zb-h1", 3, 4) == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3",
        "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3",
    ]
    assert orders("zb-h2", 2, 4) == ["F0 F1 F2 B0 F3 B1 B2 B3", "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3"]
    assert orders("1f1b", 2, 2, 2) == ["F0.0 F1.0 F0.2 F1.2 B0.2 B1.2 B0.0 B1.0", "F0.1 F1.1 F0.3 B0.3 F1.3 B1.3 B0.1 B1.1"]
    assert orders("zb-v", 2, 3) == [
        "F0.0 F1.0 F2.0 F0.3 I0.3 W0.3 F1.3 I1.3 W1.3 B0.0 F2.3 I2.3 W2.3 B1.0 B2.0",
        "F0.1 F0.2 F1.1 F1.2 B0.2 F2.1 I0.1 W0.1 F2.2 B1.2 I1.1 I2.2 I2.1 W1.1 W2.2 W2.1",
    ]
    # One rank waits for nobody: nothing is split.
    assert orders("zb-h1", 1, 2) == orders("zb-h2", 1, 2) == orders("1f1b", 1, 2) == ["F0 B0 F1 B1"]
    assert orders("zb-v", 1, 1) == ["F0.0 F0.1 B0.1 B0.0"]


def test_only_what_nobody_waits_for_is_a_whole_backward() -> None:
    for name in ("zb-h1", "zb-h2", "zb-v"):
        schedule = generate(name, num_ranks=4, num_microbatches=9)
        for program in schedule.programs:
            for before, after in pairwise(program):
                whole = after.kind is Kind.W and (before.kind, *before[1:3]) == (Kind.I, *after[1:3])
                assert not whole or schedule.sent_by(before) is not None
        whole = {action.virtual_stage for program in schedule.programs for action in program if action.kind is Kind.B}
        assert whole == ({0, 4} if name == "zb-v" else {0})


def test_groups_are_as_equal_as_possible_and_never_smaller_than_the_ranks() -> None:
    assert group_sizes(4, 8) == [4, 4] and group_sizes(4, 3) == [3]
    assert group_sizes(4, 11) == [6, 5] and group_sizes(8, 23) == [12, 11]
    for p in range(1, 12):
        for m in range(1, 60):
            found = group_sizes(p, m)
            assert sum(found) == m and max(found) - min(found) <= 1 and (m < p or min(found) >= p)


@pytest.mark.parametrize(("p", "m", "v"), [(4, 8, 2), (8, 32, 4), (4, 12, 3), (8, 16, 2)])
def test_interleaved_bubble_and_memory_are_those_of_the_papers(p: int, m: int, v: int) -> None:
    """(p-1)/(v m) (SC21, section 2.2.2); L (1 + (p-1)/(p v)) layers on the first rank (Korthikanti et al. 2022, section 4.2.3)."""
    schedule = generate("1f1b", num_ranks=p, num_microbatches=m, chunks=v)
    assert timed(schedule).bubble_fraction == pytest.approx((p - 1) / (v * m))
    layers = 5 * p * v
    live, _ = peak_live("1f1b", dict.fromkeys(schedule.stages_of(0), 5), rank=0, num_ranks=p, num_microbatches=m, chunks=v)
    assert live == pytest.approx(layers * (1 + (p - 1) / (p * v)))


@pytest.mark.parametrize(("forward", "inputs", "weights"), [(1, 1, 1), (1, 1.2, 0.8), (2, 3, 1), (3, 3, 2), (10, 11, 9)])
def test_zero_bubbles_of_unequal_times(forward: float, inputs: float, weights: float) -> None:
    """(p-1)(F+I-W) and (p-1)(F+I-2W) (Qi et al. 2023, section 2.3), for W not longer than F and I; the V's zero is for equal ones."""
    p, m = 4, 16
    for name, idle in (("zb-h1", forward + inputs - weights), ("zb-h2", forward + inputs - 2 * weights)):
        timeline = timed(generate(name, num_ranks=p, num_microbatches=m), forward, inputs, weights)
        assert timeline.own_bubble == pytest.approx((p - 1) * idle, abs=1e-9)
        published = published_bubble(name, num_ranks=p, num_microbatches=m, work=Work(forward, inputs, weights))
        assert published is not None and published.idle == pytest.approx((p - 1) * idle)
        assert published.fraction == pytest.approx((p - 1) * idle / (m * (forward + inputs + weights)))


def test_nothing_is_published_for_other_sizes() -> None:
    assert published_bubble("zb-h1", num_ranks=4, num_microbatches=3) is None
    assert published_bubble("zb-h2", num_ranks=4, num_microbatches=6) is None
    assert published_bubble("zb-v", num_ranks=4, num_microbatches=8, work=Work(1, 2, 1)) is None
    assert published_bubble("zb-h1", num_ranks=4, num_microbatches=8, work=Work(1, 1, 2)) is None
    assert published_bubble("1f1b", num_ranks=4, num_microbatches=2, chunks=2) is None
    assert published_bubble("1f1b", num_ranks=4, num_microbatches=2) is not None
    assert published_bubble("zigzag", num_ranks=4, num_microbatches=2) is None


def test_what_a_step_loses_that_ends_for_all_ranks_at_once() -> None:
    """Where ranks wait for each other at the end (a gradient norm), what they started apart is lost: H2 gains nothing over H1."""
    p, m = 8, 32
    lost = {name: timed(generate(name, num_ranks=p, num_microbatches=m)).bubble for name in FAMILIES}
    assert lost == {"1f1b": 3.0 * (p - 1), "zb-h1": p - 1, "zb-h2": p - 1, "zb-v": (p - 1) / 2}


def test_first_and_last_weight_gradient_of_split_backwards() -> None:
    lowered = lower(generate("zb-v", num_ranks=3, num_microbatches=7))
    for stage in range(6):
        program = lowered.compute_program(lowered.stage_to_rank[stage])
        order = [a.microbatch for a in program if a.virtual_stage == stage and a.kind in (Kind.W, Kind.B)]
        assert (lowered.first_backward(stage), lowered.last_backward(stage)) == (order[0], order[-1]) == (0, 6)


def test_placement() -> None:
    assert placement("1f1b", num_ranks=3, chunks=2) == (0, 1, 2, 0, 1, 2)
    assert placement("zb-v", num_ranks=3) == (0, 1, 2, 2, 1, 0)
    assert placement("zb-h1", num_ranks=3) == placement("gpipe", num_ranks=3) == (0, 1, 2)
    # The fold hands over within a rank: no transfer between the stages in the middle, nor anything for one rank.
    lowered = lower(generate("zb-v", num_ranks=2, num_microbatches=2))
    moved = {a.transfer[1:3] for program in lowered.programs for item in program if hasattr(item, "actions") for a in item.actions}
    assert moved == {(0, 1), (1, 0), (2, 3), (3, 2)}


def test_chunks_are_the_same_for_the_configuration_and_the_schedules() -> None:
    for name in GENERATORS:
        for vpp in (1, 2, 4):
            if vpp == 1 or name == "1f1b":
                assert model_chunks(Parallel(schedule=name, virtual_pipeline=vpp)) == num_chunks(name, vpp)


def test_peak_of_unlike_stages() -> None:
    program = generate("1f1b", num_ranks=2, num_microbatches=6, chunks=2).programs[0]
    for kept in ({0: 5, 2: 1}, {0: 1, 2: 5}, {0: 0, 2: 1}):
        held = peak = 0
        for action in program:
            held += kept[action.virtual_stage] * {Kind.F: 1, Kind.B: -1}[action.kind]
            peak = max(peak, held)
        found, live = peak_live("1f1b", kept, rank=0, num_ranks=2, num_microbatches=6, chunks=2)
        assert found == peak == sum(kept[stage] * count for stage, count in live.items())


def test_an_unknown_schedule_has_no_chunks() -> None:
    with pytest.raises(ScheduleError, match="'zigzag'"):
        num_chunks("zigzag")
