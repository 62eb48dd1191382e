"""What context parallelism sends, counted: bytes and messages of one layer, by the formulas of docs/parallelism.md; and repeatability."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megactl.engine import context_parallel, ring_attention
from megactl.engine.training_step import TrainingStep
from parity.cases import MICRO_BATCH, Case
from parity.comparison import differing_bits
from parity.corpus import SEQ_LENGTH, Corpus
from parity.harness import Parity
from parity.jobs import source
from parity.pool import Pools, Worker

ELEMENT = 8  # bytes in fp64, of what is sent and of what is summed
HIDDEN = 32


def count_bytes(worker: Worker, case: Case) -> tuple[int, int]:
    """(bytes, messages) that this rank sends to others for attention in one training step."""
    run = case.run()
    mesh = worker.mesh(run.parallel)
    sent: list[int] = []
    exchange, all_to_all = ring_attention.exchange, context_parallel.all_to_all

    def counted_exchange(sends, receives, group):
        sent.append(sum(tensor.numel() * tensor.element_size() for tensor, _ in sends))
        return exchange(sends, receives, group)

    def counted_all_to_all(output, tensor, group):
        # What a rank keeps for itself is not sent.
        sent.append(tensor.numel() * tensor.element_size() * (case.cp - 1) // case.cp)
        return all_to_all(output, tensor, group)

    step, batches = TrainingStep(run, mesh), source(run, Corpus(64), mesh)
    with (
        mock.patch.object(ring_attention, "exchange", counted_exchange),
        mock.patch.object(context_parallel, "all_to_all", counted_all_to_all),
    ):
        step.step(1, lambda index: batches(0, index), global_batch_size=run.training.global_batch_size, learning_rate=0.01)
    return sum(sent), len(sent)


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("tp", [1, 2])
def test_the_ring_sends_what_the_formula_says(pools: Pools, cp: int, tp: int):
    case = Case(cp=cp, tp=tp, micro_batches=1)
    both = 2 * MICRO_BATCH * SEQ_LENGTH * HIDDEN * ELEMENT // (cp * tp)
    # Forward: keys and values go cp - 1 hops; backward: again, and their gradients, in the type of sums, cp hops.
    layer = (cp - 1) * both + (cp - 1) * both + cp * both
    layers = case.run().model.num_layers
    for sent in pools.run(case.world_size, count_bytes, case):
        assert sent == (layers * layer, layers * (cp - 1 + cp + 1))


@pytest.mark.parametrize("cp", [2, 4])
def test_all_to_all_sends_what_the_formula_says(pools: Pools, cp: int):
    case = Case(cp=cp, cp_method="all-to-all", micro_batches=1)
    hidden = MICRO_BATCH * SEQ_LENGTH * HIDDEN * ELEMENT // cp
    # q, k, v and the result, forward and backward; a rank keeps 1 / cp of each.
    layer = 2 * (3 + 1) * hidden * (cp - 1) // cp
    layers = case.run().model.num_layers
    for sent in pools.run(case.world_size, count_bytes, case):
        assert sent == (layers * layer, layers * 4)


@pytest.mark.parametrize("case", [Case(cp=4, dropout=0.1, documents="reset"), Case(cp=4, cp_method="all-to-all")], ids=lambda c: c.name)
def test_a_run_repeats_bit_for_bit(parity: Parity, case: Case):
    assert not differing_bits(parity.engine(case), parity.engine(case))


def saved_by_a_core(worker: Worker, case: Case, length: int) -> int:
    """Elements that attention keeps for backward, those of q, k and v counted once."""
    run = case.run()
    mesh = worker.mesh(run.parallel)
    core = TrainingStep(run, mesh).parts[0].model.layers["0"].attention.core
    b, n, d = 2, 8, 4
    qkv = torch.randn(b, length, n, 3, d, dtype=torch.float64, requires_grad=True)
    q, k, v = (part.transpose(1, 2) for part in (qkv * 1.0).unbind(3))
    rows = torch.arange(b * length).view(b, length)
    micro_batch = context_parallel.MicroBatch(torch.tensor([1, 1, 0]), rows, rows=rows)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        core(q, k, v, micro_batch)
    return sum(kept.values())


@pytest.mark.parametrize("attention", ["auto", "unfused"])
def test_the_ring_keeps_no_keys_of_others_and_no_scores(pools: Pools, attention: str):
    case, length = Case(cp=2, attention=attention, dropout=0.1 if attention == "unfused" else 0.0), 8
    rows = 2 * 8 * length
    for kept in pools.run(2, saved_by_a_core, case, length):
        # q, k, v, the result, and the log-sum-exp of each row.
        assert kept == 4 * rows * 4 + rows
