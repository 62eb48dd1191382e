"""BERT in every layout equals one process in float64, to 1e-9: losses, every gradient of every step, norms, weights after three steps."""

from __future__ import annotations

import pytest

from parity.cases import Case, each_value, full, layouts, main_factors, of_layout, other_factors, pairwise_rows, with_settings
from parity.harness import Parity

TOLERANCE = 1e-9

ALONE = [
    Case(model="bert", micro_batches=3, dropout=0.1),
    Case(model="bert", micro_batches=3, norm="post", padding=False, sentence=False, gelu="erf", tied=False),
]
SMALL = [*ALONE, *each_value(2, "bert"), *each_value(4, "bert"), *of_layout((2, 2, 1), pairwise_rows, "bert")]
LARGE = [
    *of_layout((2, 2, 2), lambda factors, seed: pairwise_rows(factors, seed=seed)[:6], "bert"),
    Case(tp=4, pp=2, model="bert", norm="post"),
]
STEPS = [
    Case(pp=2, dp=2, zero=1, micro_batches=2, ramp=True, dropout=0.1, model="bert"),
    Case(tp=2, pp=2, overflow=True, clip=0.0, norm="post", model="bert"),
]
REST = [case for n in (2, 4, 8) for case in full(n, "bert") if case not in {*SMALL, *LARGE}]


def show(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", dict.fromkeys([*SMALL, *LARGE, *STEPS]), ids=show)
def test_bert_equals_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)


ONE_SAMPLE = Case(model="bert", micro_batch=1, micro_batches=1)


@pytest.mark.parametrize("case", [with_settings(ONE_SAMPLE, pp=2), with_settings(ONE_SAMPLE, cp=2, zero=2)], ids=show)
def test_a_batch_without_a_masked_token_has_no_loss_of_them(parity: Parity, case: Case):
    assert 0.0 in [parts[0] for parts in parity.reference(case).parts]
    assert not parity.deviations(case, TOLERANCE)


@pytest.mark.nightly
@pytest.mark.parametrize("case", dict.fromkeys(REST), ids=show)
def test_the_rest_of_bert_equals_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)


def test_berts_matrix_holds_what_it_promises():
    for layout in [*layouts(2), *layouts(4)]:
        cases = [vars(case) for case in SMALL if (case.tp, case.pp, case.dp) == layout]
        for name, values in {**main_factors(*layout[1:], "bert"), **other_factors(layout[2], "bert")}.items():
            assert {case[name] for case in cases} == set(values), (layout, name)


def test_both_losses_and_padding_are_exercised(parity: Parity):
    case = ALONE[0]
    reference = parity.reference(case)
    assert all(len(parts) == 2 and min(parts) > 0.1 for parts in reference.parts)
    corpus, size = parity.corpus(case), 2
    masked = [corpus.batch(first, size).loss_mask.sum().item() for first in range(0, 12, size)]
    assert len(set(masked)) > 3 and 0.0 in masked, "micro-batches must differ in their number of masked tokens, down to none"
    assert (
        not corpus.batch(0, 12).padding_mask.all(1).all()
        and parity.corpus(Case(model="bert", padding=False)).batch(0, 12).padding_mask.all()
    )
