"""Runs with optimizer and parameters in host memory, typed as a user does: the same numbers, and checkpoints for a run without."""

from __future__ import annotations

import pytest
from train_harness import assert_same_tensors, checkpoint, losses

KEEP = ("--save-interval", "3", "--keep-checkpoints", "0")
DP, THREE = ("--dp", "2"), ("--zero", "3", "--persistence-threshold", "200")
OPTIMIZER, BOTH = ("--offload", "optimizer"), (*THREE, "--offload", "optimizer,parameters")
PARAMETERS = (*THREE, "--offload", "parameters")
CASES = [
    # The same stage on both sides: with another one gradients are added in another order. One rank has stage 3 with parameters alone.
    (DP, (), OPTIMIZER, "bf16"),
    ((), PARAMETERS, BOTH, "fp32"),
    pytest.param(DP, THREE, BOTH, "fp16", marks=pytest.mark.nightly),
    pytest.param((*DP, "--pp", "2"), THREE, PARAMETERS, "bf16", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("layout", "plain", "offload", "precision"), CASES)
def test_a_run_may_go_on_with_its_state_elsewhere(train, tmp_path, layout, plain, offload, precision):
    flags = (*layout, *KEEP, "--precision", precision, "--clip-grad", "0", "--hidden-dropout", "0.1", "--bucket-size", "2000")
    train("whole", *flags, *plain).must(0)
    train("offloaded", *flags, *offload).must(0)
    assert losses(tmp_path / "offloaded") == losses(tmp_path / "whole")
    assert_same_tensors(checkpoint(tmp_path / "whole", 6), checkpoint(tmp_path / "offloaded", 6))
    for name, options in (("whole", offload), ("offloaded", plain)):
        train.copy(name, f"{name}-moved", only_step=3)
        train(f"{name}-moved", *flags, *options).must(0, "resuming from", "at iteration 3")
        assert losses(tmp_path / f"{name}-moved") == losses(tmp_path / "whole")


def test_a_dry_run_counts_the_ranks_of_this_machine(train):
    done = train("plan", "--dp", "2", "--offload", "optimizer", "--dry-run").must(0)
    (line,) = [line for line in done.out.splitlines() if line.startswith("host memory:")]
    assert "a rank, predicted;" in line and "for the 2 ranks on this machine, which can give" in line
