"""ZeRO 2 and 3 equal one process: layouts, batches, units and tiles."""

from __future__ import annotations

import pytest

from parity.cases import Case
from parity.harness import Parity

TOLERANCE = 1e-9

CASES = [
    Case(dp=2, zero=2, bucket=1, tied=False, micro_batches=3, dropout=0.1),
    Case(dp=2, zero=2, overlap=False, bucket=40_000_000, documents="reset"),
    Case(dp=2, zero=2, pp=2, micro_batches=3, dropout=0.1),
    Case(dp=2, zero=3, micro_batches=3, dropout=0.1, documents="reset"),
    Case(dp=2, zero=3, prefetch=0, tied=False, threshold=100, overlap=False),
    Case(dp=2, zero=3, prefetch=2, split_layers=True, bucket=1),
    Case(dp=2, zero=3, threshold=10_000_000, norm="post", split_layers=True),
    Case(dp=2, zero=3, tile=2, dropout=0.1, threshold=100),
    Case(dp=2, zero=3, tp=2, tile=4, split_layers=True, gelu="erf", prefetch=2),
    Case(dp=2, zero=3, pp=2, micro_batches=3, dropout=0.1, ramp=True),
    Case(dp=2, zero=3, pp=2, vpp=2, tile=2, tied=False, micro_batches=4),
    Case(dp=2, zero=2, pp=2, schedule="zb-h1", micro_batches=4, dropout=0.1),
    Case(dp=2, zero=3, pp=2, schedule="zb-v", micro_batches=4, split_layers=True),
    Case(dp=2, zero=3, model="bert", norm="post", threshold=0, prefetch=2, micro_batches=3),
    Case(dp=2, zero=2, model="bert", tp=2, dropout=0.1),
    Case(dp=2, zero=3, pp=2, model="bert", tile=2, overflow=True, scale=2.0**40),
    Case(dp=4, zero=3, overflow=True, dropout=0.1, documents="eod", attention="unfused"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)
