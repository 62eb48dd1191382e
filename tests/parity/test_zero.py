"""ZeRO 2 and 3 equal one process: layouts, batches, units and tiles."""

from __future__ import annotations

import pytest

from parity.cases import Case
from parity.harness import Parity

TOLERANCE = 1e-9

CASES = [
    Case(dp=2, zero=2),
    Case(dp=2, zero=2, bucket=1, tied=False, micro_batches=3, dropout=0.1),
    Case(dp=2, zero=3),
    Case(dp=2, zero=3, micro_batches=3, dropout=0.1, documents="reset"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)
