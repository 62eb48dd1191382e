"""Every layout equals one process in float64, to 1e-9: losses, every gradient of every step, norms, weights after three steps."""

from __future__ import annotations

import itertools

import pytest

from parity.cases import (
    Case,
    all_pairs,
    each_value,
    full,
    layouts,
    main_factors,
    of_layout,
    other_factors,
    pairs_of,
    pairwise,
    pairwise_rows,
)
from parity.harness import Parity

TOLERANCE = 1e-9

# In full where a case is cheap. Eight ranks on a small machine are slow: there each value, and pairs where all three axes meet; by day
# of each layout one case, and some where all three axes meet.
SMALL = [Case(micro_batches=3, documents="reset", dropout=0.1), *full(2), *pairwise(4)]
VALUES, PAIRS = list(each_value(8)), list(of_layout((2, 2, 2), pairwise_rows))
LARGE = [*VALUES, *PAIRS]
LARGE_BY_DAY = [*{(case.tp, case.pp, case.dp): case for case in VALUES}.values(), *PAIRS[:5]]
LARGE_BY_NIGHT = [case for case in LARGE if case not in LARGE_BY_DAY]
STEPS = [
    Case(pp=4, micro_batches=4, ramp=True, documents="eod", dropout=0.1),
    Case(pp=2, dp=2, zero=1, micro_batches=2, ramp=True, documents="reset"),
    Case(tp=2, micro_batches=2, ramp=True, overflow=True),
    Case(tp=2, pp=2, overflow=True, documents="eod", clip=0.0),
    Case(dp=4, zero=1, overflow=True, dropout=0.1),
    Case(pp=2, dp=2, overflow=True, tied=False),
]
REST = [case for case in (*full(4), *full(8)) if case not in {*SMALL, *LARGE}]


def show(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", dict.fromkeys(SMALL), ids=show)
def test_up_to_four_ranks_equal_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)


@pytest.mark.parametrize("case", dict.fromkeys(LARGE_BY_DAY), ids=show)
def test_eight_ranks_equal_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)


@pytest.mark.nightly
@pytest.mark.parametrize("case", dict.fromkeys(LARGE_BY_NIGHT), ids=show)
def test_more_of_eight_ranks_equals_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)


@pytest.mark.parametrize("case", STEPS, ids=show)
def test_a_growing_batch_and_a_skipped_step_equal_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)


@pytest.mark.nightly
@pytest.mark.parametrize("case", REST, ids=show)
def test_the_rest_of_the_full_product_equals_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)


def test_the_matrix_holds_what_it_promises():
    assert [len(layouts(n)) for n in (1, 2, 4, 8)] == [1, 3, 6, 10]
    run = {*SMALL, *LARGE}
    for layout in [*layouts(2), *layouts(4), *layouts(8)]:
        cases = [vars(case) for case in run if (case.tp, case.pp, case.dp) == layout]
        for name, values in {**main_factors(*layout[1:]), **other_factors(layout[2])}.items():
            assert {case[name] for case in cases} == set(values), (layout, name)


def test_pairwise_rows_hold_every_pair():
    factors = main_factors(4, 2) | other_factors(2)
    rows = pairwise_rows(factors, seed=1)
    assert set().union(*map(pairs_of, rows)) == all_pairs(factors)
    assert len(all_pairs(factors)) == sum(len(a) * len(b) for a, b in itertools.combinations(factors.values(), 2))
    assert len(rows) < 30 and rows == pairwise_rows(factors, seed=1)
