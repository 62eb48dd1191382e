"""The workers and the references, both kept for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from parity.harness import Parity
from parity.pool import Pools


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """Gloo workers by world size."""
    made = Pools()
    yield made
    made.close()


@pytest.fixture(scope="session")
def parity(pools: Pools) -> Parity:
    """Runs cases and their references."""
    return Parity(pools)
