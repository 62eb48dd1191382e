"""Runs out of text: settings, ends and figures of each system, and where one run of a file ends and the next begins."""

from __future__ import annotations

import json
import math

import pytest
from log_samples import ERAS, TAIL

from megactl.config.load import load
from megactl.config.settings import replace
from megactl.config.shown import arguments_block
from megactl.costmodel.parameters import total_parameters
from megactl.report.logs.arguments import dump_row, overrides, shell_settings, sizes, unprefixed
from megactl.report.logs.events import classify
from megactl.report.logs.layout import switch
from megactl.report.logs.reading import read_runs
from megactl.report.logs.rows import Given, row_of


@pytest.fixture
def runs(tmp_path):
    """The runs in a text."""

    def read(text):
        path = tmp_path / "x.out"
        path.write_text(text)
        return read_runs(path)

    return read


@pytest.fixture
def one(runs):
    def read(text):
        [run] = runs(text)
        return run

    return read


def line(number, loss=5.0):
    return f" iteration {number:8d}/     100 | elapsed time per iteration (ms): 100.0 | lm loss: {loss} | {TAIL}\n"


def block(**arguments):
    rows = "".join(f"  {name + ' ':.<48} {value}\n" for name, value in arguments.items())
    return (
        f"------------------------ arguments ------------------------\n{rows}-------------------- end of arguments ---------------------\n"
    )


LONG = "apply_residual_connection_post_layernorm_and_more"


@pytest.mark.parametrize("prefix", ["", "0: ", "[default0]:", "[rank0]: ", "worker-1: "])
def test_an_argument_dump_behind_a_prefix(one, prefix):
    text = block(num_layers=4, lr="0.0001", data_path="['a b', 'c']", load=None) + f"  {LONG}  False\n"
    text = text.replace("  load", f"  {LONG}  False\n  load")
    run = one("".join(f"{prefix}{row}\n" for row in text.splitlines()))
    assert run.arguments == {"num_layers": "4", "lr": "0.0001", "data_path": "['a b', 'c']", "load": "None", LONG: "False"}
    assert run.system == "megatron-lm"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("using world size: 64 and model-parallel size: 4", {"world_size": "64", "tensor_model_parallel_size": "4"}),
        (
            "using world size: 64, data-parallel size: 8, context-parallel size: 2, hierarchical context-parallel sizes: None, "
            "tensor-model-parallel size: 4, pipeline-model-parallel size: 1",
            {"world_size": "64", "data_parallel_size": "8", "context_parallel_size": "2", "tensor_model_parallel_size": "4",
             "pipeline_model_parallel_size": "1"},
        ),
    ],
)  # fmt: skip
def test_degrees_of_each_era(one, text, expected):
    assert dict(sizes(text)) == expected
    assert one(text + "\n").world_size == 64


def test_what_a_shell_traced(one):
    text = "+ NNODES=4\n++ export GPUS_PER_NODE=8\n+ PP_SIZE=16\n"
    text += "+ CMD='pretrain.py     --num-layers 40     --micro-batch-size 1     --fp16 --lr=1e-4 '\n"
    assert one(text).arguments == {
        "nnodes": "4", "gpus_per_node": "8", "num_layers": "40", "micro_batch_size": "1", "fp16": "True", "lr": "1e-4",
    }  # fmt: skip
    assert dict(shell_settings("python x.py --num-layers 2 --config_overrides n_embd=8,n_head=2"))["n_embd"] == "8"
    assert dict(overrides("a=1,b,c=2")) == {"a": "1", "c": "2"}


def test_the_dump_rules_the_trace_wherever_it_stands(one):
    run = one(block(num_layers=4) + "+ x --num-layers 8 --hidden-size 16\n" + line(1))
    assert (run.arguments["num_layers"], run.arguments["hidden_size"]) == ("4", "16")


DEEPSPEED_JSON = {
    "train_batch_size": 64,
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5e8},
    "bf16": {"enabled": True},
}


def test_deepspeeds_configuration(one):
    dump = json.dumps(DEEPSPEED_JSON, indent=4).splitlines()
    text = "[2021-05-26 04:38:20,032] [INFO] [logging.py:60:log_dist] [Rank 0] DeepSpeed info: version=0.3.17, git-hash=x\n"
    text += "[2021-05-26 04:38:20,032] [INFO] [config.py:752:print]   zero_enabled ................. True\n"
    text += "[2021-05-26 04:38:20,033] [INFO] [config.py:759:print]   json = {\n" + "\n".join(dump[1:]) + "\nafterwards\n"
    run = one(text)
    assert run.system == "deepspeed" and run.started_at == "2021-05-26T04:38:20"
    expected = {"zero_enabled": "True", "train_batch_size": "64", "zero_optimization.stage": "3", "bf16.enabled": "true",
                "zero_optimization.offload_optimizer.device": "cpu"}  # fmt: skip
    assert {name: run.arguments[name] for name in expected} == expected
    assert float(run.arguments["zero_optimization.reduce_bucket_size"]) == 5e8


@pytest.mark.parametrize("damage", ["{{{", "}}}}", '"a": ,', "", "x" * 500])
def test_a_damaged_configuration_is_passed_over(one, damage):
    run = one(f"[config.py:759:print]   json = {{\n{damage}\n}}\n{line(1)}")
    assert len(run.iterations) == 1 and "a" not in run.arguments


def test_deepspeeds_own_steps(one):
    text = "".join(
        f"[2021-05-27 21:{minute:02d}:10,500] [INFO] [logging.py:60:log_dist] [Rank 0] step={minute * 10}, skipped={minute}, "
        f"lr=[[0.0001], [0.0002]], mom=[(0.9, 0.999)]\n"
        f"[2021-05-27 21:{minute:02d}:10,501] [INFO] [timer.py:1:stop] epoch=0/micro_step=40/global_step={minute * 10}, "
        "RunningAvgSamplesPerSec=25.02, CurrSamplesPerSec=25.70, MemAllocated=4.32GB, MaxMemAllocated=38.49GB\n"
        for minute in range(1, 4)
    )
    run = one(text)
    rows = run.iterations
    assert run.system == "deepspeed" and rows.iteration.tolist() == [10, 20, 30]
    assert math.isnan(rows.seconds[0]) and rows.seconds[1:].tolist() == [6.0, 6.0]
    assert rows.samples_per_second.tolist() == [25.7] * 3 and rows.skipped.tolist() == [1.0, 1.0, 1.0]
    assert rows.learning_rate[0] == 0.0001 and run.memory.allocated == 38.49


def test_the_pipeline_engines_steps_count_only_alone(one):
    steps = "steps: 1 loss: 8.1234 iter time (s): 136.100 samples/sec: 7.524\n"
    steps += "steps: 2 loss: 8.0 mtp: 1.0 iter time (s): 135.0 samples/sec: 7.5\n"
    rows = one(steps).iterations
    assert rows.seconds.tolist() == [136.1, 135.0] and rows.loss.tolist() == [8.1234, 8.0]
    both = one(steps + line(1))
    assert len(both.iterations) == 1 and both.iterations.loss[0] == 5.0


def test_deepspeeds_memory_and_switches(one):
    run = one(
        "MA 2.34 GB         Max_MA 3.81 GB         CA 5.4 GB         Max_CA 5 GB \nMA 2.0 GB  Max_MA 2.0 GB  CA 5.0 GB  Max_CA 7 GB \n"
        "[utils.py:597:see_memory_usage] CPU Virtual Memory:  used = 40.02 GB, percent = 21.4%\n"
        "----Partition Activations True, CPU CHECKPOINTING False\n----contiguous Memory Checkpointing True with 64 total layers\n"
        "Checkpoint Save GB: 18.2, GB/Sec: 5.3, Latency(second): 3.434\n"
    )
    assert (run.memory.allocated, run.memory.reserved, run.memory.host) == (3.81, 7.0, 40.02)
    assert run.arguments == {"partition_activations": "True", "checkpoint_in_cpu": "False", "contiguous_checkpointing": "True"}
    assert run.summary == {"checkpoint_gb": 18.2, "checkpoint_gb_per_s": 5.3}


def bar(step, total, elapsed, rate="1.00s/it", shown="#"):
    return f"\r{100 * step // total:3d}%|{shown}         | {step}/{total} [{elapsed}<01:00, {rate}]"


def test_a_bars_clock_gives_the_time_of_steps(one):
    text = bar(0, 100, "00:00", "?it/s") + "".join(bar(step, 100, f"00:{step // 2:02d}", "2.00it/s") for step in range(1, 101))
    text += bar(1, 7, "00:01") + bar(7, 7, "00:09") + "\n" + "".join(bar(step, 100, f"00:{step // 2:02d}") for step in range(1, 101))
    rows = one("***** Running training *****\n  Total optimization steps = 100\n" + text + "\n").iterations
    assert rows.iteration.tolist() == [20, 40, 60, 80, 100] and rows.seconds.tolist() == [0.5] * 5


def test_a_short_bar_is_taken_at_its_rate(one):
    rows = one("***** Running training *****\n" + bar(0, 4, "00:00", "?it/s") + bar(4, 4, "00:01", "3.20it/s") + "\n").iterations
    assert rows.seconds.tolist() == [1 / 3.2]


def test_a_trainers_dictionaries_count_once_for_all_nodes(one):
    first, second = (
        "{'loss': 1.5, 'grad_norm': 0.5, 'learning_rate': 1e-06, 'epoch': 0.01}",
        "{'loss': nan, 'learning_rate': '2e-06', 'epoch': 0.02}",
    )
    end = "{'train_runtime': '919.0', 'train_samples_per_second': 1.088, 'train_loss': 8.1, 'epoch': 1.0}"
    text = "Training/evaluation parameters TrainingArguments(\n_n_gpu=1,\nlogging_steps=10,\nfsdp_config={'a': (1, 2)},\n)\n"
    text += f"{first}\n{first}\n{second}\n"
    run = one(text + "{'eval_loss': 1.87, 'eval_runtime': 14.4, 'epoch': 0.02}\n" + f"{end}\n{end}\n")
    assert run.iterations.iteration.tolist() == [10, 20]
    assert run.iterations.loss[0] == 1.5 and math.isnan(run.iterations.loss[1]) and run.iterations.learning_rate[1] == 2e-06
    assert run.evaluations[0].losses == {"loss": 1.87} and run.summary["train_runtime"] == 919.0
    assert run.arguments["fsdp_config"] == "{'a': (1, 2)}" and run.system == "hf-trainer"


def test_trainer_metrics_and_batches(one):
    text = (
        "[INFO|trainer.py:1143] 2021-05-25 06:30:55,249 >>   Total train batch size (w. parallel, distributed & accumulation) = 256\n"
        "[INFO|trainer.py:1143] 2021-05-25 06:30:55,249 >>   Gradient Accumulation steps = 2\n"
        "[INFO|trainer.py:1143] 2021-05-25 06:30:55,249 >>   Number of trainable parameters = 124,439,808\n"
        "[INFO|x.py:907] 2021-05-25 06:53:45,862 >> ***** train metrics *****\n"
        "[INFO|x.py:912] 2021-05-25 06:53:45,862 >>   train_runtime            = 0:15:19.02\n"
        "[INFO|x.py:912] 2021-05-25 06:53:45,862 >>   train_samples_per_second =      1.088\n"
    )
    run = one(text)
    assert run.arguments == {"train_batch_size": "256", "gradient_accumulation_steps": "2"} and run.model_parameters == 124439808
    assert run.summary == {"train_samples_per_second": 1.088} and run.evidence("completed").line == 4


def test_a_console_of_megactl_says_what_its_run_directory_says(tmp_path):
    """The arguments block that train prints into a log has what a table and a figure need."""
    settings = ("parallel.virtual_pipeline=2", "parallel.pipeline_parallel=2", "memory.recompute=full", "parallel.scatter_gather=false")
    run = load(preset=None, config=None, assignments=settings, flags={}, environ={}).run
    run = replace(run, {"model.vocab_size": 256, "model.max_positions": 64, "training.seq_length": 64, "training.global_batch_size": 4})
    (tmp_path / "x.out").write_text("\n".join([*arguments_block(run, 2), ERAS["megactl"][0], ""]))
    (row,) = (row_of(found, Given()) for found in read_runs(tmp_path / "x.out"))
    values = row.values
    assert (values["system"], values["gpus"], values["pp"], values["vpp"], values["dp"]) == ("megactl", 2, 2, 2, 1)
    assert (values["recompute"], values["sp"], values["offload"], values["seq"]) == ("full", False, "none", 64)
    assert values["model_b"] == total_parameters(run.model, seq_length=64) / 1e9 and values["exact"]["hfu_tflops"] > 0
    assert switch(row.source.arguments, "scatter_gather") is False


def test_megactls_own_logs(one):
    console = one(ERAS["megactl"][0] + "\nsaved runs/x/checkpoints/step-00000006 in 0.2 s\n")
    assert console.system == "megactl" and console.timers["save-checkpoint"].tolist() == [200.0]
    assert console.started_at == "2026-11-21T08:14:03"
    records = [
        {
            "iteration": 1,
            "consumed_samples": 4,
            "loss": 5.5,
            "seconds": 0.25,
            "global_batch_size": 4,
            "skipped": False,
            "time": 1795248843.357,
        },
        {"kind": "eval", "iteration": 1, "name": "validation", "loss": 5.4},
        {"iteration": 2, "consumed_samples": 8, "loss": None, "nan": True, "seconds": 0.5, "skipped": True, "time": 1795248844.0},
        {"iteration": 3, "consumed_samples": 12, "loss": 5.0, "lm_loss": 4.0, "sentence_loss": 1.0, "seconds": 0.5},
    ]
    run = one("".join(json.dumps(record) + "\n" for record in records) + '{"iteration": 4, "consumed_samples": 16, "lo')
    rows = run.iterations
    assert run.system == "megactl" and rows.iteration.tolist() == [1, 2, 3] and rows.seconds.tolist() == [0.25, 0.5, 0.5]
    assert (rows.nan.tolist(), rows.skipped.tolist()) == ([0.0, 1.0, 0.0], [0.0, 1.0, 0.0])
    assert rows.losses["lm loss"][0] == 5.5 and rows.losses["lm loss"][2] == 4.0 and rows.losses["sop loss"][2] == 1.0
    assert run.evaluations[0].iteration == 1 and run.started_at == "2026-11-21T08:14:03"


@pytest.mark.parametrize(
    ("text", "name", "iteration", "losses"),
    [
        (" validation loss at iteration 1000 | lm loss value: 7.0E+00 | lm loss PPL: 1.1E+03 | ", "validation", 1000, {"lm loss": 7.0}),
        (" validation loss at the end of training for test data | lm loss value: 7.0 | lm loss PPL: 1.1 |", "test", None, {"lm loss": 7.0}),
        (" validation loss at the end of training for val data | lm loss value: 7.0 |", "validation", None, {"lm loss": 7.0}),
        ("validation loss at iteration 9 on test set | lm loss value: 7 | sop loss value: 0.5", "test", 9, {"lm loss": 7, "sop loss": 0.5}),
        (" validation-wiki loss at iteration 10 on validation set | lm loss value: 7.0 |", "validation", 10, {"lm loss": 7.0}),
    ],
)  # fmt: skip
def test_evaluations_of_each_era(one, text, name, iteration, losses):
    [found] = one(text + "\n").evaluations
    assert (found.name, found.iteration, found.losses) == (name, iteration, losses)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("RuntimeError: CUDA out of memory. Tried to allocate 1.50 GiB (GPU 0; 31.75 GiB total capacity)", "oom-gpu"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 55.88 GiB. GPU 0 has a total capacity", "oom-gpu"),
        ("RuntimeError: CUDA error: out of memory", "oom-gpu"),
        ("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=1.0.", "oom-host"),
        ("subprocess.CalledProcessError: exits with return code = -9", "oom-host"),
        ("ERROR:torch.distributed.elastic.multiprocessing.api:failed (exitcode: -9) local_rank: 0 (pid: 1)", "oom-host"),
        ("slurmstepd: error: *** JOB 1 ON r6i4n5 CANCELLED AT 2021-05-27T21:42:11 DUE TO TIME LIMIT ***", "time-limit"),
        ("slurmstepd: error: *** JOB 1 ON r6i4n5 CANCELLED AT 2021-05-27T21:42:11 ***", "cancelled"),
        ("slurmstepd: error: *** JOB 1 ON r6i4n5 CANCELLED AT 2021-05-27T21:42:11 DUE TO PREEMPTION ***", "cancelled"),
        ("slurmstepd: error: *** JOB 1 CANCELLED AT 2021-05-27T21:42:11 DUE TO NODE FAILURE ***", "node-failure"),
        ("RuntimeError: NCCL error in: ../torch/ProcessGroupNCCL.cpp:825, unhandled system error", "nccl"),
        ("[E ProcessGroupNCCL.cpp:475] [Rank 15] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=96383)", "nccl"),
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", "hardware"),
        ("pretrain_gpt.py: error: unrecognized arguments: --lrr 1", "config"),
        ("AssertionError: Check batch related parameters. train_batch_size is not equal to ...", "config"),
        ("deepspeed.runtime.config.DeepSpeedConfigError: x", "config"),
        ("RuntimeError: Rank 3: found NaN in local forward loss calculation. Device: 3", "nan"),
        ("Exception: Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.", "nan"),
        ("ValueError: x", "crash"),
        ("srun: error: r6i4n5: task 3: Exited with exit code 1", "crash"),
        ("terminate called after throwing an instance of 'c10::Error'", "crash"),
        ("[exiting program at iteration 500] datetime: 2021-08-18 10:41:31", "stopped"),
        ("[after training is done] datetime: 2021-08-18 10:41:31", "completed"),
        ("/x.py:3: FutureWarning: this will be a ValueError: y", None),
        ("+ echo 'error: x'", None),
        ("an ordinary line", None),
    ],
)  # fmt: skip
def test_lines_that_say_how_a_run_went(one, text, kind):
    assert classify(text) == kind
    run = one(line(1) + "12: " + text + "\n")
    assert [(event.kind, event.line) for event in run.events] == ([(kind, 2)] if kind else [])


def test_an_assertion_is_a_setting_before_the_first_iteration_and_a_crash_behind(one):
    assert [event.kind for event in one("AssertionError\n" + line(1)).events] == ["config"]
    assert [event.kind for event in one(line(1) + "AssertionError: x\n").events] == ["crash"]


def test_a_traceback_is_named_by_its_error_where_there_is_one(one):
    text = line(1) + "Traceback (most recent call last):\n"
    assert [event.line for event in one(text).events] == [2]
    assert [event.line for event in one(text + "  File x\nValueError: y\n").events] == [4]


def test_the_events_that_ended_a_run_are_kept_however_many_came_before(one):
    text = "".join(line(number, 1 / number) + f"srun: error: harmless {number}\n" for number in range(1, 60)) + "ValueError: the end\n"
    run = one(text)
    assert any(event.text == "ValueError: the end" for event in run.events) and len(run.events) <= 16
    assert run.event_counts["crash"] == 60


def test_runs_one_behind_another(runs):
    first = block(num_layers=2) + line(1) + line(2)
    found = runs(first + "+ NNODES=8\n" + block(num_layers=4) + "time (ms) | load-checkpoint: 7.0\n" + line(1))
    assert [(run.run, len(run.iterations), run.arguments.get("num_layers"), run.arguments.get("nnodes")) for run in found] == [
        (0, 2, "2", None),
        (1, 1, "4", "8"),
    ]
    assert [list(run.timers) for run in found] == [[], ["load-checkpoint"]]
    assert (found[0].last_line, found[1].first_line) == (6, 7)


def test_a_run_that_starts_over_keeps_its_settings(runs):
    found = runs(block(num_layers=2) + line(8) + line(9, 4.0) + line(5, 3.0) + line(6, 2.0))
    assert [run.iterations.iteration.tolist() for run in found] == [[8, 9], [5, 6]]
    assert found[1].arguments == found[0].arguments and found[1].system == "megatron-lm"


def test_runs_that_died_before_their_first_iteration(runs):
    start = "[2021-05-26 04:37:51,493] [INFO] [logging.py:60:log_dist] [Rank 0] DeepSpeed info: version=0.3.17, git-hash=x\n"
    found = runs(start + "Killing subprocess 1\n" + start + "Killing subprocess 2\n" + start)
    assert [run.event_counts for run in found] == [{"killed-subprocess": 1}, {"killed-subprocess": 1}, {}]


def test_a_loss_that_is_not_printed_or_no_number_is_missing(one):
    rows = one(ERAS["skipped"][0] + "\n").iterations
    assert math.isnan(rows.loss[0]) and rows.skipped[0] == 10
    assert math.isnan(one(line(1, "nan")).iterations.loss[0])


@pytest.mark.parametrize(
    "text",
    [
        "MaxMemAllocated=38............49GB",
        "MA 1.2.3 GB  Max_MA .. GB  CA 1 GB  Max_CA 1 GB", "total parameters ... B",
        "memory (MB) | allocated: 1..2 |",
        "{'loss': .e5, 'epoch': 1.1.1}", "Number of trainable parameters = ,,,", "using world size: " + "9" * 5000,
        '{"consumed_samples": 1, "iteration": ' + "9" * 5000 + "}",
        "steps: 10 loss: x iter time (s): . samples/sec: .", "step=10, skipped=3, lr=[.e.], mom=[(0.9, 0.999)]",
        "[2021-99-99 99:99:99,999] step=1, skipped=0, lr=[1], mom=[",
        " validation loss at iteration 5 | lm loss value: 1.2.3 |",
        "padded vocab (size: ) with", "Effective Tera Flops per GPU: ..", "Checkpoint Save GB: ., GB/Sec: .",
    ],
)  # fmt: skip
def test_half_numbers_are_passed_over(one, text):
    assert len(one(f"{text}\n{line(1)}").iterations) == 1


def test_helpers():
    assert unprefixed("12: [default3]:x") == "x" and unprefixed("RuntimeError: x") == "RuntimeError: x"
    assert dump_row("lr=1") is None and dump_row("  lr ..... ") == ("lr", "")
