"""The front door: help without imports, one message for every failure, the exit codes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from typing import Annotated

import pytest
import typer

from megactl import __version__, cli
from megactl.commands import typer_app
from megactl.commands.common import columns, count, emit_json, size, strict, wants_colour
from megactl.errors import ConfigError, DataError, MegactlError, Problem, RunError


def run(*arguments: str, env: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("MEGACTL_")} | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.run([sys.executable, "-m", "megactl", *arguments], capture_output=True, text=True, env=environ, timeout=60, **options)


def failing(monkeypatch, error: BaseException):
    """A `train` that raises `error`."""

    def command(fail: bool = True, as_json: bool = typer.Option(False, "--json")) -> None:
        raise error

    monkeypatch.setattr(typer_app, "load", lambda row: command)


def test_help_lists_every_command_and_exits_0(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, row in cli.COMMANDS.items():
        assert name in text and row.help.split(",")[0] in text
    assert cli.main([]) == 0
    assert capsys.readouterr().out == text
    assert cli.main(["-h"]) == 0


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megactl {__version__}\n"


@pytest.mark.parametrize(
    ("word", "meant"), [("trian", "train"), ("dta", "data"), ("Train", "train"), ("reprot", "report"), ("sample", None)]
)
def test_unknown_command(capsys, word, meant):
    assert cli.main([word]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"error: no such command: {word}\nhint: ")
    assert meant is None or f"did you mean `megactl {meant}`?" in captured.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MegactlError("m", "h"), 2),
        (ConfigError([Problem("w", "r", "i"), Problem("w2", "r2")]), 2),
        (DataError("m", "h"), 2),
        (RunError("m", "h"), 1),
        (FileNotFoundError(2, "No such file or directory", "x.bin"), 1),
        (OSError(28, "No space left on device"), 1),
        (ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib"), 2),
        (ValueError("surprise"), 1),
        (ModuleNotFoundError("No module named 'megactl.nonsense'", name="megactl.nonsense"), 1),
        (AssertionError(), 1),
        (KeyboardInterrupt(), 130),
        (typer.Abort(), 130),
        (typer.Exit(7), 7),
        (SystemExit(5), 5),
        (SystemExit("words"), 1),
        (SystemExit(None), 0),
    ],
)
def test_errors_become_messages_and_codes(monkeypatch, capsys, error, code):
    failing(monkeypatch, error)
    assert cli.main(["train"]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    if isinstance(error, Exception) and not isinstance(error, (typer.Abort, typer.Exit)):
        assert captured.err.startswith("error: ")
    is_bug = isinstance(error, (ValueError, AssertionError)) or "nonsense" in str(error)
    assert ("this is a bug in megactl" in captured.err) == is_bug


@pytest.mark.parametrize(
    "error", [MegactlError("m", "h"), ConfigError([Problem("w", "r", "i")]), RunError("m"), ValueError("\x1b[0m \u2028 nan")]
)
def test_json_errors_are_one_document(monkeypatch, capsys, error):
    failing(monkeypatch, error)
    code = cli.main(["train", "--json"])
    captured = capsys.readouterr()
    document = json.loads(captured.out)["error"]
    assert document["type"] == type(error).__name__ and document["exit_code"] == code and captured.err.startswith("error: ")
    if isinstance(error, ConfigError):
        assert document["problems"] == [{"where": "w", "rule": "r", "instead": "i"}]


@pytest.mark.parametrize("arguments", [["--traceback", "train"], ["train", "--traceback"]])
def test_traceback_on_request(monkeypatch, capsys, arguments):
    failing(monkeypatch, ValueError("surprise"))
    assert cli.main(arguments) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_traceback_by_environment(monkeypatch, capsys, value, shown):
    failing(monkeypatch, ValueError("surprise"))
    monkeypatch.setenv("MEGACTL_TRACEBACK", value)
    assert cli.main(["train"]) == 1
    assert ("Traceback" in capsys.readouterr().err) == shown


def test_words_after_the_double_dash_are_left_alone(monkeypatch, capsys):
    seen = []

    def command(words: Annotated[list[str] | None, typer.Argument()] = None) -> int:
        seen.extend(words or [])
        return 3

    monkeypatch.setattr(typer_app, "load", lambda row: command)
    assert cli.main(["train", "--", "--traceback", "--json"]) == 3
    assert seen == ["--traceback", "--json"]


def test_usage_errors_are_ours(monkeypatch, capsys):
    def command(number: int = typer.Option(..., "--number", "--count")) -> None: ...

    monkeypatch.setattr(typer_app, "load", lambda row: command)
    for arguments, message in {
        ("--nunber", "3"): "--nunber: no such option\nhint: did you mean --number?",
        ("--number", "x"): "hint: see `megactl train --help`",
        (): "Missing option",
        ("--number",): "requires an argument",
    }.items():
        assert cli.main(["train", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and message in captured.err and captured.out == ""


def test_a_closed_pipe_is_silent():
    reader = subprocess.Popen(
        [sys.executable, "-m", "megactl", "train", "--preset", "gpt-1t", "--tp", "8", "--pp", "64", "--mock-data", "--dry-run", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    reader.stdout.readline()
    reader.stdout.close()
    assert reader.stderr.read() == ""
    assert reader.wait(60) in (0, 1)


def test_colour_only_on_a_terminal_without_no_color():
    class Terminal:
        def __init__(self, terminal: bool) -> None:
            self.isatty = lambda: terminal

    assert wants_colour(Terminal(True), {}) and wants_colour(Terminal(True), {"NO_COLOR": ""})
    assert not wants_colour(Terminal(False), {})
    assert not wants_colour(Terminal(True), {"NO_COLOR": "1"}) and not wants_colour(Terminal(True), {"TERM": "dumb"})


def test_output_without_a_terminal_has_no_escapes():
    for result in (run("--help"), run("trian"), run("train", "--tp", "x")):
        assert "\x1b" not in result.stdout + result.stderr


def test_completion_knows_commands_and_options():
    script = {"_MEGACTL_COMPLETE": "complete_bash", "COMP_WORDS": "megactl tra", "COMP_CWORD": "1"}
    assert "train" in run(env=script).stdout.split()
    script = {"_MEGACTL_COMPLETE": "complete_bash", "COMP_WORDS": "megactl train --glob", "COMP_CWORD": "2"}
    assert "--global-batch-size" in run(env=script).stdout.split()


@pytest.mark.parametrize(("arguments", "seconds"), [(["--help"], 0.5), (["train", "--help"], 0.8)])
def test_start_time(arguments, seconds):
    """CPU seconds, the least of three: wall time on a shared machine measures the neighbours."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run(*arguments).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(once() for _ in range(3)) < seconds


def test_strict_json(capsys):
    emit_json({"a": float("nan"), "b": (1, float("inf")), 3: True, "path": typer})
    document = json.loads(capsys.readouterr().out)
    assert document["a"] is None and document["b"] == [1, None] and document["3"] is True
    assert strict({"x": None}) == {"x": None}


def test_numbers_for_people():
    assert [size(number) for number in (0, 1023, 1024, 1.5 * 2**30, 2**50)] == ["0 B", "1023 B", "1.00 KiB", "1.50 GiB", "1024.00 TiB"]
    assert [count(number) for number in (12, 1500, 354_800_000, 1.008e12)] == ["12", "1.5K", "354.8M", "1.008T"]
    assert columns([("a", "bb", "c"), ("aaa", "b", "")]) == ["a    bb  c", "aaa  b"]
    assert columns([]) == []


@pytest.mark.parametrize(
    ("encoding", "form"), [("utf-8:strict", "json"), ("utf-8:strict", "csv"), ("utf-8:surrogateescape", "json"), ("ascii", "table")]
)
def test_a_name_that_is_no_text_is_printed(tmp_path, encoding, form):
    name = os.fsdecode(b"a\xff.out")
    (tmp_path / name).write_text("iteration 1/ 3 | elapsed time per iteration (ms): 100.0 | lm loss: 2.0E+00 |\n")
    result = run("parse-logs", name, "--format", form, env={"PYTHONIOENCODING": encoding}, cwd=tmp_path)
    assert result.returncode == 0 and "a\\udcff.out" in result.stdout
    if form == "json":
        assert json.loads(result.stdout)[0]["file"] == name
