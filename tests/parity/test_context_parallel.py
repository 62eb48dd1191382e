"""Each rank holds a part of every sequence, and the run equals one process in float64 to 1e-9: ring and all-to-all, GPT and BERT."""

from __future__ import annotations

import pytest

from parity.cases import Case
from parity.harness import Parity

TOLERANCE = 1e-9
A2A = {"cp_method": "all-to-all"}
BERT = {"model": "bert"}

CASES = [
    Case(cp=2),
    Case(cp=2, attention="unfused"),
    Case(cp=2, dropout=0.1, micro_batches=3, tied=False),
    Case(cp=2, documents="reset", norm="post"),
    Case(cp=2, documents="reset", attention="sdpa"),
    Case(cp=2, **A2A, documents="eod"),
    Case(cp=2, **A2A, dropout=0.1, documents="reset", micro_batches=1),
    Case(cp=2, **BERT),
    Case(cp=2, **BERT, dropout=0.1, norm="post", micro_batches=3),
    Case(cp=2, **BERT, sentence=False, padding=False, attention="unfused"),
    Case(cp=2, **BERT, **A2A, dropout=0.1),
    Case(cp=4, documents="reset", dropout=0.1, micro_batches=3),
    Case(cp=4, documents="eod", bucket=1, zero=1),
    Case(cp=4, **A2A, dropout=0.1, documents="reset"),
    Case(cp=4, **BERT, dropout=0.1),
    Case(cp=4, **BERT, **A2A, norm="post", zero=1),
    Case(cp=2, tp=2, dropout=0.1, documents="reset"),
    Case(cp=2, tp=2, **A2A, dropout=0.1, tied=False),
    Case(cp=2, tp=2, **BERT, dropout=0.1, norm="post"),
    Case(cp=2, pp=2, dropout=0.1, micro_batches=3, documents="reset"),
    Case(cp=2, pp=2, **BERT, dropout=0.1, micro_batches=3),
    Case(cp=2, pp=2, **A2A, schedule="gpipe", documents="eod"),
    Case(cp=2, dp=2, zero=1, dropout=0.1, documents="eod", overlap=False),
    Case(cp=2, dp=2, zero=1, **BERT, **A2A, dropout=0.1),
    Case(cp=2, dp=2, ramp=True, overflow=True, clip=0.0),
    Case(cp=2, recompute="selective", dropout=0.1, documents="reset"),
    Case(cp=2, recompute="full", dropout=0.1, **BERT),
    Case(cp=2, positions="rope", normalization="rmsnorm", activation="swiglu", kv_heads=2, bias=False, documents="reset"),
    Case(cp=2, positions="rope", kv_heads=4, tp=2, dropout=0.1),
    Case(cp=4, positions="rope", kv_heads=2, attention="unfused", **A2A),
    Case(cp=2, zero=2, dropout=0.1, documents="reset"),
    Case(cp=2, dp=2, zero=3, dropout=0.1, tied=False),
    Case(cp=2, zero=3, split_layers=True, tile=2, recompute="full", **BERT, **A2A),
    Case(cp=2, tp=2, sp=True, dropout=0.1, documents="reset", micro_batch=3),
    Case(cp=2, tp=2, sp=True, **BERT, dropout=0.1, micro_batch=1),
    Case(cp=2, tp=2, sp=True, **A2A, dropout=0.1, recompute="selective", tied=False),
    Case(cp=2, tp=2, pp=2, sp=True, **BERT, dropout=0.1, micro_batches=3, zero=1),
    Case(cp=2, pp=2, vpp=2, dropout=0.1, documents="reset"),
    Case(cp=2, pp=2, schedule="zb-h1", micro_batches=3, **A2A, dropout=0.1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_divided_sequence_equals_a_whole_one(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)
