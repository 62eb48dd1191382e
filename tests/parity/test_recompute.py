"""Recomputation and where its saved inputs stay: equal to one process in float64, and bit for bit to the run that keeps everything."""

from __future__ import annotations

import pytest

from parity.cases import Case, with_settings
from parity.comparison import differing_bits
from parity.harness import Parity

TOLERANCE = 1e-9
SELECTIVE = {"recompute": "selective"}
FULL = {"recompute": "full"}
PARTITION = {**FULL, "partition": True}
OFFLOAD = {**FULL, "offload": "activations"}
LLAMA = {"positions": "rope", "normalization": "rmsnorm", "activation": "swiglu", "bias": False}
KEEP = {"recompute": "none", "recompute_method": "uniform", "recompute_layers": 1, "partition": False, "offload": None}

CASES = [
    Case(**SELECTIVE, dropout=0.1, documents="reset", micro_batches=3),
    Case(**SELECTIVE, tp=2, attention="unfused", model="bert", norm="post"),
    Case(**FULL, recompute_layers=2, layers=3, dropout=0.1, documents="reset"),
    Case(**FULL, recompute_method="block", layers=3, dropout=0.1, model="bert", norm="post"),
    Case(**FULL, tp=2, dropout=0.1, documents="eod", bucket=1),
    Case(**FULL, pp=2, dp=2, zero=1, dropout=0.1, micro_batches=3, schedule="gpipe", bucket=1),
    Case(**FULL, pp=2, vpp=2, recompute_layers=2, layers=12, dropout=0.1),
    Case(**FULL, pp=2, schedule="zb-v", dp=2, zero=1, dropout=0.1, micro_batches=3, bucket=1),
    Case(**FULL, dp=2, zero=3, split_layers=True, prefetch=2, model="bert", norm="post", recompute_layers=2, layers=3),
    Case(**PARTITION, tp=2, pp=2, dropout=0.1, micro_batches=3),
    Case(**FULL, tp=2, sp=True, pp=2, dropout=0.1, micro_batches=3, offload="activations"),
    Case(**SELECTIVE, cp=2, tp=2, sp=True, dropout=0.1, documents="reset"),
    Case(**OFFLOAD, pp=2, micro_batches=4, dropout=0.1, layers=8),
    Case(**OFFLOAD, partition=True, tp=2, pp=2, micro_batches=3, layers=6, dropout=0.1, overflow=True),
]
MORE = [
    Case(**SELECTIVE, tp=2, pp=2, dp=2, zero=1, dropout=0.1, model="bert"),
    Case(**SELECTIVE, dp=2, zero=3, micro_batches=2, dropout=0.1),
    Case(**SELECTIVE, pp=2, schedule="zb-h2", micro_batches=4, dropout=0.1),
    Case(**FULL, dropout=0.1, documents="reset", micro_batches=3),
    Case(**FULL, recompute_layers=3, layers=3, norm="post", tied=False),
    Case(**FULL, recompute_method="block", recompute_layers=2, pp=2, layers=6, dropout=0.1, micro_batches=3),
    Case(**FULL, tp=2, pp=2, dp=2, zero=1, dropout=0.1, micro_batches=3, model="bert"),
    Case(**FULL, dp=2, zero=0, overlap=False, norm="post", model="bert"),
    Case(**FULL, recompute_layers=2, layers=3, dp=2, zero=3, micro_batches=3, dropout=0.1),
    Case(**FULL, dp=2, zero=3, tp=2, tile=2, micro_batches=2, dropout=0.1),
    Case(**FULL, pp=4, schedule="zb-h1", micro_batches=5, model="bert", dropout=0.1),
    Case(**PARTITION, tp=2, dropout=0.1, micro_batches=3),
    Case(**PARTITION, tp=4, recompute_layers=2, layers=3, model="bert", dropout=0.1),
    Case(**PARTITION, tp=2, dp=2, zero=1, recompute_method="block", dropout=0.1),
    Case(**PARTITION, tp=2, pp=2, vpp=2, layers=8, dropout=0.1),
    Case(**FULL, tp=4, sp=True, recompute_layers=2, layers=3, model="bert", norm="post", dropout=0.1),
    Case(**FULL, tp=2, sp=True, dp=2, zero=3, tile=2, dropout=0.1),
    Case(**FULL, cp=2, pp=2, dropout=0.1, documents="reset"),
    Case(**FULL, cp=4, model="bert", cp_method="all-to-all", dropout=0.1),
    Case(**FULL, tp=2, **LLAMA, kv_heads=2, recompute_layers=2, layers=3),
    Case(**SELECTIVE, dp=2, zero=1, **LLAMA, kv_heads=4, tied=False),
    Case(**OFFLOAD, dropout=0.1, micro_batches=3, layers=3),
    Case(**OFFLOAD, pp=2, dp=2, zero=1, micro_batches=4, dropout=0.1, layers=8),
    Case(**OFFLOAD, pp=2, micro_batches=4, schedule="gpipe", layers=6, ramp=True),
    Case(**OFFLOAD, recompute_method="block", recompute_layers=2, layers=3, model="bert", norm="post"),
    Case(**OFFLOAD, dp=2, zero=2, pp=2, layers=6, recompute_layers=2, micro_batches=3, dropout=0.1),
    Case(**OFFLOAD, pp=2, schedule="zb-v", micro_batches=4, layers=8, dropout=0.1),
]


def show(case: Case) -> str:
    return case.name


# One process in float64 says whether they are right; that they keep the bits of a run without recomputation, which others compare with
# one process, is asked of all of them in bf16, where every rounding shows.
AGAINST_ONE_PROCESS = CASES[3::4]


@pytest.mark.parametrize("case", AGAINST_ONE_PROCESS, ids=show)
def test_recomputation_equals_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)


@pytest.mark.nightly
@pytest.mark.parametrize("case", [case for case in (*CASES, *MORE) if case not in AGAINST_ONE_PROCESS], ids=show)
def test_all_recomputation_equals_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)


@pytest.mark.parametrize("case", CASES, ids=show)
def test_gradients_are_those_of_keeping_everything_bit_for_bit(parity: Parity, case: Case):
    case = with_settings(case, precision="bf16", steps=2)
    assert differing_bits(parity.engine(case), parity.engine(with_settings(case, **KEEP))) == []


@pytest.mark.nightly
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("case", [*CASES, *MORE], ids=show)
def test_gradients_in_all_types_are_those_of_keeping_everything_bit_for_bit(parity: Parity, case: Case, precision: str):
    case = with_settings(case, precision=precision)
    assert differing_bits(parity.engine(case), parity.engine(with_settings(case, **KEEP))) == []


@pytest.mark.parametrize("settings", [SELECTIVE, {**FULL, "recompute_layers": 2}], ids=str)
def test_dropout_of_torchs_generator_is_drawn_again(parity: Parity, settings: dict):
    """Inside scaled_dot_product_attention it is not Philox by element that decides, but the state of a generator."""
    case = Case(pp=2, micro_batches=3, dropout=0.1, attention="sdpa", **settings)
    assert differing_bits(parity.engine(case), parity.engine(with_settings(case, **KEEP))) == []
