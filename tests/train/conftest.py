"""One process with torch for all training tests, and a folder for each test's runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from train_harness import Runs, Zygote


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """The process that forks commands."""
    started = Zygote(tmp_path_factory.mktemp("commands"))
    yield started
    started.close()


@pytest.fixture
def train(zygote: Zygote, tmp_path: Path) -> Iterator[Runs]:
    """Runs of this test, in its own folder."""
    runs = Runs(zygote, tmp_path)
    yield runs
    runs.end()
