"""metrics.jsonl, the console line, the live line, the loggers and summary.json."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
import types
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.config.schema import Logging, Run, Training
from megactl.engine import metrics
from megactl.engine.metrics import MetricsWriter, Step, check_loggers, iteration_line, read_summary, write_summary
from megactl.errors import MegactlError, RunError

# The pair of expressions by which tools read Megatron's iteration lines.
HEAD = re.compile(
    r"^(?:\s*(?P<rank>\d+):\s?|\[(?P<role>[A-Za-z_]+)(?P<lrank>\d+)\]:\s?)?\s*"
    r"(?:\[(?P<ts>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?)\])?\s*iteration\s+(?P<it>\d+)/\s*(?P<tot>\d+)\s*\|(?P<rest>.*)$"
)
FIELD = re.compile(r"\s*([^|:]+?)\s*:\s*([^|]*?)\s*(?:\||$)")
RUN = dataclasses.replace(Run(), training=Training(seq_length=128))


def step(iteration: int, **changes) -> Step:
    values = {"loss": 5.0, "learning_rate": 1e-4, "global_batch_size": 8, "seconds": 0.5, "grad_norm": 1.25}
    return Step(iteration=iteration, consumed_samples=8 * iteration, **(values | changes))


def writer(run_dir: Path, *, start: int = 0, total: int = 20, run: Run = RUN, **options) -> tuple[MetricsWriter, io.StringIO]:
    console = io.StringIO()
    made = MetricsWriter(run_dir, run, start_iteration=start, total_iterations=total, is_terminal=False, console=console, **options)
    return made, console


def lines_of(run_dir: Path) -> list[dict]:
    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def fields_of(line: str) -> dict[str, str]:
    match = HEAD.match(line)
    assert match, line
    return {"iteration": match["it"], "total": match["tot"], "time": match["ts"], **dict(FIELD.findall(match["rest"]))}


def test_a_line_an_iteration_with_the_fixed_keys(tmp_path):
    made, _ = writer(tmp_path, world_size=2, flops_per_iteration=lambda batch: batch * 1e12, peak_tflops=10.0)
    made.step(step(1))
    # Read before anything is closed: each line is on its way to the disk when step() returns.
    (line,) = lines_of(tmp_path)
    assert line.pop("time") > 1e9
    assert line == {
        "iteration": 1,
        "consumed_samples": 8,
        "loss": 5.0,
        "learning_rate": 1e-4,
        "global_batch_size": 8,
        "grad_norm": 1.25,
        "loss_scale": 1.0,
        "seconds": 0.5,
        "tokens_per_s": 8 * 128 / 0.5,
        "model_tflops_per_gpu": 8.0,
        "mfu": 0.8,
        "skipped": False,
    }


def test_unknown_flops_and_peak_are_null(tmp_path):
    made, console = writer(tmp_path)
    made.step(step(1))
    assert (lines_of(tmp_path)[0]["model_tflops_per_gpu"], lines_of(tmp_path)[0]["mfu"]) == (None, None)
    assert "throughput" not in console.getvalue()
    made, _ = writer(tmp_path, flops_per_iteration=lambda batch: 1e12)
    made.step(step(1))
    assert lines_of(tmp_path)[0]["mfu"] is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_loss_that_is_no_number_is_strict_json(tmp_path, value):
    made, console = writer(tmp_path)
    made.step(step(1, loss=value, grad_norm=value))
    made.evaluation(1, value)
    first, second = lines_of(tmp_path)
    assert (first["loss"], first["nan"], first["grad_norm"]) == (None, True, None)
    assert (second["loss"], second["nan"], second["ppl"]) == (None, True, None)
    assert fields_of(console.getvalue().splitlines()[0])["number of nan iterations"] == "1"


def test_console_line_is_megatrons():
    interval = [step(9, loss=8.0, seconds=2.0), step(10, loss=8.02469, seconds=2.4096, learning_rate=1.5e-4, grad_norm=1.102)]
    line = iteration_line(interval, 1000, tflops=431.7, tokens_per_s=1234.5, eta=754.4, now=datetime(2026, 11, 21, 10, 11, 12))
    assert line.startswith(
        " [2026-11-21 10:11:12] iteration       10/    1000 | consumed samples:           80 | elapsed time per iteration (ms): 2204.8 | "
        "throughput per GPU (TFLOP/s/GPU): 431.7 | learning rate: 1.500000E-04 | global batch size:     8 | lm loss: 8.012345E+00 | "
        "loss scale: 1.0 | grad norm: 1.102 | number of skipped iterations:   0 | number of nan iterations:   0 |"
    )
    assert fields_of(line) == {
        "iteration": "10",
        "total": "1000",
        "time": "2026-11-21 10:11:12",
        "consumed samples": "80",
        "elapsed time per iteration (ms)": "2204.8",
        "throughput per GPU (TFLOP/s/GPU)": "431.7",
        "learning rate": "1.500000E-04",
        "global batch size": "8",
        "lm loss": "8.012345E+00",
        "loss scale": "1.0",
        "grad norm": "1.102",
        "number of skipped iterations": "0",
        "number of nan iterations": "0",
        "tokens/s": "1234.5",
        "ETA": "0:12:34",
    }


def test_skipped_iterations_do_not_enter_the_mean():
    interval = [step(1, loss=4.0), step(2, loss=100.0, skipped=True), step(3, loss=6.0)]
    fields = fields_of(iteration_line(interval, 3, tflops=None, tokens_per_s=1.0, eta=None))
    assert (fields["lm loss"], fields["number of skipped iterations"]) == ("5.000000E+00", "1")
    only_skipped = fields_of(iteration_line([step(1, skipped=True)], 3, tflops=None, tokens_per_s=1.0, eta=None))
    assert "lm loss" not in only_skipped


def test_a_mean_without_any_number_shows_nan():
    fields = fields_of(iteration_line([step(1, loss=math.nan)], 3, tflops=None, tokens_per_s=1.0, eta=None))
    assert (fields["lm loss"], fields["number of nan iterations"]) == ("nan", "1")


def test_the_parts_of_a_loss_have_their_own_fields(tmp_path):
    """Megatron prints BERT's two losses and not their sum; the records hold all three."""
    made, console = writer(tmp_path)
    made.step(step(1, loss=4.75, losses={"lm_loss": 4.25, "sentence_loss": 0.5}))
    fields = fields_of(console.getvalue().splitlines()[0])
    assert (fields["lm loss"], fields["sop loss"]) == ("4.250000E+00", "5.000000E-01")
    assert {"loss": 4.75, "lm_loss": 4.25, "sentence_loss": 0.5}.items() <= lines_of(tmp_path)[0].items()


def test_the_parts_of_a_validation_loss(tmp_path):
    made, console = writer(tmp_path)
    made.evaluation(10, 2.6, losses={"lm_loss": 2.1, "sentence_loss": 0.5})
    line = console.getvalue().splitlines()[1]
    assert line.endswith(
        "| lm loss value: 2.100000E+00 | lm loss PPL: 8.166170E+00 | sop loss value: 5.000000E-01 | sop loss PPL: 1.648721E+00 | "
    )
    (record,) = lines_of(tmp_path)
    assert record.pop("ppl") == math.exp(2.1)
    expected = {"kind": "eval", "iteration": 10, "name": "validation", "loss": 2.6, "lm_loss": 2.1, "sentence_loss": 0.5, "seconds": None}
    assert record == expected


def test_lines_come_at_the_first_every_interval_and_the_last_iteration(tmp_path):
    made, console = writer(tmp_path, total=23)
    for iteration in range(1, 24):
        made.step(step(iteration))
    made.finish("completed")
    assert [int(fields_of(line)["iteration"]) for line in console.getvalue().splitlines()] == [1, 10, 20, 23]


def test_interrupted_interval_is_printed_at_the_end(tmp_path):
    made, console = writer(tmp_path, start=10)
    for iteration in (11, 12, 13):
        made.step(step(iteration))
    made.finish("saved")
    assert [int(fields_of(line)["iteration"]) for line in console.getvalue().splitlines()] == [11, 13]


def test_validation_block_is_megatrons(tmp_path):
    made, console = writer(tmp_path)
    made.evaluation(10, 2.1)
    rule, line, end = console.getvalue().splitlines()
    assert line == " validation loss at iteration 10 | lm loss value: 2.100000E+00 | lm loss PPL: 8.166170E+00 | "
    assert rule == end == "-" * (len(line) + 1)
    (record,) = lines_of(tmp_path)
    assert record == {"kind": "eval", "iteration": 10, "name": "validation", "loss": 2.1, "ppl": math.exp(2.1), "seconds": None}


def test_resume_leaves_each_iteration_once(tmp_path):
    made, _ = writer(tmp_path)
    for iteration in range(1, 13):
        made.step(step(iteration))
        if iteration % 5 == 0:
            made.evaluation(iteration, 2.0)
    made.close()
    made, _ = writer(tmp_path, start=8)
    for iteration in range(9, 13):
        made.step(step(iteration, loss=1.0))
        if iteration % 5 == 0:
            made.evaluation(iteration, 1.5)
    made.close()
    records = lines_of(tmp_path)
    steps = [record for record in records if "kind" not in record]
    assert [record["iteration"] for record in steps] == list(range(1, 13))
    assert [record["loss"] for record in steps] == [5.0] * 8 + [1.0] * 4
    assert [(record["iteration"], record["loss"]) for record in records if "kind" in record] == [(5, 2.0), (10, 1.5)]


def test_fresh_start_drops_an_older_runs_lines(tmp_path):
    made, _ = writer(tmp_path)
    made.step(step(1))
    made.close()
    made, _ = writer(tmp_path)
    made.step(step(1, loss=1.0))
    assert [line["loss"] for line in lines_of(tmp_path)] == [1.0]


def test_every_truncation_is_repaired(tmp_path):
    made, _ = writer(tmp_path)
    for iteration in (1, 2, 3):
        made.step(step(iteration))
    made.close()
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    ends = [len(b"".join(whole.splitlines(keepends=True)[:count])) for count in range(4)]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        made, _ = writer(tmp_path, start=3)
        made.step(step(4))
        made.close()
        complete = sum(1 for end in ends[1:] if end <= size)
        assert [line["iteration"] for line in lines_of(tmp_path)] == [*range(1, complete + 1), 4]


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300))
def test_garbage_never_stops_a_resume(tmp_path_factory, garbage):
    folder = tmp_path_factory.mktemp("run")
    (folder / "metrics.jsonl").write_bytes(b'{"iteration": 1, "loss": 2.0}\n' + garbage)
    made, _ = writer(folder, start=1)
    made.step(step(2))
    made.close()
    assert [line["iteration"] for line in lines_of(folder)][-1] == 2


def test_kill_9_leaves_whole_lines(tmp_path):
    code = (
        "import io, os\nfrom pathlib import Path\nfrom megactl.config.schema import Run\n"
        "from megactl.engine.metrics import MetricsWriter, Step\n"
        "options = dict(start_iteration=0, total_iterations=9, is_terminal=False, console=io.StringIO())\n"
        f"w = MetricsWriter(Path({str(tmp_path)!r}), Run(), **options)\n"
        "for i in range(1, 6):\n"
        "    w.step(Step(iteration=i, consumed_samples=i, loss=1.0, learning_rate=0.1, global_batch_size=1, seconds=0.1))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -9
    assert [line["iteration"] for line in lines_of(tmp_path)] == [1, 2, 3, 4, 5]


def test_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    made, _ = writer(tmp_path)

    def refuse(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written: No space left"):
        made.step(step(1))


def test_short_writes_are_completed(tmp_path, monkeypatch):
    made, _ = writer(tmp_path)
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
    made.step(step(1))
    monkeypatch.undo()
    assert len(lines_of(tmp_path)) == 1


def test_console_that_goes_away_does_not_end_the_run(tmp_path, capsys):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    made = MetricsWriter(tmp_path, RUN, start_iteration=0, total_iterations=9, is_terminal=False, console=Closed())
    for iteration in range(1, 4):
        made.step(step(iteration))
    assert len(lines_of(tmp_path)) == 3
    assert capsys.readouterr().err.count("stdout is gone") == 1


def test_live_line_only_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_LIVE_SECONDS", 0.0)
    terminal, console = io.StringIO(), io.StringIO()
    options = {"start_iteration": 0, "total_iterations": 9, "console": console, "terminal": terminal}
    made = MetricsWriter(tmp_path, RUN, is_terminal=True, **options)
    for iteration in range(1, 5):
        made.step(step(iteration))
    drawn = terminal.getvalue()
    assert re.search(r"iteration 4/9\s+loss 5\.0000\s+2,048 tokens/s\s+ETA 0:00:02", drawn), drawn
    assert "\n" not in drawn
    made.finish("completed")
    assert terminal.getvalue().rstrip("\x1b[0m").endswith("\r\x1b[2K")
    terminal.truncate(0)
    made = MetricsWriter(tmp_path, RUN, is_terminal=False, **options)
    made.step(step(1))
    assert terminal.getvalue() == ""


def test_eta_leaves_the_first_steps_out_and_knows_ramp_up(tmp_path):
    made, _ = writer(tmp_path, total=104)
    assert made.eta_seconds() is None
    for iteration, seconds in enumerate((60.0, 30.0, 1.0, 1.0), start=1):
        made.step(step(iteration, seconds=seconds))
    assert made.eta_seconds() == pytest.approx(100.0)
    # 8 samples took 1 s, so the 800 that are left take 100 s, whatever the later batches are.
    ramped, _ = writer(tmp_path, total=10, total_samples=832)
    for iteration, seconds in enumerate((60.0, 30.0, 1.0, 1.0), start=1):
        ramped.step(step(iteration, seconds=seconds))
    assert ramped.eta_seconds() == pytest.approx(100.0)


def test_summary_has_the_fixed_keys(tmp_path):
    made, _ = writer(tmp_path, world_size=4, flops_per_iteration=lambda batch: 4e12, peak_tflops=20.0)
    for iteration in range(1, 6):
        made.step(step(iteration, loss=6.0 - iteration, seconds=10.0 if iteration == 1 else 0.5))
    summary = made.finish("completed", peak_memory_gb=[2.5, 3.5])
    assert summary == read_summary(tmp_path)
    layout = summary.pop("layout")
    assert (layout["tp"], layout["pp"], layout["micro_batch_size"]) == (1, 1, 1)
    assert summary == {
        "status": "completed",
        "iterations": 5,
        "final_loss": 1.0,
        "median_s_per_iteration": 0.5,
        "tokens_per_s": 2048.0,
        "model_tflops_per_gpu": 2.0,
        "mfu": 0.1,
        "peak_memory_gb": 3.5,
        "peak_memory_gb_by_rank": [2.5, 3.5],
        "world_size": 4,
    }
    assert not list(tmp_path.glob(".*.tmp"))


def test_summary_of_a_run_whose_ranks_are_gone(tmp_path):
    made, _ = writer(tmp_path)
    made.step(step(1))
    made.close()
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"iteration": 2, "lo')
    summary = write_summary(tmp_path, RUN, status="failed", world_size=2, error="rank 1 was killed")
    assert (summary["iterations"], summary["final_loss"], summary["error"]) == (1, 5.0, "rank 1 was killed")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert write_summary(empty, RUN, status="failed", world_size=2)["iterations"] == 0


@pytest.mark.parametrize(("field", "package"), [("tensorboard_dir", "tensorboard"), ("wandb_project", "wandb")])
def test_logger_that_is_not_installed_is_an_error(tmp_path, monkeypatch, field, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None if name == package else object())
    run = dataclasses.replace(Run(), logging=Logging(**{field: "x"}))
    with pytest.raises(MegactlError, match=rf'needs the package {package}.*\n.*pip install "megactl\[{package}\]"'):
        check_loggers(run)
    with pytest.raises(MegactlError, match=package):
        writer(tmp_path, run=run)
    check_loggers(Run())


def test_wandb_runs_offline_and_gets_the_numbers(tmp_path, monkeypatch):
    calls: list[tuple] = []
    session = types.SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append(("finish",)))

    def init(**options):
        calls.append(("init", options))
        return session

    module = types.ModuleType("wandb")
    module.init = init
    module.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    run = dataclasses.replace(RUN, logging=Logging(wandb_project="p", log_interval=1))
    made, _ = writer(tmp_path, run=run)
    made.step(step(1))
    made.evaluation(1, 2.0)
    made.finish("completed")
    (_, options), (iteration, values), (_, evaluation), finish = calls
    assert (options["project"], options["mode"], options["config"]["training"]["seq_length"]) == ("p", "offline", 128)
    assert (iteration, values["lm loss"], values["tokens per second"]) == (1, 5.0, 2048.0)
    assert evaluation["validation loss"] == 2.0
    assert finish == ("finish",)


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = dataclasses.replace(RUN, logging=Logging(tensorboard_dir=str(tmp_path / "tb"), log_interval=1))
    made, _ = writer(tmp_path, run=run)
    made.step(step(1))
    made.finish("completed")
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("lm loss")] == [(1, 5.0)]
