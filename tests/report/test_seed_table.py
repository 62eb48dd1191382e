"""The TFLOPs column computed again, against every row of the seeds' tables."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megactl.costmodel.flops import seed_tflops
from megactl.report.markdown import split_lines
from megactl.report.seed_table import Given, TableReport, regenerate

SHARED = Path(__file__).resolve().parents[3] / "shared"
TABLES = SHARED / "data" / "seed-tables"
SEED_1024 = Given(seq_length=1024)
needs_seeds = pytest.mark.skipif(not TABLES.exists(), reason="the seeds are not beside the repository")


def seed(number: str) -> str:
    (path,) = (SHARED / "seeds").glob(f"{number}_*.txt")
    return path.read_bytes().decode("utf-8", "surrogateescape")


def rows_of(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((TABLES / name).open()))


def run(text: str, **given_values) -> TableReport:
    return regenerate(text, seed_tflops, Given(**{"seq_length": 1024, **given_values}))


@needs_seeds
def test_every_row_of_seed_003_has_the_verdict_of_the_check() -> None:
    report = regenerate(seed("003"), seed_tflops, SEED_1024)
    verdicts = {"match": "match", "speed-rounding": "rounding", "MISMATCH": "mismatch"}
    expected = {
        int(row["seed_line"]): (row["tflops_table"], row["tflops_formula"], verdicts[row["verdict"]])
        for row in rows_of("003_tflops_check.csv")
    }
    assert {row.line: (row.old, f"{row.computed:.2f}", row.verdict) for row in report.rows} == expected
    assert [row.line for row in report.by_verdict("mismatch")] == [180, 213, 433]
    assert [(row.line, row.because) for row in report.by_verdict("rounding")] == [(231, "speed"), (250, "speed"), (466, "speed")]
    for row in rows_of("003_tflops_check.csv"):
        (found,) = (item for item in report.rows if item.line == int(row["seed_line"]))
        assert f"{found.least:.2f}" == row["formula_low_speed_rounding"] and f"{found.most:.2f}" == row["formula_high_speed_rounding"]


@needs_seeds
def test_every_inconsistent_layout_of_seed_003_is_found_and_no_other() -> None:
    report = regenerate(seed("003"), seed_tflops, SEED_1024)
    assert [(str(item.line), item.problem) for item in report.inconsistent] == [
        (row["seed_line"], row["problem"]) for row in rows_of("003_structure_check.csv")
    ]
    assert report.assumed == {"tp": "4, which the text names 10 times"}
    assert [item.line for item in report.skipped] == [421, 487]
    # TP given by hand says the same.
    assert run(seed("003"), tp=4).inconsistent == report.inconsistent


@needs_seeds
def test_only_the_six_cells_of_seed_003_change_and_a_second_time_nothing_does() -> None:
    text = seed("003")
    report = regenerate(text, seed_tflops, SEED_1024)
    old, new = split_lines(text), split_lines(report.text)
    changed = {number: (one, other) for number, (one, other) in enumerate(zip(old, new, strict=True), start=1) if one != other}
    assert sorted(changed) == [180, 213, 231, 250, 433, 466]
    assert all(len(one) == len(other) and sum(a != b for a, b in zip(one, other, strict=True)) <= 3 for one, other in changed.values())
    assert changed[180][1].split("|")[11] == "   49.7 "
    again = regenerate(report.text, seed_tflops, SEED_1024)
    assert again.text == report.text and {row.verdict for row in again.rows} == {"match"}
    # Another line end, the same cells.
    dos = regenerate(text.replace("\n", "\r\n"), seed_tflops, SEED_1024)
    assert dos.text == report.text.replace("\n", "\r\n")


@needs_seeds
def test_seed_001_has_two_header_lines_no_speed_and_no_contradiction() -> None:
    text = seed("001")
    report = run(text, seq_length=2048)
    assert report.text == text and report.rows == [] and report.inconsistent == []
    assert [(item.line, item.problem) for item in report.skipped] == [(35, "the table has no column Speed")]
    wrong = run(text.replace("| 512 | 3072 |", "| 512 | 3000 |"))
    assert [item.problem for item in wrong.inconsistent] == ["TP*PP*DP=8*64*6=3072 != GPUs 3000"]


def table(header: str, *rows: str) -> str:
    dashes = "|".join(["---"] * (header.strip("|").count("|") + 1))
    return "\n".join([header, f"|{dashes}|" if header.startswith("|") else dashes, *rows, ""])


def test_units_in_headers_and_cells_and_other_names() -> None:
    text = table(
        "World size | Model size | Seq len | Global batch size | Time (ms) | TFLOPs/GPU", "64 | 52B | 2048 | 1,024 | 127000 | **1**"
    )
    (row,) = run(text).rows
    assert row.computed == pytest.approx(seed_tflops(billions=52, seconds=127, gpus=64, global_batch=1024, seq_length=2048))
    assert row.new == "**107**" and row.verdict == "mismatch"
    assert run(text.replace("127000", "127s")).rows[0].computed == row.computed


def test_what_a_table_does_not_have_is_given_or_follows() -> None:
    text = table("| Nodes | MBS | GAS | DP | Speed | TFlops |", "| 16 | 4 | 256 | 1 | 127s |  |")
    assert run(text).skipped[0].problem == "the table has no column GPUs and no column Size"
    (row,) = run(text, gpus_per_node=4, billions=52.0).rows
    assert row.verdict == "filled" and row.new == "53.7" and row.old is None
    assert run(text, gpus_per_node=4, billions=52.0).text.splitlines()[2].endswith("| 127s | 53.7 |")


def test_rows_that_cannot_be_computed_say_why_and_stay() -> None:
    rows = [
        "64 | 52B | 1024 | OOM |",
        "64 | 52B | | 127s | 3.0",
        "64 | 52B | 1024 | 0s | 3.0",
        "64 | 52B | 1024 | 127s | fail",
        "64 | 52B",
        "1e99 | 52B | 1024 | 127s |",
    ]
    text = table("GPUs | Size | GBS | Speed | TFlops", *rows)
    report = run(text)
    assert report.text == text and report.rows == []
    assert [item.problem for item in report.skipped] == [
        "Speed is 'OOM', not a number above 0", "GBS is empty", "Speed is '0s', not a number above 0", "TFlops is 'fail', not a number",
        "the row ends before Speed", "GPUs is '1e99', which no run has",
    ]  # fmt: skip


def test_rounding_of_the_size_is_named() -> None:
    text = table("GPUs | Size | GBS | Speed | TFlops", "16 | 18B | 4 | 1.381s | 27.3")
    (row,) = run(text).rows
    assert (row.verdict, row.because) == ("rounding", "speed and size")


def test_the_text_names_tp_only_where_it_does_not_contradict_itself() -> None:
    rows = table("GPUs | Size | PP | DP | GBS | Speed | TFlops", "16 | 18B | 8 | 1 | 256 | 90.5s | 26.1")
    assert run(f"TP=4\n\n{rows}").inconsistent[0].problem == "TP*PP*DP=4*8*1=32 != GPUs 16"
    for words in ("", "TP=4 and TP=2", "PP*TP=8*4", "STEP=4", "with TP"):
        report = run(f"{words}\n\n{rows}")
        assert report.inconsistent == [] and report.assumed == {}
    assert run(f"TP=4\n\n{rows}", tp=2).inconsistent == []


def test_a_batch_must_be_a_multiple_where_nothing_says_how_often() -> None:
    rows = table(
        "GPUs | Size | MBS | DP | GBS | Speed | TFlops", "64 | 52B | 48 | 16 | 768 | 122s | 41.9", "64 | 52B | 48 | 16 | 800 | 122s | 1"
    )
    assert [item.problem for item in run(rows).inconsistent] == ["GBS 800 is no multiple of MBS*DP=48*16=768"]


def test_two_tflops_columns_are_left_alone() -> None:
    text = table("GPUs | Size | GBS | Speed | TFlops | TFLOPs/GPU", "64 | 52B | 1024 | 127s | 1 | 2")
    report = run(text)
    assert report.text == text and "two columns are TFLOPs" in report.skipped[0].problem


words = st.sampled_from(
    ["|", "| ", "-", ":-:", "---", "\n", "\r\n", " ", "GPUs", "Size", "Speed", "TFlops", "GBS", "PP", "DP", "TP=4", "64", "52B", "127s",
     "0", "1e300", "1e-300", "53.7", "OOM", "```", "\\|", "**", "٣", "\udcff"]
)  # fmt: skip
row = st.lists(st.sampled_from(["64", "52B", "1024", "127s", "53.7", "", "OOM", "1e300", "9" * 30, "0.0s", "1e-9", "5e-324"]), max_size=7)
written = st.lists(row, max_size=5).map(
    lambda rows: table("| Nodes | Size | GBS | Speed | TFlops |", *("| " + " | ".join(row) + " |" for row in rows))
)


@given(st.one_of(st.text(), st.lists(words).map("".join), written))
def test_any_text_survives_and_a_second_time_changes_nothing(text: str) -> None:
    report = run(text, gpus_per_node=8)
    again = run(report.text, gpus_per_node=8)
    assert again.text == report.text
    assert report.text.count("\n") == text.count("\n")
    if not report.rows:
        assert report.text == text
