"""`megactl bench ops`: what it prints, writes and refuses, and when its exit code says that something is slow."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from megactl.cli import main  # noqa: E402
from megactl.commands.bench import cells, markdown_page  # noqa: E402
from megactl.engine import bench, ops  # noqa: E402
from megactl.engine.bench import OPERATORS, Row, Timing  # noqa: E402

QUICK = ["bench", "ops", "--device", "cpu", "--size", "small", "--mbs", "1", "--seconds", "0.001", "--no-compile"]


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def row(ours=1.0, eager=2.0, **changes):
    timings = {name: Timing((value,) * 7, (value,) * 7) for name, value in (("megactl", ours), ("F.gelu", eager), ("copy", 0.5))}
    facts = {"direction": "forward", "shape": (2, 3), "bytes_moved": 2 * 10**9, "moves": "x -> y", "verdict": "faster", "timings": timings}
    return Row("bias_gelu", "small", "fp32", **{**facts, **changes})


def test_json_and_markdown_come_from_one_run(tmp_path, capsys):
    page = tmp_path / "ops.md"
    assert main([*QUICK, "--op", "dropout_add", "--op", "adamw_", "--threads", "1", "--json", "--markdown", str(page)]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert [(item["op"], item["direction"]) for item in document["rows"]] == [
        ("dropout_add", "forward"), ("dropout_add", "backward"), ("adamw_", "in place"),
    ]  # fmt: skip
    first = document["rows"][0]
    assert first["shape"] == [1, 64, 256] and first["bytes_moved"] == 3 * 4 * 64 * 256 and first["dtype"] == "fp32"
    assert set(first["timings"]) == {"megactl", "F.dropout, add", "copy"}
    ours = first["timings"]["megactl"]
    assert ours["gb_per_s"] == pytest.approx(first["bytes_moved"] / ours["median_s"] / 1e9) and ours["rounds"] >= 7
    environment = document["environment"]
    assert environment["timed_by"] == "CPU time of the process" and environment["load_average"] >= 0
    assert environment["threads"] == 1 and environment["torch"] == torch.__version__ and environment["operators"] == ops.describe()
    assert "dropout_add backward small fp32" in err
    text = page.read_text()
    assert f"* torch: {torch.__version__}" in text and text.count("\n| dropout_add") == 2 and "x, residual -> y" in text


def test_the_table(capsys):
    assert main([*QUICK, "--op", "dropout_add", "--dtype", "bf16", "--dtype", "fp64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if "dropout_add" in line]
    assert [words[words.index("cache)") + 1] for words in rows] == ["bf16", "bf16", "fp64", "fp64"]
    assert all(len(line) <= 230 for line in lines)


def test_every_operator_of_the_table_has_a_row_built_or_not(capsys, monkeypatch):
    for name in OPERATORS:
        monkeypatch.delattr(ops, name, raising=False)
    assert main([*QUICK, "--json", "--check"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(item["op"], item["verdict"]) for item in rows] == [(name, "not built") for name in OPERATORS]


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([row()], 0),
        ([row(), row(ours=3.0, verdict="slower than torch")], 1),
        # Only torch.compile is faster.
        ([row(verdict="slower than torch")], 0),
        ([row(verdict="differs", timings={}, errors={"F.gelu": 0.5})], 1),
        ([row(verdict="failed", timings={}, failures={"megactl": "RuntimeError: x"})], 1),
        ([row(verdict="not built", timings={})], 0),
    ],
)
def test_check_fails_where_eager_torch_is_faster(monkeypatch, capsys, rows, code):
    monkeypatch.setattr(bench, "run_operators", lambda plan, report: [report(item) for item in rows])
    assert main([*QUICK, "--check"]) == code
    assert main(QUICK) == 0
    assert ("1 of" in capsys.readouterr().err) == bool(code)


def test_an_interrupted_run_shows_what_was_done(monkeypatch, capsys):
    def interrupted(plan, report):
        report(row())
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run_operators", interrupted)
    assert main([*QUICK, "--json"]) == 130
    document = json.loads(capsys.readouterr().out)
    assert document["interrupted"] and [item["op"] for item in document["rows"]] == ["bias_gelu"]


def test_cells_and_page_show_what_is_slow_and_what_failed():
    slow = row(ours=4.0, verdict="slower than torch", failures={"torch.compile": "RuntimeError: no compiler"})
    shown = cells(slow)
    assert shown[-1] == "SLOWER THAN TORCH" and shown[7] == "failed" and shown[5] == "4000 ms ±0 %" and shown[6] == "2000 ms ±0 %"
    assert shown[9:12] == ["0.5", "12 %", "0.50"]
    environment = {**bench.bench_environment(torch.device("cpu")), "commit": {"hash": "abc", "dirty": True}}
    page = markdown_page([slow], environment)
    assert "commit: abc with changes" in page and "bias_gelu forward small fp32, torch.compile: RuntimeError: no compiler" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--op", "softmax"], ("--op softmax", "masked_softmax")),
        (["--size", "huge"], ("--size huge", "small")),
        (["--dtype", "int8", "--seconds", "0"], ("--dtype int8", "--seconds 0.0")),
        (["--mbs", "0", "--threads", "0"], ("--micro-batch-size 0", "--threads 0")),
        (["--device", "tpu"], ("--device tpu", "auto")),
        pytest.param(["--device", "cuda"], ("--device cuda", "--device cpu"),
                     marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")),
    ],
)  # fmt: skip
def test_mistakes_are_named(capsys, arguments, words):
    assert main(["bench", "ops", *arguments]) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words)


def test_a_page_that_cannot_be_written_is_one_message(tmp_path, capsys):
    assert main([*QUICK, "--op", "dropout_add", "--markdown", str(tmp_path / "none" / "a.md")]) == 2
    assert "cannot be written" in capsys.readouterr().err
