"""The batch ramp-up against Megatron's definition, step by step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.config.batch import BatchSchedule, Rampup, parse_rampup, parse_warmup


def megatron(consumed: int, total: int, start: int, increment: int, samples: int) -> int:
    """Megatron-LM's rule, in exact fractions."""
    from fractions import Fraction

    if consumed > samples:
        return total
    return start + increment * int(consumed / Fraction(samples, (total - start) // increment))


schedules = st.builds(
    lambda start, increment, levels, samples: BatchSchedule(start + increment * levels, Rampup(start, increment, samples), 1, 1),
    st.integers(1, 20),
    st.integers(1, 10),
    st.integers(1, 12),
    st.integers(1, 3000),
)


@settings(deadline=None)
@given(schedules, st.integers(0, 4000))
def test_size_is_megatrons(schedule, consumed):
    ramp = schedule.rampup
    assert schedule.at(consumed) == megatron(consumed, schedule.global_batch_size, *ramp)


@settings(deadline=None)
@given(schedules, st.integers(0, 400))
def test_consumed_after_equals_the_loop(schedule, iterations):
    consumed = 0
    for _ in range(iterations):
        consumed += schedule.at(consumed)
    assert schedule.consumed_after(iterations) == consumed


@settings(deadline=None)
@given(schedules, st.integers(0, 5000))
def test_iterations_for_is_the_smallest(schedule, samples):
    steps = schedule.iterations_for(samples)
    assert schedule.consumed_after(steps) >= samples
    assert steps == 0 or schedule.consumed_after(steps - 1) < samples


def test_known_ramp():
    # 16 -> 64 in three steps over 300 samples: 100 samples a level.
    schedule = BatchSchedule(64, Rampup(16, 16, 300), 2, 4)
    assert [schedule.at(consumed) for consumed in (0, 99, 100, 199, 200, 299, 300)] == [16, 16, 32, 32, 48, 48, 64]
    assert schedule.micro_batches(0) == 2 and schedule.micro_batches(300) == 8


def test_long_runs_are_instant():
    schedule = BatchSchedule(3072, Rampup(16, 16, 3_000_000_000), 1, 1)
    assert schedule.consumed_after(10**9) > 10**12


def test_without_rampup_the_batch_is_constant():
    assert BatchSchedule(8, None, 2, 2).at(10**9) == 8
    assert BatchSchedule(8, None, 2, 2).consumed_after(5) == 40


@pytest.mark.parametrize("text", ["16", "16 16", "a b c", "16 16 0", "0 16 100", "16 -1 100", "1 2 3 4", "1.5 2 3", ""])
def test_bad_rampup(text):
    with pytest.raises(ValueError, match="must be"):
        parse_rampup(text)


@pytest.mark.parametrize(("text", "steps"), [("0", 0), ("100", 100), ("1%", 10), ("0.15%", 2), ("100%", 1000), ("1_000", 1000), ("0%", 0)])
def test_warmup(text, steps):
    assert parse_warmup(text, 1000) == steps


@pytest.mark.parametrize("text", ["-1", "1.5", "5%%", "%", "ten", "", "-1%", "nan%"])
def test_bad_warmup(text):
    with pytest.raises(ValueError, match="must be"):
        parse_warmup(text, 1000)
