"""`megactl bench train`: rows of options in one start, their losses, and every mistake of every row."""

from __future__ import annotations

import json

import pytest

from megactl.cli import main
from megactl.commands.bench_train import read_options
from megactl.errors import ConfigError

BASE = ["bench", "train", "--preset", "gpt-tiny", "--mock-data", "--device", "cpu", "--nproc", "2", "--seq", "32", "--gbs", "4"]


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_rows_with_host_memory_have_the_loss_of_those_without(capfd, tmp_path, ranks):
    # One micro-batch: the sum of several is taken in another order by stage 0, which is what one rank makes of 3 without offload.
    rows = ["--zero 3", "--zero 3 --offload optimizer", "--zero 3 --offload optimizer,parameters", "--zero 3 --offload parameters"]
    options = [word for row in rows for word in ("--row", row)]
    command = [*BASE, "--nproc", ranks, "--gbs", ranks, "--iterations", "1", *options, "--json", "--run-dir", str(tmp_path / "run")]
    assert main(command) == 0
    found = json.loads(capfd.readouterr().out)["rows"]
    assert [row["row"] for row in found] == rows and len({row["loss"] for row in found}) == 1
    assert all(row["predicted_mib"] < found[0]["predicted_mib"] or ranks == "1" for row in found[1:])


def test_rows_of_one_model_have_one_loss(capfd, tmp_path):
    rows = ["--dp 2", "--pp 2 --schedule gpipe", "--tp 2"]
    options = [word for row in rows for word in ("--row", row)]
    command = [*BASE, "--iterations", "2", *options, "--json", "--run-dir", str(tmp_path / "run"), "--markdown", str(tmp_path / "t.md")]
    assert main(command) == 0
    document = json.loads(capfd.readouterr().out)
    assert [row["row"] for row in document["rows"]] == rows
    assert [list(row["layout"].values()) for row in document["rows"]] == [[1, 1, 2, 1], [1, 1, 1, 2], [2, 1, 1, 1]]
    losses = [row["loss"] for row in document["rows"]]
    assert max(losses) - min(losses) < 1e-4 and 5 < losses[0] < 6
    assert all(row["peak_mib"] is None and row["predicted_mib"] > 1 and row["tokens_per_s"] > 0 for row in document["rows"])
    assert document["rows"][0]["time_over_first"] == 1
    assert (tmp_path / "t.md").read_text().count("\n") == 2 + len(rows)


def test_every_mistake_of_every_row(capsys):
    assert main([*BASE, "--row", "--tp 3", "--row", "--tpp 2 --pp"]) == 2
    message = capsys.readouterr().err
    assert "--row '--tp 3': --tp 3" in message and "did you mean --tp" in message and "--pp: needs a value" in message


def test_rows_are_needed_and_use_as_many_ranks(capsys):
    assert main(BASE) == 2
    assert "--row: is not given" in capsys.readouterr().err
    assert main(["bench", "train", "--preset", "gpt-tiny", "--mock-data", "--device", "cpu", "--row", "--tp 2", "--row", "--tp 4"]) == 2
    assert "the rows need different numbers of ranks" in capsys.readouterr().err


def test_options_in_a_text():
    found = read_options("--tp=2 --tensor-parallel 2 --no-overlap-grad-reduce --data '1 a 2 b'")
    assert found == {
        "parallel.tensor_parallel": ("--tp", "2"),
        "parallel.overlap_grad_reduce": ("--no-overlap-grad-reduce", False),
        "data.data": ("--data", "1 a 2 b"),
    }
    with pytest.raises(ConfigError, match="cannot be read"):
        read_options("--data 'a")
