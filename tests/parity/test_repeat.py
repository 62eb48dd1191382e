"""The same seed and layout twice gives the same bits, with or without overlap; and facts that hold beside the numbers."""

from __future__ import annotations

import pytest

from parity.cases import Case, with_settings
from parity.comparison import differing_bits
from parity.harness import Parity
from parity.pool import Pools

REPEATED = [
    Case(tp=2, pp=2, documents="reset", dropout=0.1, micro_batches=3),
    Case(pp=2, dp=2, zero=1, documents="eod", dropout=0.1),
    Case(tp=2, dp=2, zero=1, tied=False, precision="fp32", dropout=0.1),
    Case(dp=4, zero=0, precision="bf16"),
    Case(tp=2, pp=2, dp=2, zero=1, precision="bf16", dropout=0.1, micro_batches=3),
    Case(pp=2, dp=2, zero=1, dropout=0.1, micro_batches=3, model="bert"),
    Case(pp=2, dp=2, zero=1, dropout=0.1, micro_batches=3, schedule="zb-v"),
    Case(tp=2, dp=2, zero=1, dropout=0.1, positions="rope", normalization="rmsnorm", activation="swiglu", kv_heads=2, bias=False),
]


def named(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", REPEATED, ids=named)
def test_twice_is_the_same_bit_for_bit(parity: Parity, case: Case):
    assert differing_bits(parity.engine(case), parity.engine(case)) == []


@pytest.mark.parametrize("case", [case for case in REPEATED if case.dp > 1], ids=named)
def test_overlap_does_not_change_a_bit(parity: Parity, case: Case):
    one, two = (parity.engine(with_settings(case, overlap=overlap, bucket=1)) for overlap in (True, False))
    assert differing_bits(one, two) == []
    assert all(result.facts["buckets"] > 1 for result in one)


def test_another_seed_gives_other_bits(parity: Parity):
    case = Case(tp=2, dropout=0.1)
    assert differing_bits(parity.engine(case), parity.engine(with_settings(case, seed=1))) != []


def test_new_processes_give_the_same_bits(parity: Parity):
    case = REPEATED[2]
    fresh = Pools()
    try:
        assert differing_bits(parity.engine(case), Parity(fresh).engine(case)) == []
    finally:
        fresh.close()


def test_bucket_sizes_make_one_or_several_buckets(parity: Parity):
    counts = [parity.engine(Case(dp=2, bucket=bucket))[0].facts["buckets"] for bucket in (1, 2000, 40_000_000)]
    assert counts[0] > counts[1] > counts[2] == 1


@pytest.mark.parametrize("case", [Case(tp=2), Case(tp=4, dp=2, zero=1, tied=False), Case(pp=2), Case(tp=2, model="bert")], ids=named)
def test_padding_rows_stay_out_of_everything(parity: Parity, case: Case):
    for result in parity.engine(case):
        assert result.facts["padding_weight"] == result.facts["padding_gradient"] == 0.0
