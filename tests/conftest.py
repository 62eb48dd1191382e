"""What every test may use: a fixed seed, and the folder of shared reference material where it is present."""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_lab import Slurm, slurm_lab

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """Undo what nohup, or a shell that starts jobs in the background, has set: every command the tests start would inherit it."""
    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Seed every generator a test could draw from; torch and numpy only where a test has imported them, for they start slowly."""
    random.seed(1234)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(1234)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(1234)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout; the test is skipped where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}, which is not here")
    return folder


@pytest.fixture(scope="session")
def real_slurm(shared: Path) -> Iterator[Slurm]:
    """A real Slurm of two virtual nodes; the test is skipped where none can be started."""
    with slurm_lab(shared) as found:
        yield found
