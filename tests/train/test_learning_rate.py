"""The learning-rate schedules and the clip factor, value by value, against their formulas."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from megactl.config.schema import Optimizer
from megactl.engine.optimizer import clip_factor, learning_rate

BASE = Optimizer(lr=1.0, min_lr=0.1, lr_decay_iterations=100)


def rates(warmup=0, last=100, **changes):
    """The learning rate of iterations 1 to `last`, at index iteration."""
    config = dataclasses.replace(BASE, **changes)
    return [None, *(learning_rate(config, warmup, iteration) for iteration in range(1, last + 1))]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warmup_is_linear_and_ends_at_the_peak(schedule):
    found = rates(warmup=10, lr_schedule=schedule, wsd_decay_iterations=20)
    assert found[1:11] == pytest.approx([iteration / 10 for iteration in range(1, 11)])
    assert found[11] <= 1.0


def test_without_warmup_the_first_update_is_near_the_peak():
    assert rates(lr_schedule="linear")[1] == pytest.approx(0.1 + 0.9 * 0.99)


def test_cosine():
    found = rates(warmup=20, lr_schedule="cosine")
    for iteration in range(21, 101):
        done = (iteration - 20) / 80
        assert found[iteration] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * done)))
    assert found[60] == pytest.approx(0.55) and found[100] == pytest.approx(0.1)


def test_linear():
    found = rates(warmup=20, lr_schedule="linear")
    assert found[60] == pytest.approx(0.55) and found[100] == pytest.approx(0.1)
    steps = [left - right for left, right in itertools.pairwise(found[21:])]
    assert steps == pytest.approx([0.9 / 80] * len(steps))


def test_constant():
    assert rates(warmup=5, lr_schedule="constant", lr_decay_iterations=None)[6:] == [1.0] * 95


def test_wsd_is_flat_then_linear():
    found = rates(warmup=10, lr_schedule="wsd", wsd_decay_iterations=20)
    assert found[11:81] == [1.0] * 70
    assert found[90] == pytest.approx(0.55) and found[100] == pytest.approx(0.1)


def test_wsd_decay_never_reaches_into_the_warmup():
    found = rates(warmup=90, lr_schedule="wsd", wsd_decay_iterations=50)
    assert found[90] == 1.0 and found[95] == pytest.approx(0.55)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_after_the_decay_it_stays_at_the_minimum(schedule):
    found = rates(last=150, lr_schedule=schedule, wsd_decay_iterations=10)
    assert found[100:] == pytest.approx([0.1] * 51)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_it_never_rises_after_the_warmup(schedule):
    found = rates(warmup=7, lr_schedule=schedule, wsd_decay_iterations=30)[7:]
    assert all(right <= left for left, right in itertools.pairwise(found))


def test_warmup_as_long_as_the_run():
    assert rates(warmup=100, lr_schedule="cosine")[100] == 1.0


def test_clip_factor():
    def factor(norm, limit):
        return clip_factor(torch.tensor(norm, dtype=torch.float64), limit).item()

    assert factor(0.5, 1.0) == 1.0 and factor(0.0, 1.0) == 1.0
    assert factor(4.0, 1.0) == pytest.approx(0.25, rel=1e-6)
    assert factor(4.0, 1.0) * 4.0 <= 1.0
    assert factor(1e9, 0.0) == 1.0 and factor(4.0, -1.0) == 1.0


def test_clip_factor_is_torch_s():
    gradient = torch.tensor([3.0, 4.0], dtype=torch.float64)
    mine = gradient * clip_factor(gradient.norm(), 2.0)
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    weight.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_([weight], 2.0)
    torch.testing.assert_close(mine, weight.grad, rtol=0, atol=0)


def test_a_norm_that_is_no_number_is_not_hidden():
    assert torch.isnan(clip_factor(torch.tensor(float("nan")), 1.0))
    assert clip_factor(torch.tensor(float("inf")), 1.0) == 0.0
