import csv
import io
import json
import math
import os

import pytest

from megactl.commands import parse_logs_view as view
from megactl.report.logs.records import Run
from megactl.report.logs.rows import Given, row_of


def row(file, times=(2.0, 1.0), run=0, **arguments):
    made = Run(file, run, arguments={name: str(value) for name, value in arguments.items()}, last_line=9)
    for index, seconds in enumerate(times, start=1):
        made.iterations.append(index, line=index, seconds=seconds, losses={"lm loss": 1.0 / 3})
    return row_of(made, Given())


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["/x/a/1.out", "/x/b/1.out"], ["a/1.out", "b/1.out"]),
        (["/x/a/1.out", "/x/a/2.out"], ["1.out", "2.out"]),
        (["/x/ab/1.out", "/x/ac/1.out"], ["ab/1.out", "ac/1.out"]),
        (["1.out"], ["1.out"]),
        (["1.out", "a/1.out"], ["1.out", "a/1.out"]),
        (["runs/a/metrics.jsonl", "runs/b/metrics.jsonl"], ["a", "b"]),
        (["runs/a/metrics.jsonl"], ["a"]),
        ([], []),
    ],
)
def test_names_lose_the_folder_they_share(files, names):
    assert view.names_of([row(file) for file in files]) == names


def test_runs_of_one_file_are_told_apart():
    assert view.names_of([row("a/x.out"), row("a/x.out", run=1), row("a/y.out")]) == ["x.out#0", "x.out#1", "y.out"]


def test_a_column_without_a_value_is_not_shown_by_default():
    keys = view.default_columns([row("x.out"), row("y.out", world_size=8)])
    assert "gpus" in keys and "zero" not in keys and "tflops_per_gpu" in keys


def test_every_key_of_a_row_can_be_a_column():
    text = view.row_table([row("x.out")], view.SETS["all"]).text("csv")
    (parsed,) = csv.DictReader(io.StringIO(text))
    assert float(parsed["mean_s"]) == 1.5 and parsed["status"] == ""
    for names in view.SETS.values():
        assert view.row_table([row("x.out")], names).text("table")


def test_csv_keeps_every_digit():
    text = view.iteration_table([row("x.out")], ("loss",)).text("csv")
    assert text.splitlines() == ["loss", repr(1 / 3), repr(1 / 3)]


def test_a_name_that_is_no_text_reaches_json_as_an_escape():
    name = os.fsdecode(b"caf\xe9.out")
    text = view.rows_json([row(name)])
    text.encode()
    assert json.loads(text)[0]["file"] == name


def test_what_a_log_says_cannot_drive_a_terminal():
    made = row("x\x1b[2J.out")
    made.values["evidence"] = "line 1: \x1b]0;title\x07"
    assert all("\x1b" not in line and "\x07" not in line for line in view.evidence_lines([made]))
    assert "\x1b" not in view.row_table([made], ()).text("table")


def test_a_narrow_terminal_gets_fewer_columns_and_is_told(monkeypatch, capsys):
    arguments = {
        "world_size": 64,
        "tensor_model_parallel_size": 4,
        "pipeline_model_parallel_size": 16,
        "micro_batch_size": 4,
        "zero_stage": 1,
    }
    rows = [row("runs/" + "long" * 20 + ".out", **arguments)]
    monkeypatch.setenv("COLUMNS", "70")
    view.show_on_terminal(view.row_table(rows, ()))
    narrow = capsys.readouterr()
    assert "ZeRO" not in narrow.out and "TFLOPs" in narrow.out and "left out, for the terminal is 70 wide: " in narrow.err
    monkeypatch.setenv("COLUMNS", "300")
    view.show_on_terminal(view.row_table(rows, ()))
    wide = capsys.readouterr()
    assert "ZeRO" in wide.out and wide.err == ""


def test_json_has_no_nan():
    made = row("x.out", times=(math.nan, 1.0))
    assert json.loads(view.iterations_json([made]))[0]["seconds"] is None
