"""fp16 as a user trains with it: what the log and the files say, resuming, other precisions' checkpoints, the end of a hopeless run."""

from __future__ import annotations

import re

import pytest
from train_harness import assert_same_tensors, checkpoint, header, losses, records, steps, summary, tensors

FP16 = ("--precision", "fp16")
# Overflows at first, finds a scale that fits, and doubles it every second step: every kind of move within ten iterations.
RESTLESS = (*FP16, "--initial-loss-scale", str(2**27), "--loss-scale-window", "2", "--loss-scale-hysteresis", "2", "--iterations", "14")
LAYOUTS = {
    "one": (),
    "tp2 pp2": ("--tp", "2", "--pp", "2"),
    "dp2 zero1": ("--dp", "2", "--zero", "1", "--bucket-size", "2000"),
}


def scales(run_dir) -> list[tuple[float, bool]]:
    return [(line["loss_scale"], line["skipped"]) for line in records(run_dir) if line.get("kind") is None]


# Iteration 5 lies among the overflows, 10 among the doublings.
BROKEN = [("one", 5), ("tp2 pp2", 5), ("dp2 zero1", 10)]
NIGHTLY = [("one", 10), ("tp2 pp2", 10), ("dp2 zero1", 5)]


@pytest.mark.parametrize(("name", "broken_at"), [*BROKEN, *(pytest.param(*case, marks=pytest.mark.nightly) for case in NIGHTLY)])
def test_a_resumed_run_equals_the_unbroken_one(train, tmp_path, name, broken_at):
    flags = (*RESTLESS, *LAYOUTS[name], "--save-interval", "5", "--keep-checkpoints", "0")
    train("whole", *flags).must(0)
    moves = scales(tmp_path / "whole")
    assert {skipped for _, skipped in moves} == {True, False} and len({scale for scale, _ in moves}) > 3
    train.copy("whole", "broken", only_step=broken_at)
    train("broken", *flags).must(0, "resuming from", f"at iteration {broken_at}")
    folder = tmp_path / "broken"
    assert scales(folder) == moves and losses(folder) == losses(tmp_path / "whole")
    assert_same_tensors(checkpoint(tmp_path / "whole", 14), checkpoint(folder, 14))
    assert header(folder, 14)["state"] == header(tmp_path / "whole", 14)["state"]


def test_the_scale_and_the_count_of_updates_in_a_checkpoint(train, tmp_path):
    train("run", *RESTLESS, "--save-interval", "1", "--keep-checkpoints", "0").must(0)
    moves, updates, good, left = scales(tmp_path / "run"), 0, 0, 2
    for step, (_, skipped) in enumerate(moves, start=1):
        state = header(tmp_path / "run", step)["state"]
        updates += not skipped
        assert state["adam_step"] == updates
        good = 0 if skipped else good + 1
        left = max(left - 1, 0) if skipped else left
        if good == 2:
            good, left = 0, 2
        assert (state["loss_scale"]["good_steps"], state["loss_scale"]["hysteresis"]) == (good, left)
        if step < len(moves):
            assert state["loss_scale"]["scale"] == moves[step][0]


def test_a_skipped_step_leaves_every_tensor_alone(train, tmp_path):
    train("run", *RESTLESS, "--save-interval", "1", "--keep-checkpoints", "0").must(0)
    # By then there are moments that a step could have changed.
    later = [step for step, (_, skipped) in enumerate(scales(tmp_path / "run"), start=1) if skipped and step > 8]
    assert later, scales(tmp_path / "run")
    for step in later:
        assert_same_tensors(checkpoint(tmp_path / "run", step - 1), checkpoint(tmp_path / "run", step))


def test_what_the_log_says(train, tmp_path):
    done = train("run", *FP16, "--initial-loss-scale", str(2**60), "--loss-scale-hysteresis", "1", "--iterations", "3").must(0)
    found = re.findall(r"loss scale: ([\d.]+) \| .*number of skipped iterations: +(\d+) \|", done.out)
    assert found == [(f"{2.0 ** (60 - step):.1f}", "1") for step in range(3)]
    assert "lm loss:" not in done.out, "a skipped iteration has no part in the loss"
    assert scales(tmp_path / "run") == [(2.0 ** (60 - step), True) for step in range(3)]
    assert all(line["grad_norm"] is None and line["loss"] > 0 for line in records(tmp_path / "run"))


def test_the_scale_that_a_run_starts_with(train, tmp_path):
    train("run", *FP16, "--iterations", "2").must(0)
    # 16 x global batch 4 x sequence length 16
    assert scales(tmp_path / "run") == [(1024.0, False)] * 2
    train("constant", *FP16, "--iterations", "2", "--loss-scale", "96").must(0)
    assert scales(tmp_path / "constant") == [(96.0, False)] * 2
    assert "loss_scale" not in header(tmp_path / "constant", 2)["state"]


def test_fp16_learns_what_fp32_learns(train, tmp_path):
    for precision in ("fp16", "fp32"):
        train(precision, "--precision", precision, "--iterations", "10", "--tp", "2").must(0)
    half, full = losses(tmp_path / "fp16"), losses(tmp_path / "fp32")
    assert half[-1][1] < half[0][1] - 0.1
    for (_, loss), (_, expected) in zip(half, full, strict=True):
        assert loss == pytest.approx(expected, rel=2e-3)
    kinds = {kind: {str(tensor.dtype) for (_, k), tensor in tensors(checkpoint(tmp_path / "fp16", 10)).items() if k == kind}
             for kind in ("weight", "master", "exp_avg", "exp_avg_sq")}  # fmt: skip
    full = {"torch.float32"}
    assert kinds == {"weight": {"torch.float16"}, "master": full, "exp_avg": full, "exp_avg_sq": full}


@pytest.mark.parametrize(("stored", "wanted"), [("fp32", "fp16"), ("bf16", "fp16"), ("fp16", "bf16"), ("fp16", "fp32")])
def test_other_precisions_read_each_others_checkpoints(train, tmp_path, stored, wanted):
    train("first", "--precision", stored, "--save-interval", "3", "--keep-checkpoints", "0").must(0)
    train("second", "--precision", wanted, "--load", checkpoint(tmp_path / "first", 3)).must(0, "at iteration 3")
    for (_, loss), (_, expected) in zip(losses(tmp_path / "second"), losses(tmp_path / "first")[3:], strict=True):
        assert loss == pytest.approx(expected, rel=0.01)
    assert header(tmp_path / "second", 6)["state"]["adam_step"] == 6.0
    assert ("loss_scale" in header(tmp_path / "second", 6)["state"]) == (wanted == "fp16")


@pytest.mark.parametrize(
    "flags",
    [
        (*FP16, "--loss-scale", "1e38"),
        (*FP16, "--initial-loss-scale", "1e38", "--min-loss-scale", "1e38", "--tp", "2", "--dp", "2"),
    ],
    ids=["constant", "at its minimum"],
)
def test_a_run_that_only_skips_ends_with_an_error(train, tmp_path, flags):
    done = train("run", *flags, "--iterations", "80", "--save-interval", "20", "--keep-checkpoints", "0")
    done.must(1, "iterations 1 to 50 were skipped one after another", "loss scale of 1e+38 does not fall any further", "--precision bf16")
    assert done.err.count("error:") == 1
    assert steps(tmp_path / "run") == [20, 40] and len(losses(tmp_path / "run")) == 50
    assert summary(tmp_path / "run")["status"] == "failed"
    assert header(tmp_path / "run", 40)["state"]["adam_step"] == 0.0
