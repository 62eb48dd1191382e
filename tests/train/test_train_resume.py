"""A run that was stopped and continued is, bit for bit, the run that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_harness import TINY, assert_same_tensors, checkpoint, header, losses, steps

TP_PP = ("--tp", "2", "--pp", "2")
DP = ("--dp", "2")
CASES = {
    "tp2 pp2": TP_PP,
    "dp2 zero1": (*DP, "--zero", "1"),
    "dp2 zero0": (*DP, "--zero", "0"),
    "dp2 zero1 bf16": (*DP, "--zero", "1", "--precision", "bf16"),
    "dropout": (*DP, "--hidden-dropout", "0.1", "--attention-dropout", "0.1"),
    "sdpa dropout": ("--attention", "sdpa", "--attention-dropout", "0.1"),
    "ramp-up": (*DP, "--rampup-batch-size", "2 2 12"),
    "evaluation": (*DP, "--eval-interval", "2", "--eval-iterations", "2"),
    "small buckets": (*DP, "--zero", "1", "--bucket-size", "2000"),
}


# What these add to the others is not worth their time in every run of the tests.
NIGHTLY = ("dp2 zero1", "dp2 zero0", "sdpa dropout", "evaluation")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.nightly) if name in NIGHTLY else name for name in CASES])
def test_a_resumed_run_equals_the_unbroken_one(train, tmp_path, name):
    flags = (*CASES[name], "--save-interval", "3", "--keep-checkpoints", "0")
    train("whole", *flags).must(0)
    train.copy("whole", "broken", only_step=3)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    train("broken", *flags).must(0, "resuming from", "at iteration 3")
    assert_same(tmp_path)


def assert_same(folder: Path, final: int = 6) -> None:
    whole, broken = folder / "whole", folder / "broken"
    assert [iteration for iteration, _ in losses(whole)] == list(range(1, final + 1))
    assert losses(broken) == losses(whole)
    assert_same_tensors(checkpoint(whole, final), checkpoint(broken, final))
    left, right = header(whole, final), header(broken, final)
    for key in ("step", "consumed_samples", "state", "layout", "model"):
        assert left[key] == right[key]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.nightly)])
def test_a_stopped_run_equals_the_unbroken_one(train, tmp_path, precision):
    # Stopped for real: the time limit is over before the first step, so that every attempt makes one step and saves.
    flags = (*DP, "--precision", precision, "--iterations", "4")
    train("whole", *flags).must(0)
    for attempt in range(1, 5):
        limit = () if attempt == 4 else ("--exit-duration", "0.00001")
        train("broken", *flags, *limit).must(0 if attempt == 4 else 75)
    assert_same(tmp_path, final=4)


def test_real_data_with_document_masks(train, tmp_path):
    text = Path(__file__).read_text()
    lines = [part for part in text.split("\n\n") if part.strip()]
    folder = tmp_path / "text"
    folder.mkdir()
    for number, part in enumerate(lines * 3):
        (folder / f"{number:03d}.txt").write_text(part)
    done = train.command("data", "preprocess", str(folder), "--output-prefix", str(tmp_path / "c"), "--tokenizer", "byte", "--append-eod")
    assert done.code == 0, done.err
    base = tuple(word for word in TINY if word != "--mock-data")
    base = tuple(word for index, word in enumerate(base) if word != "--vocab" and (index == 0 or base[index - 1] != "--vocab"))
    flags = (
        *DP, "--data", str(tmp_path / "c"), "--split", "80,20,0", "--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss",
        "--save-interval", "3", "--keep-checkpoints", "0", "--eval-interval", "3", "--eval-iterations", "1", "--seq-length", "128",
    )  # fmt: skip
    train("whole", *flags, base=base).must(0)
    train.copy("whole", "broken", only_step=3)
    train("broken", *flags, base=base).must(0, "at iteration 3")
    assert_same(tmp_path)
    assert steps(tmp_path / "broken") == [3, 6]
