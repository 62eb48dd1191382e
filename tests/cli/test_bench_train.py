"""`megactl bench train`: rows of options, and every mistake of every row. tests/train runs some."""

from __future__ import annotations

import pytest

from megactl.cli import main
from megactl.commands.bench_train import read_options
from megactl.errors import ConfigError

BASE = ["bench", "train", "--preset", "gpt-tiny", "--mock-data", "--device", "cpu", "--nproc", "2", "--seq", "32", "--gbs", "4"]


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
