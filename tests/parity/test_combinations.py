"""Combinations of techniques equal one process: a covering set, and hundreds more by night, drawn from a seed."""

from __future__ import annotations

import os

import pytest

from parity.cases import Case
from parity.combinations import FACTORS, covering, covering_set, drawn, is_allowed, pairs, values_of
from parity.harness import Parity

# float64 to 1e-9. In float32 two orders of summation are as far apart as this in the deepest of these models.
TOLERANCES = {"fp64": 1e-9, "fp32": 1e-4}
SEED = int(os.environ.get("MEGACTL_PARITY_SEED", "20261121"))
COUNT = int(os.environ.get("MEGACTL_PARITY_COUNT", "300"))


def show(case: Case) -> str:
    return case.name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Draw only where the drawn cases will run: it takes seconds."""
    if "drawn_case" in metafunc.fixturenames:
        wanted = "nightly" in metafunc.config.getoption("-m").replace("not nightly", "")
        metafunc.parametrize("drawn_case", drawn(SEED, COUNT) if wanted else [], ids=show)


@pytest.mark.parametrize("case", covering_set(), ids=show)
def test_a_covering_set_equals_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCES[case.precision])


@pytest.mark.nightly
def test_drawn_combinations_equal_one_process(parity: Parity, drawn_case: Case):
    assert not parity.deviations(drawn_case, TOLERANCES[drawn_case.precision])


def test_the_fixed_set_is_allowed_and_holds_every_value():
    cases = covering_set()
    assert all(is_allowed(values_of(case)) for case in cases)
    for name, values in FACTORS.items():
        assert {getattr(case, name) for case in cases} == set(values), name


def test_the_draw_reaches_every_value():
    cases = drawn(5, 60)
    for name, values in FACTORS.items():
        assert len({getattr(case, name) for case in cases}) == len(set(values)) or name == "offload", name
    assert cases == drawn(5, 60) and len(set(cases)) == 60
    assert {case.world_size for case in cases} == {2, 4, 8}


def test_the_covering_set_holds_every_pair_of_its_pool():
    chosen = covering(seed=2, pool=40, world_sizes=(2, 4))
    wanted = set().union(*map(pairs, drawn(2, 40, (2, 4))))
    assert set().union(*map(pairs, chosen)) == wanted and len(chosen) < 40


def test_what_the_configuration_refuses_is_no_combination():
    refused = {"tp": 1, "sp": True}
    assert not is_allowed(values_of(Case()) | refused) and is_allowed(values_of(Case()))
