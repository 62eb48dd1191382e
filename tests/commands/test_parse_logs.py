import csv
import io
import json
import os

import pytest
from parse_logs_text import iteration, log

from megactl.cli import main

ARGUMENTS = {
    "world_size": 64, "tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 16, "micro_batch_size": 4,
    "global_batch_size": 1024, "seq_length": 1024, "num_layers": 64, "hidden_size": 8192, "num_attention_heads": 32,
    "max_position_embeddings": 1024, "tokenizer_type": "GPT2BPETokenizer", "checkpoint_activations": True,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, factor in (("a.out", 1.0), ("b.out", 1.1)):
        (tmp_path / name).write_text(log([150e3, *(factor * (130e3 + 100 * (index % 7)) for index in range(20))], ARGUMENTS))
    return tmp_path


@pytest.fixture
def told(capsys):
    """Run a command: (exit code, stdout, stderr)."""

    def run(*words):
        code = main(["parse-logs", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_table_for_people(folder, told):
    code, out, err = told("a.out", "b.out")
    assert code == 0 and err == ""
    header = next(line for line in out.splitlines() if "TFLOPs" in line)
    assert header.split()[:3] == ["file", "status", "lines"]
    assert "the log ends after line" in out and "does not say why" in out


def test_json_is_one_list_with_every_key(folder, told):
    from megactl.report.logs.rows import KEYS

    code, out, _ = told("a.out", "--json")
    (row,) = json.loads(out)
    assert code == 0 and tuple(row) == KEYS
    assert row["dp"] == 1 and row["gas"] == 256 and row["model_b"] == pytest.approx(51.97, abs=0.01)


def test_csv_has_every_digit_and_names_of_keys(folder, told):
    _, out, _ = told("a.out", "--format", "csv", "--columns", "file,mean_s,sp,tflops_per_gpu")
    (row,) = csv.DictReader(io.StringIO(out))
    assert row["file"] == "a.out" and row["sp"] == "" and len(row["tflops_per_gpu"]) > 8


def test_markdown_and_sets_of_columns(folder, told):
    _, out, _ = told("a.out", "--format", "markdown", "--columns", "layout")
    lines = out.splitlines()
    assert lines[0].split("|")[1].strip() == "file" and len(lines) == 3 and lines[1].startswith("|--")


@pytest.mark.parametrize(("sort", "order"), [("input", "cba"), ("tflops", "abc"), ("speed", "abc"), ("mtime", "bca")])
def test_orders(folder, told, sort, order):
    (folder / "c.out").write_text("nothing here\n")
    for name, age in (("b", 10), ("c", 20), ("a", 30)):
        os.utime(folder / f"{name}.out", (1e9 - age, 1e9 - age))
    _, out, _ = told("c.out", "b.out", "a.out", "--sort", sort, "--json")
    assert "".join(row["file"][0] for row in json.loads(out)) == order


def test_failed_runs_can_be_left_out(folder, told):
    (folder / "c.out").write_text("nothing here\n")
    assert len(json.loads(told("a.out", "c.out", "--json")[1])) == 2
    assert [row["file"] for row in json.loads(told("a.out", "c.out", "--json", "--failed", "hide")[1])] == ["a.out"]


def test_a_folder_gives_its_logs_and_counts_what_is_none(folder, told):
    (folder / "readme.txt").write_text("how to run this\n")
    (folder / "deep").mkdir()
    (folder / "deep" / "c.log").write_text(log([1000.0]))
    code, out, err = told(".", "--json")
    assert code == 0 and [row["file"] for row in json.loads(out)] == ["./a.out", "./b.out", "./deep/c.log"]
    assert "1 file of the folders given holds nothing" in err
    # The same file by its name is shown, for it was asked for.
    assert json.loads(told("readme.txt", "--json")[1])[0]["status"] == "no-iterations"


def test_a_pattern_may_be_quoted(folder, told):
    assert len(json.loads(told("*.out", "--json")[1])) == 2


def test_good_files_are_read_beside_bad_ones(folder, told):
    (folder / "empty.out").write_text("")
    (folder / "binary.out").write_bytes(b"PK\x03\x04" + bytes(range(256)) * 64)
    code, out, err = told("a.out", "gone.out", "empty.out", "binary.out", "*.nothing", "--json")
    assert code == 1 and [row["file"] for row in json.loads(out)] == ["a.out"]
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 4 and all(any(name in line for line in errors) for name in ("gone.out", "empty.out", "binary.out", "*.nothing"))


def test_nothing_at_all_is_a_wrong_request(folder, told):
    code, _, err = told("gone.out", "*.nothing")
    assert code == 2 and "gone.out: no such file" in err and "*.nothing: no file matches" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(folder, told):
    (folder / "b.out").chmod(0)
    code, _, err = told("a.out", "b.out")
    assert code == 1 and "b.out" in err and "ermission" in err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["FILE...: is missing"]),
        (["a.out", "--json", "--format", "csv"], ["contradicts --json"]),
        (["a.out", "--columns", "tflops,sped"], ["did you mean tflops_per_gpu?", "--columns sped: is no column; did you mean"]),
        (["a.out", "--columns", ""], ["is no column"]),
        (["a.out", "--ms", "-3"], ["--ms -3: must be"]),
        (["a.out", "--ms", "nan"], ["--ms nan: must be"]),
        (["a.out", "--plot", "x.gif"], ["is of no kind that is drawn"]),
        (["a.out", "--plot", "x.png", "--experiment", "figure_99"], ["did you mean figure_1"]),
        (["a.out", "--experiment", "figure_13"], ["add --plot FILE"]),
        (["a.out", "--dry-run"], ["--dry-run: is for changes of scripts"]),
        (["a.out", "--diff", "a.out", "b.out", "--sort", "speed"], ["--sort: says nothing with --diff", "takes two runs"]),
        (["a.out", "--set-time", "10", "--json", "--ng", "4", "--format", "csv"], ["--ng: is for reading", "--format: is for reading"]),
        (["a.out", "--set-time", "10", "--set-job-name"], ["are several changes"]),
        (["--set-time", "10"], ["name the scripts"]),
        (["a.out", "--rename-by", "size"], ["use gas"]),
        (["a.out", "--undo", "u.json"], ["takes its undo file and nothing else"]),
        (["a.out", "--ng", "0"], ["--ng"]),
        (["a.out", "--frmat", "csv"], ["--format"]),
    ],
)
def test_every_mistake_of_a_request_is_named(folder, told, words, parts):
    code, _, err = told(*words)
    assert code == 2 and all(part in err for part in parts), err


def test_a_row_an_iteration_in_every_format(folder, told):
    _, out, _ = told("a.out", "--per-iteration", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["iteration"] for row in rows] == [str(number) for number in range(1, 22)]
    assert float(rows[0]["seconds"]) == 150.0 and float(rows[0]["loss"]) == 8.0 and "tflops_logged" not in rows[0]
    assert len(json.loads(told("a.out", "b.out", "--per-iteration", "--json")[1])) == 42
    assert told("a.out", "--per-iteration", "--format", "markdown", "--columns", "iteration,loss")[1].splitlines()[0].split() == [
        "|", "iteration", "|", "loss", "|"
    ]  # fmt: skip


def test_output_goes_to_a_file_in_the_form_of_its_ending(folder, told):
    code, out, err = told("a.out", "--output", "rows.csv")
    assert (code, out) == (0, "") and "wrote rows.csv" in err
    assert (folder / "rows.csv").read_text().startswith("file,status,")
    code, _, err = told("a.out", "--output", "no/rows.csv")
    assert code == 2 and "cannot be written" in err


def test_plots(folder, told):
    assert told("a.out", "b.out", "--plot", "curves.png")[0] == 0
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    for batch in (32, 64):
        (folder / f"figure_16-mbs4-gbs{batch}.out").write_text(log([1e3, 900.0], {**ARGUMENTS, "global_batch_size": batch}, batch=batch))
    code, out, _ = told("figure_16-*.out", "--plot", "f.svg", "--json")
    assert code == 0 and len(json.loads(out)) == 2
    assert "figure 16 of SC21" in (folder / "f.svg").read_text() or b"<svg" in (folder / "f.svg").read_bytes()


def test_a_difference_and_its_arguments(folder, told):
    (folder / "c.out").write_text(log([150e3, *(130e3 + 100 * (index % 5) for index in range(20))], {**ARGUMENTS, "seed": 7}))
    code, out, _ = told("--diff", "a.out", "b.out")
    assert code == 0 and "A is faster: B's median takes 10.0% more" in out and "No argument differs." in out
    document = json.loads(told("--diff", "a.out", "c.out", "--json")[1])
    assert document["verdict"] == "within noise"
    assert document["arguments"] == [{"name": "seed", "a": None, "b": "7"}]


def test_runs_that_do_different_work_are_not_compared_by_seconds(folder, told):
    (folder / "c.out").write_text(log([150e3, *[60e3] * 20], {**ARGUMENTS, "global_batch_size": 512}, batch=512))
    out = told("--diff", "a.out", "c.out")[1]
    assert "not the same work: global batch 1024 and 512" in out and "B is faster" in out
    assert json.loads(told("--diff", "a.out", "c.out", "--json")[1])["different_work"] == {"gbs": [1024, 512]}
    assert json.loads(told("--diff", "a.out", "b.out", "--json")[1])["different_work"] == {}


def test_a_run_of_several_in_a_file_is_named_by_its_number(folder, told):
    (folder / "two.out").write_text(log([1e3] * 6, ARGUMENTS) + log([2e3] * 6, ARGUMENTS))
    rows = json.loads(told("two.out", "--json")[1])
    assert [(row["run"], row["mean_s"]) for row in rows] == [(0, 1.0), (1, 2.0)]
    assert "two.out#1" in told("two.out")[1]
    code, _, err = told("--diff", "two.out", "a.out")
    assert code == 2 and "two.out#0, two.out#1" in err
    assert "A is faster" in told("--diff", "two.out#0", "two.out#1")[1]
    assert "no such run" in told("--diff", "two.out#7", "a.out")[2]


def test_values_given_beside_the_logs(folder, told):
    (row,) = json.loads(told("a.out", "--json", "--ng", "32", "--ms", "50", "--gpu", "v100")[1])
    assert (row["gpus"], row["model_b"]) == (32, 50) and row["mfu"] > 0
    code, _, err = told("a.out", "--gpu", "abacus")
    assert code == 0 and "MFU is n/a" in err


def test_what_tflops_lack_is_said(folder, told):
    (folder / "c.out").write_text(iteration(1, 100.0))
    _, _, err = told("c.out")
    assert "no TFLOPs for 1 of 1 runs, whose logs do not say: model size (--ms), GPUs (--ng), sequence length (--seq)" in err


TRACEBACK = 'Traceback (most recent call last):\n  File "pretrain_gpt.py", line 1, in <module>\n'
OOM = "RuntimeError: CUDA out of memory. Tried to allocate 1.50 GiB (GPU 0; 31.75 GiB total capacity; 28.11 GiB already allocated)"
NEW_OOM = "[rank3]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 55.88 GiB. GPU 0 has a total capacity of 178.35 GiB"
HOST = "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=1.0. Some of your processes may have been killed by the cgroup."
LIMIT = "slurmstepd: error: *** JOB 1999616 ON r6i4n5 CANCELLED AT 2021-05-27T21:42:11 DUE TO TIME LIMIT ***"
CANCEL = "slurmstepd: error: *** JOB 1809579 ON r8i3n1 CANCELLED AT 2021-05-23T08:45:57 ***"
NCCL = "RuntimeError: NCCL error in: ../torch/lib/c10d/ProcessGroupNCCL.cpp:825, unhandled system error, NCCL version 2.7.8"
WATCHDOG = (
    "[E ProcessGroupNCCL.cpp:475] [Rank 15] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=96383,"
    " OpType=_ALLGATHER_BASE, Timeout(ms)=1800000) ran for 1800561 milliseconds before timing out."
)
CONFIG = (
    "AssertionError: Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * gradient_acc_step"
    " * world_size 256 != 4 * 8 * 1"
)
DONE = "[after training is done] datetime: 2021-08-18 10:41:31 "


@pytest.mark.parametrize("iterations", [0, 4])
@pytest.mark.parametrize(
    ("end", "status", "evidence"),
    [
        (f"{TRACEBACK}{OOM}\n{CANCEL}\n", "oom-gpu", OOM),
        (f"[rank3]: {TRACEBACK}{NEW_OOM}\n", "oom-gpu", "torch.OutOfMemoryError"),
        (f"{HOST}\nsrun: error: r1: task 3: Out Of Memory\n", "oom-host", HOST),
        ("Killing subprocess 22920\nKilling subprocess 22921\n", "oom-host", "Killing subprocess 22920 (2 times"),
        (f"{LIMIT}\nKilling subprocess 8189\nMain process received SIGTERM, exiting\n", "time-limit", LIMIT),
        ("[exiting program after 60.2 minutes] datetime: 2021-08-18 10:41:31 \n", "time-limit", "60.2 minutes"),
        (f"srun: Job step aborted: Waiting up to 62 seconds for job step\n{CANCEL}\nKilling subprocess 1\n", "cancelled", CANCEL),
        (f"{TRACEBACK}{NCCL}\n", "nccl", NCCL),
        (f"{WATCHDOG}\n{CANCEL}\n", "nccl", "Watchdog caught"),
        (f"{TRACEBACK}{CONFIG}\n", "config", "Check batch related parameters"),
        (f"{TRACEBACK}KeyError: 'lm loss'\n", "crashed", "line"),
        (f"{DONE}\n", "completed", "after training is done"),
    ],
)  # fmt: skip
def test_each_end_is_told_with_its_line(folder, told, end, status, evidence, iterations):
    text = log([1e3] * iterations, ARGUMENTS, end=end)
    (folder / "c.out").write_text(text)
    (row,) = json.loads(told("c.out", "--json")[1])
    assert row["status"] == status and evidence in row["evidence"]
    number = int(row["evidence"].removeprefix("line ").partition(":")[0])
    assert text.splitlines()[number - 1].strip()[:40] in row["evidence"]


def test_numbers_that_are_lost_are_the_status(folder, told):
    lines = [iteration(1, 1e3), iteration(2, 1e3, loss=None)]
    (folder / "c.out").write_text("".join(lines) + LIMIT + "\n")
    (row,) = json.loads(told("c.out", "--json")[1])
    assert row["status"] == "nan" and row["final_loss"] is None
    (folder / "d.out").write_text(lines[0] + lines[1].replace("nan iterations:   0", "nan iterations:   1"))
    (row,) = json.loads(told("d.out", "--json")[1])
    assert (row["status"], row["nan_iterations"]) == ("nan", 1)
    # Megatron-LM leaves the loss out, too, where it skipped the step to lower the loss scale.
    (folder / "e.out").write_text(lines[0] + lines[1].replace("skipped iterations:   0", "skipped iterations:   1"))
    (row,) = json.loads(told("e.out", "--json")[1])
    assert (row["status"], row["skipped_iterations"]) == (None, 1)


SCRIPT = "#!/bin/bash\n#SBATCH --job-name=x\n#SBATCH --time=20:00:00\nPP_CHUNKS=128\n"


def test_scripts_are_shown_changed_and_changed_back(folder, told):
    name = "61B-megatron-mbs-2-pp16-dp-1"
    (folder / f"{name}.sh").write_text(SCRIPT)
    (folder / f"{name}.18488.out").write_text("log")
    code, out, err = told("--rename-by", "gas", "--dry-run", f"{name}.sh")
    assert code == 0 and f"{name}.sh -> {name}-gas-128.sh" in out and "2 files would change" in err and (folder / f"{name}.sh").exists()
    code, _, err = told("--rename-by", "gas", f"{name}.sh", "--undo-file", "undo.json")
    assert code == 0 and (folder / f"{name}-gas-128.18488.out").exists() and "--undo undo.json" in err
    code, out, _ = told("--set-time", "00:20:00", f"{name}-gas-128.sh", "--undo-file", "undo2.json", "--json")
    assert json.loads(out)["changes"][0]["lines"] == [{"line": 3, "old": "#SBATCH --time=20:00:00", "new": "#SBATCH --time=00:20:00"}]
    assert told("--undo", "undo2.json")[0] == 0 and told("--undo", "undo.json")[0] == 0
    assert (folder / f"{name}.sh").read_text() == SCRIPT and not (folder / f"{name}-gas-128.sh").exists()
    assert "nothing to take back" in told("--undo", "undo.json")[2]


def test_a_plan_with_a_mistake_changes_nothing(folder, told):
    for name in ("x-dp-1.sh", "y.sh"):
        (folder / name).write_text(SCRIPT)
    code, _, err = told("--rename-by", "gas", "x-dp-1.sh", "y.sh", "gone.sh")
    assert code == 2 and "no dp-N" in err and "gone.sh" in err and (folder / "x-dp-1.sh").exists()
    assert not list(folder.glob("megactl-undo-*"))


def test_the_default_undo_file_lies_in_the_folder_one_is_in(folder, told):
    (folder / "x.sh").write_text(SCRIPT)
    (folder / "y.sh").write_text(SCRIPT)
    assert [told("--set-time", limit, "x.sh", "y.sh")[0] for limit in ("5", "6", "6")] == [0, 0, 0]
    undos = list(folder.glob("megactl-undo-*.json"))
    assert len(undos) == 2 and json.loads(undos[0].read_text())["format"] == "megactl-undo"
