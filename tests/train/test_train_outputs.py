"""What a run writes and prints: files, keys, the console line, evaluations, loggers; and that it learns."""

from __future__ import annotations

import json
import math
import re

import pytest
from train_harness import assert_same_tensors, checkpoint, evaluations, losses, records, summary, wait_for

SUMMARY_KEYS = {
    "status", "iterations", "final_loss", "median_s_per_iteration", "tokens_per_s", "model_tflops_per_gpu", "mfu", "peak_memory_gb",
    "peak_memory_gb_by_rank", "world_size", "layout",
}  # fmt: skip
METRIC_KEYS = {
    "iteration", "consumed_samples", "loss", "learning_rate", "global_batch_size", "grad_norm", "seconds", "tokens_per_s",
    "model_tflops_per_gpu", "mfu", "skipped", "loss_scale", "time",
}  # fmt: skip


def test_files_of_a_run(train, tmp_path):
    done = train("run", "--dp", "2", "--eval-interval", "3", "--eval-iterations", "1").must(0)
    folder = tmp_path / "run"
    found = {path.name for path in folder.iterdir()}
    assert {"config.toml", "environment.json", "metrics.jsonl", "summary.json", "logs", "checkpoints"} <= found
    result = summary(folder)
    assert set(result) == SUMMARY_KEYS
    assert (result["status"], result["iterations"], result["world_size"]) == ("completed", 6, 2)
    assert len(result["peak_memory_gb_by_rank"]) == 2 and result["peak_memory_gb"] == max(result["peak_memory_gb_by_rank"]) > 0
    assert result["layout"]["dp"] == 2
    lines = records(folder)
    steps, evals = [line for line in lines if "kind" not in line], [line for line in lines if line.get("kind") == "eval"]
    assert all(set(line) == METRIC_KEYS for line in steps)
    assert [line["iteration"] for line in evals] == [3, 6]
    assert [line["consumed_samples"] for line in steps] == [4, 8, 12, 16, 20, 24]
    assert result["final_loss"] == pytest.approx(steps[-1]["loss"], rel=0.2)
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step-00000006"
    assert json.loads((folder / "environment.json").read_text())["torch"]
    line = re.compile(
        r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration +\d+/ +6 \| consumed samples: +\d+ \| elapsed time per iteration \(ms\): [\d.]+ \| "
        r".*learning rate: \d\.\d+E[+-]\d\d \| global batch size: +4 \| lm loss: \d\.\d+E[+-]\d\d \| loss scale: 1\.0 \| "
        r"grad norm: [\d.]+ \| number of skipped iterations: +0 \| number of nan iterations: +0 \|"
    )
    assert len([text for text in done.out.splitlines() if line.match(text)]) == 6


def test_each_iteration_is_charged_its_own_time(train, tmp_path):
    train("run", "--iterations", "20").must(0)
    seconds = [line["seconds"] for line in records(tmp_path / "run")]
    # Read one step late, the last iteration would take no time at all and the first one two iterations'.
    assert seconds[-1] > 0.2 * sorted(seconds)[len(seconds) // 2]


def test_log_interval(train, tmp_path):
    done = train("run", "--log-interval", "4", "--iterations", "10").must(0)
    printed = [int(number) for number in re.findall(r"iteration +(\d+)/", done.out)]
    assert printed == [1, 4, 8, 10]
    # Settings stand in the log itself: it is read without its run directory.
    assert "- arguments -" in done.err and re.search(r"^  hidden_size \.+ [0-9]+$", done.err, re.M)
    assert [iteration for iteration, _ in losses(tmp_path / "run")] == list(range(1, 11))


def test_config_toml_gives_the_same_run_again(train, tmp_path):
    flags = ("--tp", "2", "--dp", "2", "--hidden-dropout", "0.1", "--rampup-batch-size", "2 2 8", "--set", "optimizer.beta2=0.9")
    train("first", *flags).must(0)
    train("second", "--config", tmp_path / "first" / "config.toml", base=()).must(0)
    assert_same_tensors(checkpoint(tmp_path / "first", 6), checkpoint(tmp_path / "second", 6))
    assert losses(tmp_path / "first") == losses(tmp_path / "second")


@pytest.mark.nightly
def test_the_same_command_gives_the_same_bits(train, tmp_path):
    for name in ("first", "second"):
        train(name, "--dp", "2", "--tp", "2").must(0)
    assert_same_tensors(checkpoint(tmp_path / "first", 6), checkpoint(tmp_path / "second", 6))


def test_another_seed_gives_another_run(train, tmp_path):
    train("first").must(0)
    train("second", "--seed", "7").must(0)
    assert losses(tmp_path / "first") != losses(tmp_path / "second")


def test_dry_run_runs_nothing(train, tmp_path):
    done = train("run", "--tp", "2", "--pp", "2", "--dry-run").must(0)
    assert "4 = tp 2 x cp 1 x dp 1 x pp 2" in done.out and "memory" in done.out
    assert not (tmp_path / "run").exists()
    document = json.loads(train("run", "--tp", "2", "--pp", "2", "--dry-run", "--json").must(0).out)
    assert document["world_size"] == 4 and document["layout"]["pp"] == 2


def test_json_is_one_document(train, tmp_path):
    done = train("run", "--dp", "2", "--json").must(0)
    document = json.loads(done.out)
    assert set(document) == SUMMARY_KEYS | {"exit_code", "run_dir"}
    assert document["exit_code"] == 0 and document["run_dir"] == str(tmp_path / "run")
    assert done.err.count("consumed samples") == 6


def test_json_of_a_failure(train):
    done = train("run", "--json", "--resume", "must")
    assert done.code == 2
    document = json.loads(done.out)
    assert document["exit_code"] == 2 and document["status"] == "failed" and "--resume must" in document["error"]


def test_evaluation_does_not_depend_on_dropout_or_chance(train, tmp_path):
    flags = ("--eval-interval", "1", "--eval-iterations", "2", "--lr", "1e-12", "--warmup", "0")
    train("dropout", *flags, "--hidden-dropout", "0.2", "--dp", "2").must(0)
    train("plain", *flags).must(0)
    points = [loss for _, loss in evaluations(tmp_path / "dropout")]
    # The weights hardly move at this learning rate, so every evaluation sees the same model and the same samples.
    assert len(points) == 6 and points == pytest.approx([points[0]] * 6, rel=1e-6)
    assert points == pytest.approx([loss for _, loss in evaluations(tmp_path / "plain")], rel=1e-6)
    trained = [loss for _, loss in losses(tmp_path / "dropout")]
    assert trained != pytest.approx([loss for _, loss in losses(tmp_path / "plain")], rel=1e-5)


def test_evaluation_is_the_same_at_every_layout(train, tmp_path):
    flags = ("--eval-interval", "3", "--eval-iterations", "2", "--precision", "fp64")
    train("one", *flags).must(0)
    train("four", *flags, "--tp", "2", "--pp", "2").must(0)
    for (_, left), (_, right) in zip(evaluations(tmp_path / "one"), evaluations(tmp_path / "four"), strict=True):
        assert left == pytest.approx(right, rel=1e-9)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.nightly)])
def test_the_loss_falls(train, tmp_path, precision):
    """Mock data is a walk with a fixed stride, interrupted once in eight tokens: far easier than chance, ln 64 = 4.16."""
    train(
        "run", "--iterations", "120", "--global-batch-size", "8", "--micro-batch-size", "8", "--seq-length", "32", "--log-interval", "60",
        "--precision", precision,
    ).must(0)  # fmt: skip
    found = [loss for _, loss in losses(tmp_path / "run")]
    assert found[0] == pytest.approx(math.log(64), rel=0.05)
    assert sum(found[-10:]) / 10 < 2.0


def test_tensorboard(train, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train("run", "--tensorboard-dir", tmp_path / "events", "--eval-interval", "3", "--eval-iterations", "1").must(0)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    expected = dict(losses(tmp_path / "run"))
    found = events.Scalars("lm loss")
    assert [event.step for event in found] == list(expected)
    assert [event.value for event in found] == pytest.approx(list(expected.values()), rel=1e-6)


def test_a_full_metrics_file_system_ends_the_run(train, tmp_path):
    command = train.begin("run", "--iterations", "100000", file_limit=12_000)
    wait_for(lambda: not command.alive())
    command.wait().must(1, "metrics.jsonl: cannot be written", "the same command again continues the run")
