"""Every real log beside the repository: its runs, their numbers and their ends, by both scanners."""

from __future__ import annotations

import math
import statistics

import pytest

from megactl.report.logs.python_scanner import PythonScanner
from megactl.report.logs.reading import read_runs

# Mean seconds of all iterations, how many, what the last line holds: figures of the logs' own index and of the files.
RUNS = {
    "gpt2-meg/meg_gpt2_base_n4_dp1_tp4_pp4-1809579.out": ("megatron-lm", 20, 1.427, 7.365868, 16),
    "gpt2-meg/meg_gpt2_perf_n16.out": ("megatron-lm", 3, 137.80, None, 64),
    "gpt2-meg-ds-3d/meg_ds_3d_gpt2_perf_n16-ds-on.out": ("megatron-deepspeed", 49, 136.95, 7.747273, 64),
    "gpt2-meg-ds-3d/meg_ds_3d_gpt2_perf_n16-ds-off.out": ("megatron-deepspeed", 62, 126.88, 20.43871, 64),
    "gpt2-meg-ds-3d-old/meg_ds_3d_gpt2_perf_n16.out": ("megatron-deepspeed", 2, 147.84, 12.80042, 64),
    "gpt2-meg-ds-zero/meg_ds_zero_gpt2_perf_n16-1999616.out": ("megatron-deepspeed", 4, 127.27, 38.99556, 64),
}


@pytest.fixture
def one(shared):
    """The only run of a log."""

    def read(name):
        [run] = read_runs(shared / "logs" / name)
        return run

    return read


@pytest.mark.parametrize("name", RUNS)
def test_iterations_of_a_real_log(one, name):
    system, iterations, mean, loss, world = RUNS[name]
    run = one(name)
    assert (run.system, len(run.iterations), run.world_size) == (system, iterations, world)
    assert statistics.mean(run.iterations.seconds) == pytest.approx(mean, abs=0.01)
    last = run.iterations.loss[-1]
    assert math.isnan(last) if loss is None else last == loss
    assert run.warnings == []


def test_means_without_the_first_line_are_those_of_the_notes(one):
    base = one("gpt2-meg/meg_gpt2_base_n4_dp1_tp4_pp4-1809579.out").iterations
    assert statistics.mean(base.seconds[1:]) == pytest.approx(1.389, abs=0.001)
    assert math.isnan(base.loss[0]) and base.skipped[0] == 10 and base.loss_scale[0] == 8388608.0
    assert sum(base.interrupted) == 1  # the evaluation at iteration 100; the other one is behind the last line
    perf = one("gpt2-meg/meg_gpt2_perf_n16.out").iterations
    assert statistics.mean(perf.seconds[1:]) == pytest.approx(128.96, abs=0.01)


def test_memory_is_the_maximum_over_ranks(one):
    run = one("gpt2-meg/meg_gpt2_base_n4_dp1_tp4_pp4-1809579.out")
    assert run.memory.allocated == pytest.approx(26204.5595703125 / 1024, abs=1e-9) and run.memory.host is None
    zero = one("gpt2-meg-ds-zero/meg_ds_zero_gpt2_perf_n16-1999616.out")
    assert zero.memory.allocated == pytest.approx(26118.2294921875 / 1024) and zero.memory.host == 44.57


def test_parameters_are_exact_where_a_line_states_them(one):
    assert one("gpt2-meg-ds-3d-old/meg_ds_3d_gpt2_perf_n16.out").model_parameters == 52004716544
    assert one("gpt2-meg-ds-zero/meg_ds_zero_gpt2_perf_n16-1999616.out").model_parameters == 52_005_000_000
    summed = one("gpt2-meg/meg_gpt2_perf_n16.out")
    # The sum over ranks counts a tied embedding twice, so it does not pass for the model's size.
    assert summed.model_parameters is None and summed.summary["parameters_summed_over_ranks"] == 52419952640


def test_settings(one):
    found = one("gpt2-meg-ds-zero/meg_ds_zero_gpt2_perf_n16-1999616.out").arguments
    expected = {"tensor_model_parallel_size": "4", "batch_size": "48", "num_layers": "64", "nnodes": "16", "scattered_embeddings": "False",
                "zero_optimization.stage": "3", "apply_residual_connection_post_layernorm": "False"}  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    # The script of this run has a PP_SIZE that its command does not use.
    assert "pipeline_model_parallel_size" not in found
    # The misspelt key is kept as it was given; the effective value stands beside it.
    assert float(found["zero_optimization.stage3_param_persitence_threshold"]) == 81920


def test_evaluations_and_timers(one):
    run = one("gpt2-meg/meg_gpt2_base_n4_dp1_tp4_pp4-1809579.out")
    assert [(item.iteration, item.losses["lm loss"]) for item in run.evaluations] == [
        (100, pytest.approx(8.581882, abs=1)),
        (200, 7.487306),
    ]
    assert run.timers["load-checkpoint"].tolist() == [0.35] and len(run.timers["forward-compute"]) == 20
    zero = one("gpt2-meg-ds-zero/meg_ds_zero_gpt2_perf_n16-1999616.out")
    assert zero.summary["effective_tflops"] == pytest.approx((41.31 + 39.66 + 39.74 + 40.01) / 4)


def test_ends_have_their_line(one):
    ended = one("gpt2-meg-ds-zero/meg_ds_zero_gpt2_perf_n16-1999616.out")
    assert ended.evidence("time-limit").line == 6117 and "DUE TO TIME LIMIT" in ended.evidence("time-limit").text
    assert ended.event_counts["killed-subprocess"] > 64
    cancelled = one("gpt2-meg/meg_gpt2_base_n4_dp1_tp4_pp4-1809579.out")
    assert cancelled.evidence("cancelled").line == 1577 and cancelled.started_at == "2021-05-23T08:41:04"
    assert cancelled.ended_at == "2021-05-23T08:45:57"


def test_a_trainer_run_by_its_bar(one):
    run = one("gpt2-hf-ds/hf_ds_gpt2_base_n4-1832555.out")
    assert run.system == "hf-trainer" and run.iterations.iteration.tolist() == list(range(1, 17))
    assert statistics.mean(run.iterations.seconds) == pytest.approx(919 / 16)
    assert run.summary["train_samples_per_second"] == 1.088 and run.evidence("completed") is not None
    assert run.arguments["per_device_train_batch_size"] == "4" and run.arguments["n_positions"] == "1024"
    assert run.evidence("no-weights") is not None


def test_three_runs_in_one_file(shared):
    runs = read_runs(shared / "logs" / "gpt2-hf-ds/hf_ds_gpt2_perf_n16_bs4-mbs8.out")
    assert [run.arguments["train_micro_batch_size_per_gpu"] for run in runs] == ["32", "16", "8"]
    assert [sorted(run.event_counts) for run in runs[:2]] == [["killed-subprocess"]] * 2
    assert runs[2].summary["train_samples_per_second"] == 3.663 and runs[2].evidence("completed") is not None
    assert [run.first_line for run in runs[1:]] == [run.last_line + 1 for run in runs[:2]]


def test_both_scanners_make_the_same_runs(shared):
    paths = sorted((shared / "logs").glob("*/*.out"))
    assert len(paths) == 8
    for path in paths:
        # By their text: a missing number is NaN, which equals nothing.
        assert repr(read_runs(path)) == repr(read_runs(path, scanner=PythonScanner(1 << 16))), path.name
