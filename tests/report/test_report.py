"""The report of whole and of broken run directories, and the curves it draws."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from megactl.commands.report import report
from megactl.errors import DataError, MegactlError
from megactl.report.curves import Curve, bounds, curve_of, default_window, smoothed, thinned
from megactl.report.page import render_page
from megactl.report.records import read_records
from megactl.report.run_data import read_run
from megactl.report.svg import Line, line_chart, tick_text, ticks


def step(iteration: int, loss: float | None, **more) -> dict:
    record = {"iteration": iteration, "consumed_samples": 8 * iteration, "loss": loss, "learning_rate": 1e-4, "grad_norm": 1.0}
    return record | {"seconds": 0.5, "tokens_per_s": 1000.0 + iteration, "model_tflops_per_gpu": None, "mfu": None, "skipped": False} | more


def make_run(folder: Path, records: list[dict], *, tail: str = "", summary: bool = True, config: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    if summary:
        figures = {"status": "completed", "iterations": len(records), "final_loss": 2.5, "median_s_per_iteration": 0.5}
        layout = {"tp": 2, "pp": 4, "dp": 1, "zero": 0}
        (folder / "summary.json").write_text(json.dumps(figures | {"tokens_per_s": 1050.0, "mfu": 0.42, "world_size": 8, "layout": layout}))
    if config:
        lines = ["schema_version = 1", 'preset = "gpt-345m"', "[model]", "num_layers = 7", "[derived]", '"model.vocab_size" = 257']
        (folder / "config.toml").write_text("\n".join(lines) + "\n")
    return folder


def run_command(*arguments: str):
    app = typer.Typer()
    app.command()(report)
    return CliRunner().invoke(app, list(arguments))


def charts_of(page: str) -> dict[str, ElementTree.Element]:
    """Each chart by its aria-label; parsing them proves that they are well-formed."""
    found = [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    return {svg.attrib["aria-label"]: svg for svg in found}


def test_page_and_plot_of_a_whole_run(tmp_path):
    pytest.importorskip("matplotlib")
    records = [step(i, 10 / i) for i in range(1, 121)]
    records.append({"kind": "eval", "iteration": 100, "name": "validation", "loss": 0.2, "ppl": 1.2})
    run = make_run(tmp_path / "run", records)
    result = run_command(str(run), "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["summary"]["mfu"] == 0.42
    assert document["iterations_recorded"] == 120
    assert document["evaluations"] == [{"iteration": 100, "loss": 0.2}]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    page = (run / "report.html").read_text()
    charts = charts_of(page)
    assert set(charts) == {
        "loss (nats per token) over iteration",
        "tokens per second over iteration",
        "learning rate over iteration",
        "global gradient norm over iteration",
    }
    assert len(charts["loss (nats per token) over iteration"].findall(".//circle")) == 2  # the evaluation and its legend
    for fact in ("42.0%", "gpt-345m", "<td>num layers</td><td>7</td>", "<td>vocab size</td><td>257</td>", "<td>tp</td><td>2</td>"):
        assert fact in page
    # Self-contained: nothing is fetched from anywhere.
    assert not re.search(r"(src|href)=|https?://|<script", page)


def test_output_goes_where_it_is_asked(tmp_path):
    run = make_run(tmp_path / "run", [step(1, 3.0), step(2, 2.0)])
    result = run_command(str(run), "--output", str(tmp_path / "page.html"), "--no-plot", "--log", "--smooth", "2")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "page.html").exists()
    assert not (run / "report.html").exists()
    assert not list(tmp_path.rglob("loss.png"))


def test_unwritable_output_is_said(tmp_path):
    run = make_run(tmp_path / "run", [step(1, 3.0)])
    result = run_command(str(run), "--output", str(tmp_path / "no" / "page.html"))
    assert isinstance(result.exception, MegactlError)
    assert "cannot be written" in str(result.exception)


def test_broken_run_still_gives_a_report(tmp_path):
    run = make_run(tmp_path / "run", [step(i, 5.0 - i) for i in (1, 2, 3)], tail='{"iteration": 4, "lo', summary=False, config=False)
    data = read_run(run)
    assert data.summary["status"] == "unknown"
    assert (data.summary["iterations"], data.summary["final_loss"]) == (3, 2.0)
    page = render_page(data)
    for said in ("1 damaged line(s)", "summary.json is missing", "config.toml cannot be read", "environment.json is missing"):
        assert said in page
    assert charts_of(page)


@pytest.mark.parametrize("content", ["", '{"iteration": 1, "loss"', "\x00\x01\n\n[1]\n", None])
def test_run_without_iterations_gives_a_page_without_curves(tmp_path, content):
    run = make_run(tmp_path / "run", [])
    (run / "metrics.jsonl").unlink()
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    page = render_page(read_run(run))
    assert "there are no curves" in page
    assert "<svg" not in page


def test_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a run directory"):
        read_run(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        read_run(tmp_path / "absent")


def test_missing_matplotlib_is_said_and_the_page_is_there(tmp_path):
    run = make_run(tmp_path / "run", [step(1, 3.0)])
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path\nfrom megactl.commands.report import report\nfrom megactl.errors import MegactlError\n"
        f"try: report(Path({str(run)!r}))\n"
        "except MegactlError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert 'pip install "megactl[plot]"' in done.stdout
    assert (run / "report.html").exists()


def test_report_needs_no_torch(tmp_path):
    run = make_run(tmp_path / "run", [step(1, 3.0)])
    code = (
        "import sys\nfrom pathlib import Path\nfrom megactl.commands.report import report\n"
        "assert 'numpy' not in sys.modules and 'jinja2' not in sys.modules, 'imported before the command runs'\n"
        f"report(Path({str(run)!r}), plot=False)\nassert 'torch' not in sys.modules and 'pandas' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, stdout=subprocess.DEVNULL)


def test_text_from_the_run_is_escaped(tmp_path):
    run = make_run(tmp_path / "run", [step(1, 3.0)], summary=False)
    (run / "summary.json").write_text(json.dumps({"status": "failed", "error": "<script>alert(1)</script>", "layout": {}}))
    page = render_page(read_run(run))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_nan_loss_is_a_gap_in_the_curve(tmp_path):
    run = make_run(tmp_path / "run", [step(1, 3.0), step(2, 2.5), step(3, None, nan=True), step(4, 2.0), step(5, 1.5)])
    svg = charts_of(render_page(read_run(run)))["loss (nats per token) over iteration"]
    path = next(element for element in svg.iter("path")).attrib["d"]
    assert path.count("M") == 2
    assert "nan" not in path


def test_damaged_lines_are_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1, "loss": 2.0}\nnoise\n{"iteration": 2, "loss": 1.0}\n\xff\xfe\n{"iteration": 3, "loss": 0.5}')
    records = read_records(path)
    # The last line parses, but its newline is missing: the write may have been cut inside a number.
    assert ([record["iteration"] for record in records.steps], records.damaged) == ([1, 2], 3)


def test_smoothing_is_centred_and_ignores_gaps():
    line = Curve("x", np.arange(21.0), 3 * np.arange(21.0))
    np.testing.assert_allclose(smoothed(line, 5).y, line.y)
    constant = Curve("x", np.arange(5.0), np.array([2.0, math.nan, 2.0, 2.0, 2.0]))
    np.testing.assert_allclose(smoothed(constant, 3).y, 2.0)
    assert smoothed(line, 1) is line
    spike = Curve("x", np.arange(9.0), np.array([0, 0, 0, 0, 9.0, 0, 0, 0, 0]))
    np.testing.assert_allclose(smoothed(spike, 3).y, [0, 0, 0, 3, 3, 3, 0, 0, 0])


def test_windows_are_odd():
    assert [default_window(points) for points in (0, 99, 100, 1000)] == [1, 1, 3, 21]


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=400), st.integers(2, 60))
def test_thinning_keeps_the_extremes(values, points):
    curve = Curve("x", np.arange(len(values), dtype=float), np.array(values))
    thin = thinned(curve, points)
    assert len(thin.y) <= max(points, 2) or len(values) <= points
    if not curve.is_empty:
        assert (np.nanmin(thin.y), np.nanmax(thin.y)) == (np.nanmin(curve.y), np.nanmax(curve.y))
    assert (np.diff(thin.x) > 0).all()


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_lie_inside_and_are_round(low, span):
    high = low + span
    if high <= low:
        return
    found = ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), span)
    assert all(low - slack <= value <= high + slack for value in found)
    assert len(found) <= 8


def test_tick_text():
    texts = [tick_text(value) for value in (0, 2, 0.5, 1500, 20_000, 3e6, 2e9, 0.0003, 1.5e-5, -4)]
    assert texts == ["0", "2", "0.5", "1500", "20k", "3M", "2G", "3e-4", "1.5e-5", "-4"]


def test_bounds_of_awkward_curves():
    def of(*values):
        return Curve("x", np.arange(float(len(values))), np.array(values, dtype=float))

    assert bounds([]) == (0.0, 1.0)
    assert bounds([of(math.nan)]) == (0.0, 1.0)
    low, high = bounds([of(3, 3)])
    assert low < 3 < high
    assert bounds([of(-1, 10, 100)], log=True) == (10.0, 100.0)
    assert bounds([of(*[1.0] * 99, *[2.0] * 99, 1e9)], robust=True)[1] == 2.0


def test_single_point_can_be_drawn():
    curve = curve_of("loss", [step(7, 2.0)], "loss")
    for log in (False, True):
        ElementTree.fromstring(line_chart([Line(curve, "dots")], name="one", y_label="y", log=log))
