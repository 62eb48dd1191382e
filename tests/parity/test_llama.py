"""Llama-shaped models, and each of their parts alone, in every kind of layout: equal to one process to 1e-9."""

from __future__ import annotations

import pytest

from parity.cases import Case, with_settings
from parity.harness import Parity

TOLERANCE = 1e-9
LLAMA = {"positions": "rope", "normalization": "rmsnorm", "activation": "swiglu", "bias": False}


def llama(**settings: object) -> Case:
    """All of it at once; four groups of two heads."""
    return Case(**{"tied": False, "kv_heads": 4, **LLAMA, **settings})


CASES = [
    llama(dropout=0.1),
    llama(tp=2, documents="reset", attention="unfused"),
    llama(tp=4, tied=True, dropout=0.1),
    llama(pp=2, micro_batches=3, tied=True, documents="reset"),
    llama(dp=2, zero=1, bucket=1, documents="eod"),
    llama(tp=2, documents="positions"),
    llama(tp=2, pp=2, dropout=0.1, schedule="gpipe"),
    llama(tp=2, dp=2, zero=1, tied=True, ramp=True),
    llama(pp=2, dp=2, zero=1, overflow=True, kv_heads=1, bias=True),
    # The second forward of recomputation and the queue of weight gradients know them, too.
    llama(tp=2, recompute="full", dropout=0.1, micro_batches=3),
    llama(tp=2, recompute="selective", attention="unfused", dropout=0.1),
    llama(pp=2, vpp=2, micro_batches=4, recompute="full"),
    llama(pp=2, tp=2, schedule="zb-h1", micro_batches=3),
    # Angles are those of a rank's own positions; shared keys travel, or are traded for heads.
    llama(cp=2, dropout=0.1, documents="reset"),
    llama(cp=2, tp=2, documents="positions"),
    llama(cp=4, cp_method="all-to-all", tied=True),
    llama(tp=2, sp=True, dropout=0.1, bias=True),
    llama(tp=2, cp=2, sp=True, recompute="full"),
    llama(dp=2, zero=3, micro_batches=3, threshold=0, recompute="full"),
    llama(dp=2, zero=3, tp=2, tile=2, split_layers=True, bias=True),
    # Each part beside what a plain GPT has otherwise.
    Case(tp=2, positions="rope", dropout=0.1),
    Case(tp=2, normalization="rmsnorm", norm="post"),
    # SwiGLU's biases are a matrix, and must not decay.
    Case(tp=2, dp=2, zero=1, activation="swiglu", bucket=1),
    Case(tp=2, kv_heads=2, attention="unfused", dropout=0.1),
    Case(tp=2, pp=2, bias=False, gelu="erf"),
    Case(model="bert", tp=2, dropout=0.1, norm="post", kv_heads=4, **LLAMA),
    Case(model="bert", pp=2, dp=2, zero=1, kv_heads=2, **LLAMA),
]


def show(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", CASES, ids=show)
def test_equals_one_process(parity: Parity, case: Case):
    assert parity.deviations(case, TOLERANCE) == []


@pytest.mark.parametrize("case", [llama(tp=2, dropout=0.1), llama(dp=2, zero=1, kv_heads=2)], ids=show)
def test_on_the_reference_operators_too(parity: Parity, case: Case):
    assert parity.deviations(case, TOLERANCE, ops="torch") == []


@pytest.mark.parametrize("case", [llama(tp=2, precision="fp32"), llama(pp=2, precision="fp32", tied=True)], ids=show)
def test_float32(parity: Parity, case: Case):
    assert parity.deviations(case, 1e-5) == []


@pytest.mark.nightly
@pytest.mark.parametrize("normalization", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kv_heads", [None, 4, 2])
@pytest.mark.parametrize("positions", ["learned", "rope"])
@pytest.mark.parametrize("model", ["gpt", "bert"])
def test_every_combination_of_parts(parity: Parity, model, positions, kv_heads, bias, activation, normalization):
    parts = {"positions": positions, "kv_heads": kv_heads, "bias": bias, "activation": activation, "normalization": normalization}
    for layout in ({"tp": 2, "pp": 2}, {"tp": 2, "dp": 2, "zero": 1, "dropout": 0.1}):
        assert parity.deviations(with_settings(Case(model=model, micro_batches=3), **parts, **layout), TOLERANCE) == []
