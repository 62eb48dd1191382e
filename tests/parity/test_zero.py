"""ZeRO 2 and 3 equal one process, whatever lies in memory that nobody has written, and FSDP2."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from megactl.config.schema import Run
from megactl.engine.models.layers import MicroBatch
from parity.cases import Case, Plan, with_settings
from parity.comparison import differing_bits
from parity.corpus import Corpus
from parity.harness import Parity
from parity.pool import Pools, Worker
from parity.reference import Arrays, _adamw, batch_of, build_model, canonical_parameters, torch_arithmetic, visible
from parity.test_no_sync import FROM_HOST, step_under_watch

TOLERANCE = 1e-9

LLAMA = {"positions": "rope", "normalization": "rmsnorm", "activation": "swiglu", "bias": False}

CASES = [
    Case(dp=2, zero=2, bucket=1, tied=False, micro_batches=3, dropout=0.1),
    Case(dp=2, zero=2, overlap=False, bucket=40_000_000, documents="reset"),
    Case(dp=2, zero=2, pp=2, micro_batches=3, dropout=0.1),
    Case(dp=2, zero=3, micro_batches=3, dropout=0.1, documents="reset"),
    Case(dp=2, zero=3, prefetch=0, tied=False, threshold=100, overlap=False),
    Case(dp=2, zero=3, prefetch=2, split_layers=True, bucket=1),
    Case(dp=2, zero=3, threshold=10_000_000, norm="post", split_layers=True),
    Case(dp=2, zero=3, tile=2, dropout=0.1, threshold=100),
    Case(dp=2, zero=3, tp=2, tile=4, split_layers=True, gelu="erf", prefetch=2),
    Case(dp=2, zero=3, pp=2, micro_batches=3, dropout=0.1, ramp=True),
    Case(dp=2, zero=3, pp=2, vpp=2, tile=2, tied=False, micro_batches=4),
    Case(dp=2, zero=2, pp=2, schedule="zb-h1", micro_batches=4, dropout=0.1),
    Case(dp=2, zero=3, pp=2, schedule="zb-v", micro_batches=4, split_layers=True),
    Case(dp=2, zero=3, model="bert", norm="post", threshold=0, prefetch=2, micro_batches=3),
    Case(dp=2, zero=2, model="bert", tp=2, dropout=0.1),
    Case(dp=2, zero=3, pp=2, model="bert", tile=2, overflow=True, scale=2.0**40),
    Case(dp=4, zero=3, overflow=True, dropout=0.1, documents="eod", attention="unfused"),
    Case(dp=2, zero=3, tp=2, tile=2, **LLAMA, kv_heads=4, dropout=0.1, split_layers=True),
    Case(dp=2, zero=3, tile=2, **LLAMA | {"bias": True}, threshold=100, tied=False),
    Case(dp=2, zero=3, tp=2, sp=True, tile=2, split_layers=True, threshold=100, micro_batches=3),
    Case(cp=2, zero=3, dropout=0.1, threshold=100),
    Case(cp=2, dp=2, zero=2, micro_batches=3, bucket=1, overlap=False),
    Case(dp=2, zero=2, recompute="full", dropout=0.1, micro_batches=3),
    Case(dp=2, zero=3, recompute="full", recompute_layers=2, layers=3, prefetch=0, split_layers=True, dropout=0.1),
    Case(dp=2, zero=3, recompute="full", recompute_layers=2, layers=3, tile=2, prefetch=2, threshold=100, norm="post"),
    Case(dp=2, zero=3, recompute="selective", pp=2, schedule="zb-h1", micro_batches=4, model="bert"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)


@pytest.mark.parametrize("case", CASES[::4], ids=lambda case: case.name)
def test_nothing_reads_memory_that_nobody_has_written(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE, mutation="memory that comes is not empty")


@pytest.mark.parametrize("case", [Case(dp=2, zero=3, dropout=0.1), Case(dp=2, tp=2, zero=3, precision="bf16", dropout=0.1)], ids=str)
@pytest.mark.parametrize(
    "other", [{"zero": 1}, {"zero": 2}, {"prefetch": 0}, {"overlap": False}, {"split_layers": True}, {"threshold": 1000}], ids=str
)
def test_what_is_shared_and_when_does_not_change_a_bit(parity: Parity, case: Case, other: dict):
    # With more micro-batches ZeRO 1 adds them up before the replicas do. The norm is a sum over shards, which are other ones, and
    # clipping would bring its rounding into the weights.
    case = with_settings(case, micro_batches=1, clip=0.0)
    one, two = parity.engine(case), parity.engine(with_settings(case, **other))
    assert [result.losses for result in one] == [result.losses for result in two]
    assert [line for line in differing_bits(one, two) if not line.startswith("losses or norms")] == []


def test_tiles_by_outputs_do_not_change_a_bit_of_the_first_loss(parity: Parity):
    case = Case(dp=2, zero=3, dropout=0.1, steps=1)
    one, two = (parity.engine(with_settings(case, tile=tile))[0].losses for tile in (1, 2))
    assert one == pytest.approx(two, rel=1e-14)


@pytest.mark.parametrize(
    "case",
    [Case(dp=2, zero=2, bucket=1), Case(dp=2, zero=3, precision="bf16", prefetch=2), Case(dp=2, zero=3, tile=2, split_layers=True)],
    ids=lambda case: case.name,
)
def test_a_step_reads_nothing_back(pools: Pools, case: Case):
    for found, seen in pools.run(case.world_size, step_under_watch, case, None):
        assert found == {FROM_HOST: 1} and seen > 100


def train_with_fsdp2(worker: Worker, run: Run, corpus: Corpus, plan: Plan) -> Arrays:
    """The reference model under torch's FSDP2 instead of this engine: the weights after the steps of `plan`, whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with torch_arithmetic():
        model = build_model(run.model, run.training.seed)
        mesh = init_device_mesh("cpu", (worker.world_size,))
        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        parameters = canonical_parameters(model)
        optimizer = _adamw(run, parameters)
        for iteration, start, size, rate in plan.steps():
            optimizer.zero_grad()
            _fsdp_loss(model, run, corpus, worker, iteration, start, size).backward()
            nn.utils.clip_grad_norm_(parameters.values(), run.optimizer.clip_grad or math.inf)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        return {name: p.full_tensor().detach().numpy().copy() for name, p in parameters.items()}


def _fsdp_loss(model: nn.Module, run: Run, corpus: Corpus, worker: Worker, iteration: int, start: int, size: int) -> torch.Tensor:
    """This rank's share of the loss, times the ranks, over which FSDP2 takes the mean."""
    own = size // worker.world_size
    batch = batch_of(run, corpus, start + worker.rank * own, own)
    rng = torch.tensor([run.training.seed, iteration, worker.rank * own])
    logits = model(batch.tokens, MicroBatch(rng, batch.position_ids, visible(batch)))
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    return losses * worker.world_size / (size * run.training.seq_length)


@pytest.mark.parametrize("settings", [{}, {"tied": False, "split_layers": True}, {"tile": 2, "prefetch": 2}], ids=str)
def test_weights_are_those_of_fsdp2(parity: Parity, pools: Pools, settings: dict):
    case = Case(dp=2, zero=3, micro_batches=1, **settings)
    theirs = pools.run(2, train_with_fsdp2, case.run(), parity.corpus(case), case.plan())[0]
    for result in parity.engine(case):
        assert result.weights.keys() == theirs.keys()
        for name, piece in result.weights.items():
            assert np.abs(piece.values - theirs[name]).max() < 1e-9 * max(1.0, np.abs(theirs[name]).max()), name
