"""The comparison can fail: each fault that is built into the engine is seen, and seen as what it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from parity.cases import Case
from parity.comparison import deviations, differing_bits
from parity.harness import Parity
from parity.jobs import Piece, RankResult
from parity.mutations import MUTATIONS

TOLERANCE = 1e-9


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_is_seen(parity: Parity, name: str):
    case = MUTATIONS[name].case()
    assert not parity.deviations(case, TOLERANCE), "the case must agree without the fault"
    found = parity.deviations(case, TOLERANCE, mutation=name)
    assert any(line.startswith(MUTATIONS[name].seen_as) for line in found), found[:5]


@pytest.fixture(scope="module")
def small(parity: Parity) -> tuple[Case, list[RankResult]]:
    case = Case(tp=2, micro_batches=1)
    return case, parity.engine(case)


def changed(result: RankResult, name: str, **values: object) -> RankResult:
    """The result with one gradient piece of its last step changed."""
    piece = replace(result.gradients[-1][name], **values)
    return replace(result, gradients=(*result.gradients[:-1], result.gradients[-1] | {name: piece}))


@pytest.mark.parametrize("size, seen", [(3e-9, True), (3e-10, False)])
def test_the_bound_is_tight(parity: Parity, small: tuple[Case, list[RankResult]], size: float, seen: bool):
    case, results = small
    name = "layers.1.mlp.up.weight"
    piece: Piece = results[1].gradients[-1][name]
    bad = changed(results[1], name, values=piece.values + size * np.linalg.norm(piece.values) / piece.values.size**0.5)
    found = deviations([results[0], bad], parity.reference(case), TOLERANCE)
    assert bool(found) == seen and all("step 3 layers.1.mlp.up.weight on rank 1" in line for line in found)


def test_a_swapped_rectangle_is_seen(parity: Parity, small: tuple[Case, list[RankResult]]):
    case, results = small
    name = "layers.0.attention.qkv.weight"
    other = results[1].gradients[-1][name]
    found = deviations([changed(results[0], name, values=other.values), results[1]], parity.reference(case), TOLERANCE)
    assert any(f"step 3 {name} on rank 0: off by" in line for line in found)
    found = deviations([changed(results[0], name, rectangle=other.rectangle), results[1]], parity.reference(case), TOLERANCE)
    assert any(line.endswith(f"{name}: no rank holds all of it") for line in found)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_one_is_seen(parity: Parity, small: tuple[Case, list[RankResult]], value: float):
    case, results = small
    bad = replace(results[1], losses=(value, *results[1].losses[1:]))
    assert any(line.startswith("loss on rank 1, step 1") for line in deviations([results[0], bad], parity.reference(case), TOLERANCE))
    name = "final_norm.weight"
    bad = changed(results[1], name, values=results[1].gradients[-1][name].values * value)
    assert any(f"{name} on rank 1" in line for line in deviations([results[0], bad], parity.reference(case), TOLERANCE))


def test_one_bit_is_seen(small: tuple[Case, list[RankResult]]):
    _, results = small
    name = "final_norm.bias"
    values = results[1].gradients[-1][name].values.copy()
    values[0] = np.nextafter(values[0], np.inf)
    assert differing_bits(results, results) == []
    assert differing_bits(results, [results[0], changed(results[1], name, values=values)]) == [f"{name} on rank 1"]
