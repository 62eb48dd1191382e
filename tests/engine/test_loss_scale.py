"""The loss scale against Megatron's rule written out step by step, its memory, and the end of a run that only skips."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.config.schema import Training
from megactl.engine.loss_scale import LossScale, SkipWatch
from megactl.errors import RunError

CPU = torch.device("cpu")
LIMIT = Training().max_skipped_iterations


def dynamic(initial: float = 1024.0, *, least: float = 1.0, window: int = 3, hysteresis: int = 2, precision: str = "fp16") -> Training:
    return Training(
        precision=precision, initial_loss_scale=initial, min_loss_scale=least, loss_scale_window=window, loss_scale_hysteresis=hysteresis
    )


def after(training: Training, pattern: str) -> list[float]:
    """The scale before each step and after the last; `x` in the pattern is an overflow."""
    made = LossScale(training, CPU)
    found = [made.scale.item()]
    for letter in pattern:
        made.update(torch.tensor(float(letter == "x"), dtype=torch.float64))
        found.append(made.scale.item())
    return found


def by_megatron(training: Training, pattern: str) -> list[float]:
    """megatron/core/optimizer/grad_scaler.py, DynamicGradScaler.update, in plain numbers."""
    scale, growth, hysteresis = training.initial_loss_scale, 0, training.loss_scale_hysteresis
    found = [scale]
    for letter in pattern:
        if letter == "x":
            growth = 0
            hysteresis -= 1
            if hysteresis <= 0:
                scale = max(scale * 0.5, training.min_loss_scale)
        else:
            growth += 1
            if growth == training.loss_scale_window:
                growth, hysteresis = 0, training.loss_scale_hysteresis
                scale = scale * 2.0
        found.append(scale)
    return found


@settings(deadline=None)
@given(st.text("x.", max_size=60), st.integers(1, 5), st.integers(1, 4), st.sampled_from([0.25, 1.0, 64.0]))
def test_the_scale_moves_by_megatrons_rule(pattern, window, hysteresis, least):
    training = dynamic(window=window, hysteresis=hysteresis, least=least)
    assert after(training, pattern) == by_megatron(training, pattern)


@pytest.mark.parametrize(
    ("pattern", "scales"),
    [
        ("...", [1024, 1024, 1024, 2048]),
        ("x", [1024, 1024]),
        # The second overflow halves, and so does each further one until a doubling has restored the hysteresis.
        ("xx.x", [1024, 1024, 512, 512, 256]),
        ("xx...x", [1024, 1024, 512, 512, 512, 1024, 1024]),
        # An overflow begins the count of good steps anew, whether it halves or not.
        ("..x..", [1024] * 6),
    ],
)
def test_the_rule_in_examples(pattern, scales):
    assert after(dynamic(), pattern) == scales


def test_the_scale_stays_at_its_minimum():
    assert after(dynamic(8.0, least=3.0, hysteresis=1), "xxxx") == [8, 4, 3, 3, 3]


def test_a_constant_scale_and_none_do_not_move():
    assert after(Training(precision="fp16", loss_scale=4096.0), "x....x") == [4096.0] * 7
    assert after(Training(precision="bf16"), "x....x") == [1.0] * 7
    for training in (Training(precision="fp16", loss_scale=4096.0), Training()):
        made = LossScale(training, CPU)
        assert made.state() is None
        made.restore({"scale": 2.0, "good_steps": 1, "hysteresis": 1})
        assert made.scale.item() == (training.loss_scale or 1.0)


def test_scaling_and_unscaling_cancel():
    made = LossScale(dynamic(2.0**20), CPU)
    value = torch.rand(100, dtype=torch.float64)
    assert torch.equal(made.scaled(value), value * 2.0**20)
    assert torch.equal(made.unscaled(made.scaled(value)), value)


@settings(deadline=None)
@given(st.text("x.", max_size=20), st.text("x.", max_size=20))
def test_a_restored_scale_goes_on_as_the_unbroken_one(before, rest):
    whole, first, second = (LossScale(dynamic(), CPU) for _ in range(3))
    for letter in before:
        for made in (whole, first):
            made.update(torch.tensor(float(letter == "x")))
    second.restore(first.state())
    assert second.state() == whole.state()
    for letter in rest:
        for made in (whole, second):
            made.update(torch.tensor(float(letter == "x")))
    assert second.state() == whole.state()


def test_new_settings_bound_a_restored_scale():
    made = LossScale(dynamic(least=32.0, hysteresis=1), CPU)
    made.restore({"scale": 4.0, "good_steps": 2, "hysteresis": 2})
    assert made.state() == {"scale": 32.0, "good_steps": 2, "hysteresis": 1}
    made = LossScale(dynamic(), CPU)
    made.restore(None)
    assert made.scale.item() == 1024.0


def test_a_run_ends_when_the_scale_is_as_small_as_it_may_be():
    watch = SkipWatch(dynamic(least=2.0))
    for iteration in range(1, 200):
        watch.see(iteration, skipped=True, loss_scale=4.0)
    for iteration in range(200, 199 + LIMIT):
        watch.see(iteration, skipped=True, loss_scale=2.0)
    with pytest.raises(RunError, match=r"iterations 200 to 249 were skipped.* loss scale of 2 does not fall any further") as error:
        watch.see(249, skipped=True, loss_scale=2.0)
    assert "--precision bf16" in str(error.value.hint)


def test_the_number_of_skipped_steps_is_a_setting():
    few, never = (SkipWatch(Training(max_skipped_iterations=number)) for number in (3, 0))
    for iteration in (1, 2):
        few.see(iteration, skipped=True, loss_scale=1.0)
    with pytest.raises(RunError, match=r"iterations 1 to 3 were skipped"):
        few.see(3, skipped=True, loss_scale=1.0)
    for iteration in range(1, 1000):
        never.see(iteration, skipped=True, loss_scale=1.0)


def test_one_step_that_counts_is_enough_to_go_on():
    watch = SkipWatch(dynamic(least=2.0))
    for iteration in range(1, 500):
        watch.see(iteration, skipped=iteration % LIMIT != 0, loss_scale=2.0)


@pytest.mark.parametrize("training", [Training(precision="fp16", loss_scale=4096.0), Training(precision="bf16"), Training()])
def test_without_a_scale_that_falls_every_skipped_step_counts(training):
    watch, scale = SkipWatch(training), training.loss_scale or 1.0
    for iteration in range(1, LIMIT):
        watch.see(iteration, skipped=True, loss_scale=scale)
    with pytest.raises(RunError, match="iterations 1 to 50 were skipped") as error:
        watch.see(LIMIT, skipped=True, loss_scale=scale)
    assert ("loss scale" in str(error.value)) == (training.precision == "fp16")
