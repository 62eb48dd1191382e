"""Loss scaling changes no bit of float64, and fp16 agrees over layouts: within its rounding, and exactly in what is skipped and when."""

from __future__ import annotations

import math

import pytest

from parity.cases import Case, with_settings
from parity.comparison import deviations, differing_bits
from parity.harness import Parity
from parity.jobs import RankResult

# fp16 has eleven bits of significand, eight times as fine as bf16 (measured: losses 0.00013, tensors 0.0034).
LOSS_TOLERANCE, TENSOR_TOLERANCE = 0.0005, 0.006
# 64 to 256 tokens a step: 16 for a token, as a run would derive it, is about this.
SCALE = 2.0**11

LAYOUTS = [
    Case(tp=2, dropout=0.1, documents="reset"),
    Case(pp=2, micro_batches=3, dropout=0.1),
    Case(dp=2, zero=0, documents="eod"),
    Case(dp=2, zero=1, tied=False, documents="eod"),
    Case(tp=2, pp=2, dp=2, zero=0),
    Case(pp=2, micro_batches=3, schedule="zb-v", documents="reset"),
    Case(tp=2, pp=2, dp=2, zero=1, dropout=0.1, documents="eod"),
]


def named(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", [Case(), *LAYOUTS], ids=named)
def test_scaling_by_powers_of_two_changes_no_bit_of_float64(parity: Parity, case: Case):
    """The scale falls after step 2 and grows after step 4, 2^40 is far from 1: whatever is not divided by it shows."""
    plain = with_settings(case, steps=5, overflow=True)
    scaled = with_settings(plain, scale=2.0**40, window=2)
    results = parity.engine(scaled)
    assert results[0].scales == (2.0**40, 2.0**40, 2.0**39, 2.0**39, 2.0**40) == scaled.scales()
    bare = [RankResult(**(vars(result) | {"scales": (1.0,) * 5})) for result in results]
    assert differing_bits(bare, parity.engine(plain)) == []


def test_a_scaled_run_equals_one_process(parity: Parity):
    case = Case(tp=2, pp=2, dp=2, zero=1, scale=2.0**40, window=1, overflow=True, steps=5, documents="eod")
    assert not parity.deviations(case, 1e-9)


@pytest.fixture(scope="module")
def fp16(parity: Parity) -> dict[str, tuple[Case, list[RankResult]]]:
    """fp16 runs by name of the case."""
    cases = [with_settings(case, precision="fp16", scale=SCALE) for case in (Case(), *LAYOUTS)]
    return {case.name: (case, parity.engine(case)) for case in cases}


def test_fp16_is_near_the_float64_reference(parity: Parity, fp16: dict[str, tuple[Case, list[RankResult]]]):
    for case, results in fp16.values():
        reference = parity.reference(case)
        assert not deviations(results, reference, TENSOR_TOLERANCE, scales=case.scales()), case.name
        for result in results:
            assert result.losses == results[0].losses and not any(result.skipped)
            assert result.losses == pytest.approx(reference.losses, rel=LOSS_TOLERANCE), case.name
            assert result.losses != pytest.approx(reference.losses, rel=1e-7), "not computed in fp16"


def test_fp16_keeps_masters_gradients_and_moments_in_fp32(fp16: dict[str, tuple[Case, list[RankResult]]]):
    for case, results in fp16.values():
        for facts in (result.facts for result in results):
            assert facts["module_dtypes"] == facts["param_dtypes"] == {"torch.float16"}
            for kind in ("grad", "master", "exp_avg", "exp_avg_sq"):
                assert facts[f"{kind}_dtypes"] == {"torch.float32"}, kind
            share = facts["parameters"] // (case.dp if case.zero else 1)
            assert facts["state"] == facts["masters"] == share and facts["module_grads"] == 0, case.name


@pytest.mark.parametrize("case", [Case(), *LAYOUTS], ids=named)
def test_planted_overflows_skip_the_same_steps_everywhere(parity: Parity, case: Case):
    case = with_settings(case, precision="fp16", scale=SCALE, window=2, overflow=True, steps=5)
    results = parity.engine(case)
    assert not deviations(results, parity.reference(case), TENSOR_TOLERANCE, case.plan().overflows, case.scales())


@pytest.mark.parametrize("case", [Case(), LAYOUTS[0], LAYOUTS[1], LAYOUTS[-1]], ids=named)
def test_real_overflows_lower_the_scale_until_fp16_holds_the_gradients(parity: Parity, case: Case):
    """A scale that is 2^8 times too large: 2^16 for a token ends in infinity, and the run finds its way down by itself."""
    results = parity.engine(with_settings(case, precision="fp16", scale=2.0**24, steps=12))
    skipped = results[0].skipped
    assert all((result.skipped, result.scales) == (skipped, results[0].scales) for result in results)
    assert skipped[:3] == (1.0,) * 3 and skipped[-1] == 0.0
    lost = [int(sum(skipped[:step])) for step in range(12)]
    assert results[0].scales == tuple(2.0 ** (24 - count) for count in lost)
    assert all(math.isfinite(loss) for loss in results[0].losses)


def test_what_backward_starts_from_matters(parity: Parity):
    """The reason for all this. 2^-8 x 2^-10 for a token is what an unscaled batch of a quarter of a million tokens starts from."""
    case = with_settings(LAYOUTS[-1], precision="fp16", scale=2.0**-10)
    assert deviations(parity.engine(case), parity.reference(case), 10 * TENSOR_TOLERANCE)
