"""What the tests of rendered scripts share."""

from __future__ import annotations

import os

import pytest
from stub_cluster import StubCluster


@pytest.fixture
def cluster(tmp_path) -> StubCluster:
    """A folder with stand-ins for Slurm's commands."""
    return StubCluster(tmp_path)


@pytest.fixture
def slurm(capsys, monkeypatch):
    """`megactl slurm ...` in this process: (exit code, stdout, stderr). No variable of a launcher or user is seen."""
    for name in list(os.environ):
        if name.startswith(("MEGACTL_", "SLURM_", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)

    def call(*words: str) -> tuple[int, str, str]:
        from megactl.cli import main

        code = main(["slurm", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def rendered(slurm):
    """The text of `megactl slurm render` with a small run on two nodes of two GPUs, and whatever options are added."""

    def text(*words: str) -> str:
        base = ("--preset", "gpt-tiny", "--mock-data", "--nodes", "2", "--gpus-per-node", "2")
        code, out, err = slurm("render", *base, *words)
        assert code == 0, err
        return out

    return text
