"""`megactl bench train` and `bench recompute` on CPU ranks: rows in one start, and the losses of rows that compute the same thing."""

from __future__ import annotations

import json
import signal

import pytest
from train_harness import Runs, clean_environment, wait_for

from megactl.commands.bench_recompute import MODELS

TRAIN = ["bench", "train", "--preset", "gpt-tiny", "--mock-data", "--device", "cpu", "--seq", "32", "--json"]
RECOMPUTE = ["bench", "recompute", "--device", "cpu", "--layers", "2", "--hidden", "64", "--seq", "32", "--setting", "megactl", "--json"]


def of_rows(rows: list[str]) -> list[str]:
    """The rows as options."""
    return [word for row in rows for word in ("--row", row)]


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_rows_with_host_memory_have_the_loss_of_those_without(train: Runs, ranks: str):
    # One micro-batch: the sum of several is taken in another order by stage 0, which is what one rank makes of 3 without offload.
    rows = ["--zero 3", "--zero 3 --offload optimizer", "--zero 3 --offload optimizer,parameters", "--zero 3 --offload parameters"]
    # Below the usual threshold all matrices of this model stay whole, and no share of them goes to the host.
    options = ["--persistence-threshold", "0", "--gbs", ranks, "--iterations", "1"]
    done = train.command(*TRAIN, "--nproc", ranks, *options, *of_rows(rows), "--run-dir", "run")
    assert done.code == 0, done.err
    found = json.loads(done.out)["rows"]
    assert [row["row"] for row in found] == rows and len({row["loss"] for row in found}) == 1
    assert all(row["predicted_mib"] < found[0]["predicted_mib"] or ranks == "1" for row in found[1:])


def test_rows_of_one_model_have_one_loss(train: Runs):
    rows = ["--dp 2", "--pp 2 --schedule gpipe", "--tp 2"]
    options = ["--nproc", "2", "--gbs", "4", "--iterations", "2", "--run-dir", "run", "--markdown", "t.md"]
    done = train.command(*TRAIN, *options, *of_rows(rows))
    assert done.code == 0, done.err
    found = json.loads(done.out)["rows"]
    assert [row["row"] for row in found] == rows
    assert [list(row["layout"].values()) for row in found] == [[1, 1, 2, 1], [1, 1, 1, 2], [2, 1, 1, 1]]
    losses = [row["loss"] for row in found]
    assert max(losses) - min(losses) < 1e-4 and 5 < losses[0] < 6
    assert all(row["peak_mib"] is None and row["predicted_mib"] > 1 and row["tokens_per_s"] > 0 for row in found)
    assert found[0]["time_over_first"] == 1
    assert (train.folder / "t.md").read_text().count("\n") == 2 + len(rows)


def test_two_ranks_go_through_the_list(train: Runs):
    strategies = ("baseline", "selective")
    options = ["--nproc", "2", "--layout", "2x1", "--layout", "3x1", *(word for name in strategies for word in ("--strategy", name))]
    files = ["--run-dir", "run", "--markdown", "table.md", "--plot", "t.svg"]
    done = train.command(*RECOMPUTE, "--iterations", "2", *options, *files)
    document = json.loads(done.out)
    assert done.code == document["exit_code"] == 0, done.err
    assert document["left_out"] == [f"{name}, tp 3, pp 1: needs 3 ranks or a multiple, and there are 2" for name in MODELS]
    rows = document["rows"]
    assert [(row["model"], row["tp"], row["strategy"]) for row in rows] == [(model, 2, name) for model in MODELS for name in strategies]
    for row in rows:
        # The study's model has 24 layers: nothing of it stands beside another model's row.
        assert row["ms"] > 0 and row["peak_mib"] is None and row["study_ms"] is None
    losses = {(row["model"], row["strategy"]): row["loss"] for row in rows}
    assert all(losses[model, "baseline"] == losses[model, "selective"] for model in MODELS)
    assert "## gpt-345m, tp 2, pp 1" in (train.folder / "table.md").read_text()
    assert (train.folder / "t.svg").read_text().startswith("<?xml")
    assert "left out: bert-345m, tp 3, pp 1" in done.err


def test_ctrl_c_ends_after_the_row_and_shows_what_was_done(train: Runs):
    rows = ["--dp 2", "--pp 2", "--tp 2"]
    options = ["--nproc", "2", "--gbs", "4", "--iterations", "60", "--run-dir", "run", *of_rows(rows)]
    command = train.zygote.begin((*TRAIN, *options), cwd=train.folder, environment=clean_environment())
    wait_for(lambda: (train.folder / "run" / "rows.jsonl").exists(), command.alive)
    command.signal(signal.SIGINT)
    done = command.wait()
    found = json.loads(done.out)
    assert done.code == found["exit_code"] == 130
    assert [row["row"] for row in found["rows"]] == rows[: len(found["rows"])] and 1 <= len(found["rows"]) < 3
    assert "SIGINT received: this row is the last one" in done.err and "interrupted: these are the rows" in done.err


def test_a_page_that_cannot_be_written_costs_no_rows(train: Runs):
    options = ["--nproc", "1", "--gbs", "1", "--iterations", "1", "--run-dir", "run", "--row", "--dp 1", "--markdown", "/dev/full"]
    done = train.command(*(word for word in TRAIN if word != "--json"), *options)
    assert done.code == 2 and "--dp 1" in done.out
    assert "/dev/full: cannot be written" in done.err
