"""`megactl schedule`: text, comparison, JSON, pictures, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megactl.cli import main


def said(capsys, *words: str, code: int = 0) -> str:
    assert main(["schedule", *words]) == code
    out, err = capsys.readouterr()
    return out if code == 0 else err


def test_a_timeline_with_what_it_costs(capsys):
    lines = said(capsys, "1f1b", "--pp", "2", "--micro-batches", "3").splitlines()
    assert lines[:3] == [
        "rank 0 |F0 F1 ......B0=== F2 B1=== ...B2=== ",
        "rank 1 |...F0 B0=== F1 B1=== F2 B2=== ......",
        "1f1b: 2 ranks, 3 micro-batches, 2 stages; time 12, bubble 33.3 % of ideal",
    ]
    facts = [" ".join(line.split()) for line in lines[4:]]
    assert facts == [
        "bubble: 33.3 % of the computing time: a rank waits 3 beside 9 of work",
        "published: (p-1)/m = 33.3 % (Narayanan et al. 2021, arXiv:2104.04473, sections 2.2.1 and 2.2.2)",
        "live: 2 1 micro-batches on ranks 0 to 1, at most",
    ]


def test_times_are_of_a_whole_rank(capsys):
    """Two chunks do the same work: the computing time does not change, the bubble is halved."""
    one, two = (json.loads(said(capsys, "1f1b", "--json", "--vpp", vpp, "--forward", "3", "--backward", "5")) for vpp in "12")
    assert one["ideal_time"] == two["ideal_time"] == 8 * 8
    assert two["bubble"]["idle"] == pytest.approx(one["bubble"]["idle"] / 2)
    assert two["stage_to_rank"] == [0, 1, 2, 3] * 2
    assert one["live_micro_batches"] == [4, 3, 2, 1] and two["live_micro_batches"] == [5.5, 4.5, 3.5, 2.5] == two["live_bound"]


def test_the_document_has_every_computation(capsys):
    document = json.loads(said(capsys, "zb-h2", "--pp", "3", "--micro-batches", "5", "--weight-gradient", "0.5", "--json"))
    assert document["times"] == {"forward": 1, "input_gradient": 1.5, "weight_gradient": 0.5, "transfer": 0}
    spans = [span for row in document["timeline"] for span in row]
    assert sum(span["end"] - span["start"] for span in spans) == pytest.approx(3 * 5 * 3)
    assert {span["kind"] for span in spans} == {"F", "I", "W", "B"}
    bubble = document["bubble"]
    assert bubble["published"]["idle"] == bubble["own_idle"] == 2 * (1 + 1.5 - 2 * 0.5)
    assert max(span["end"] for span in spans) == document["time"] == pytest.approx(document["ideal_time"] + bubble["idle"])


def test_all_of_them_compared(capsys):
    found = {(row["schedule"], row["chunks"]): row for row in json.loads(said(capsys, "--json"))}
    assert list(found) == [("gpipe", 1), ("1f1b", 1), ("1f1b", 2), ("zb-h1", 1), ("zb-h2", 1), ("zb-v", 2)]
    table = said(capsys, "--vpp", "4")
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in table.splitlines() if line.startswith("  ")}
    assert " ".join(rows["1f1b", "4"]) == "26.25 9.4 % 9.4 % 9.4 % 4.75"
    assert rows["zb-h2", "1"][-1] == "7" and rows["gpipe", "1"][-1] == "8"
    assert ("1f1b", "2") not in rows and "F 1, I 1, W 1, transfer 0" in table
    # Where a formula was not published for these numbers, nothing stands for it.
    unlike = said(capsys, "--backward", "3", "--weight-gradient", "2").splitlines()
    assert next(line for line in unlike if line.startswith("  zb-v")).split()[-2:] == ["-", "4"]


def test_what_a_global_step_loses_is_said(capsys):
    text = said(capsys, "zb-v")
    assert "0.0 % from each rank's own first to its own last computation" in text and "a gradient norm" in text
    assert "one on one chunk counts 1/2" in text
    assert "a gradient norm" not in said(capsys, "1f1b")


def test_wide_timelines_are_cut_where_asked(capsys):
    rows = said(capsys, "gpipe", "--micro-batches", "64", "--width", "60").splitlines()
    assert all(len(row) == 60 and row.endswith(">") for row in rows[:4])
    assert len(said(capsys, "gpipe", "--micro-batches", "64").splitlines()[0]) > 500


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_pictures(capsys, tmp_path: Path, ending: str):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    path = tmp_path / f"v.{ending}"
    assert main(["schedule", "zb-v", "--plot", str(path)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("rank 0 |") and str(path) in err
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(start)


MISTAKES = [
    (["zbv"], "schedule zbv: is not known; did you mean zb-v?"),
    (["interleaved"], "did you mean 1f1b?"),
    (["qqq"], "use one of gpipe, 1f1b, zb-h1, zb-h2, zb-v"),
    (["gpipe", "--vpp", "2"], "--vpp 2 with gpipe: it has 1 chunk on each rank; leave --vpp out, or use 1f1b"),
    (["zb-v", "--vpp", "4"], "--vpp 4 with zb-v: it has 2 chunks on each rank"),
    (["1f1b", "--pp", "1", "--vpp", "2"], "--vpp 2 with --pp 1: one rank waits for no other"),
    (["1f1b", "--pp", "0"], "--pp 0: must be at least 1"),
    (["1f1b", "--micro-batches", "-3"], "--micro-batches -3: must be at least 1"),
    (["1f1b", "--pp", "1000", "--micro-batches", "1000"], "up to 3,000,000 computations"),
    (["1f1b", "--forward", "0"], "--forward 0: must be a time above 0"),
    (["1f1b", "--transfer", "-1"], "--transfer -1: must be a time above 0"),
    (["1f1b", "--backward", "inf"], "--backward inf: must be a time above 0"),
    (["1f1b", "--forward", "nan"], "--forward nan: must be a time above 0"),
    (["1f1b", "--weight-gradient", "2"], "--weight-gradient 2: is part of the backward, 2; such as 1"),
    (["1f1b", "--forward", "0.0001", "--backward", "9"], "too unlike for one picture"),
    (["--plot", "a.png"], "--plot a.png: draws one schedule; name it, such as 1f1b"),
    (["1f1b", "--plot", "a.gif"], "--plot a.gif: ends in no format that can be drawn; use .png, .svg, .pdf"),
    (["1f1b", "--width", "3"], "--width 3: must be at least 20"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_mistakes(capsys, words: list[str], message: str):
    err = said(capsys, *words, code=2)
    assert err.startswith("error: ") and message in err and "problems" not in err, err


def test_all_mistakes_at_once(capsys):
    err = said(capsys, "zb", "--pp", "0", "--forward", "-1", "--plot", "x.gif", code=2)
    assert "4 problems" in err


def test_a_picture_that_cannot_be_written(capsys, tmp_path: Path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    assert main(["schedule", "1f1b", "--plot", str(tmp_path / "absent" / "a.png")]) in (1, 2)
    assert "absent" in capsys.readouterr().err
