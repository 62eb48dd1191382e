"""Optimizer and parameters in host memory: equal to one process in float64, and bit for bit to the run that keeps them on the device."""

from __future__ import annotations

from unittest import mock

import pytest

from megactl.config.schema import Run
from megactl.engine import offload
from parity.cases import Case, Plan, with_settings
from parity.comparison import differing_bits
from parity.corpus import Corpus
from parity.harness import Parity
from parity.jobs import RankResult, train
from parity.pool import Pools, Worker
from parity.test_no_sync import FROM_HOST, step_under_watch

TOLERANCE = 1e-9
OPTIMIZER = {"offload": "optimizer"}
BOTH = {"zero": 3, "offload": "optimizer,parameters"}
PARAMETERS = {"zero": 3, "offload": "parameters"}
ALL = {**BOTH, "offload": "optimizer,parameters,activations", "recompute": "full"}

CASES = [
    Case(**OPTIMIZER, dropout=0.1, micro_batches=3, documents="reset"),
    Case(**OPTIMIZER, dp=2, zero=0, bucket=1),
    Case(**OPTIMIZER, dp=2, zero=1, tied=False, clip=0.0),
    Case(**OPTIMIZER, dp=4, zero=1, dropout=0.1, bucket=40_000_000),
    Case(**OPTIMIZER, dp=2, zero=2, micro_batches=3, overflow=True, scale=2.0**40),
    Case(**OPTIMIZER, dp=4, zero=3, dropout=0.1, threshold=100),
    Case(**OPTIMIZER, dp=2, zero=1, tp=2, sp=True, dropout=0.1),
    Case(**OPTIMIZER, pp=2, dp=2, zero=1, micro_batches=3, dropout=0.1, model="bert"),
    Case(**OPTIMIZER, pp=2, schedule="zb-v", micro_batches=4, ramp=True),
    Case(**BOTH, dropout=0.1, micro_batches=3),
    Case(**BOTH, dp=2, threshold=100, overflow=True, scale=2.0**40, documents="eod"),
    Case(**BOTH, dp=2, pp=2, micro_batches=3, dropout=0.1, prefetch=2, split_layers=True),
    Case(**BOTH, tp=2, sp=True, tile=2, norm="post", prefetch=0),
    Case(**BOTH, cp=2, model="bert", dropout=0.1, overlap=False),
    Case(**PARAMETERS, micro_batches=3, dropout=0.1, tied=False),
    Case(**PARAMETERS, dp=2, pp=2, threshold=100, overflow=True, documents="reset"),
    Case(**ALL, dp=2, layers=3, recompute_layers=2, dropout=0.1, micro_batches=3),
    Case(**ALL, pp=2, dp=2, layers=6, micro_batches=4, dropout=0.1, tile=2, split_layers=True),
]


def show(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", CASES[1::3], ids=show)
def test_offload_equals_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)


@pytest.mark.nightly
@pytest.mark.parametrize("case", [case for case in CASES if case not in CASES[1::3]], ids=show)
def test_all_offload_equals_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)


# On a CPU both runs use one kernel, so that where the numbers lie and in which pieces they are worked on must not show.
IN_BITS = [
    *(with_settings(case, precision="bf16", scale=None, overflow=False) for case in CASES[::2]),
    *(with_settings(case, precision="fp32", scale=None, overflow=False) for case in CASES[1::4]),
    Case(**OPTIMIZER, dp=2, zero=1, precision="fp16", scale=2.0**11, overflow=True, dropout=0.1),
    Case(**BOTH, dp=2, precision="fp16", scale=2.0**11, overflow=True, threshold=100),
    Case(**PARAMETERS, dp=2, precision="fp16", scale=2.0**11, overflow=True, micro_batches=3),
]


@pytest.mark.parametrize("case", IN_BITS, ids=show)
def test_where_it_lies_does_not_change_a_bit(parity: Parity, case: Case):
    on_device = with_settings(case, offload="activations" if "activations" in case.offload else None)
    offloaded, kept = parity.engine(case), parity.engine(on_device)
    assert differing_bits(offloaded, kept) == []
    assert [result.scales for result in offloaded] == [result.scales for result in kept]


@pytest.mark.parametrize("case", [Case(**PARAMETERS, dp=2, precision="bf16"), Case(**PARAMETERS, precision="fp32")], ids=show)
def test_with_the_parameters_alone_a_step_reads_nothing_back(pools: Pools, case: Case):
    for found, seen in pools.run(case.world_size, step_under_watch, case, None):
        assert found == {FROM_HOST: 1} and seen > 100


def test_with_the_optimizer_a_step_reads_its_numbers_once(pools: Pools):
    case = Case(**OPTIMIZER, dp=2, zero=1, precision="bf16")
    for found, _ in pools.run(case.world_size, step_under_watch, case, None):
        # The numbers of the step, and one look at whether to skip it.
        assert found == {FROM_HOST: 1, "cpu": 1, "__bool__": 1, "_local_scalar_dense": 1}


def train_in_pieces(worker: Worker, run: Run, corpus: Corpus, plan: Plan) -> tuple[RankResult, int]:
    """What a rank does that copies 100 elements at a time; and in how many pieces it works on a part."""
    made: list[list] = []
    cut = offload._pieces

    def pieces(states, limit):
        made.append(cut(states, 100))
        return made[-1]

    with mock.patch.object(offload, "_pieces", pieces):
        return train(worker, run, corpus, plan), max(map(len, made))


@pytest.mark.parametrize(
    "case",
    [
        Case(**OPTIMIZER, dp=2, zero=1, precision="bf16"),
        Case(**BOTH, precision="fp32"),
        Case(**PARAMETERS, dp=2, precision="bf16", threshold=100),
        Case(**PARAMETERS, precision="fp32"),
    ],
    ids=show,
)
def test_how_it_is_cut_does_not_change_a_bit(parity: Parity, pools: Pools, case: Case):
    found = pools.run(case.world_size, train_in_pieces, case.run(), parity.corpus(case), case.plan())
    assert differing_bits([result for result, _ in found], parity.engine(case)) == []
    assert all(count > 100 for _, count in found)
