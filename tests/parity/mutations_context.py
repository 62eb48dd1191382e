"""Faults of context parallelism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import arange, cat

from megactl.engine import block_attention, context_parallel, parallelize, ring_attention
from megactl.engine.mesh import Axis
from parity.faults import Mutation, patched


def _without_rescaling(original: Callable) -> Callable:
    """Blocks of attention added up as if each were the whole softmax's share."""

    def mutated(out, lse, block_out, block_lse):
        out.add_(block_out)

    return mutated


def _labels_of_the_shard(original: Callable) -> Callable:
    """The next token of the tokens at hand: at the end of a chunk that is one from elsewhere."""

    def mutated(self, batch, first_sample):
        made = original(self, batch, first_sample)
        return made._replace(labels=cat([made.tokens[:, 1:], made.labels[:, -1:]], 1))

    return mutated


def _rows_of_the_shard(original: Callable) -> Callable:
    def mutated(self, batch, first_sample):
        made = original(self, batch, first_sample)
        return made._replace(rows=made.rows - self.positions + arange(len(self.positions)))

    return mutated


def _labels_on_each_rank(original: Callable) -> Callable:
    """Every rank of a sequence counts its label, with whatever token it holds first."""
    return lambda self, batch, first: original(self, batch, first)._replace(sentence_labels=batch.sentence_labels)


def _one_replica(original: Callable) -> Callable:
    """The dp axis, which is one rank here, in place of all ranks with the same weights."""
    return lambda model, flat, mesh, **options: original(model, flat, replace(mesh, replicas=Axis()), **options)


CONTEXT = {
    "the ring merges without rescaling": Mutation(
        patched(block_attention, "merge_", _without_rescaling), (1, 1, 1), "loss on rank 0, step 1", {"cp": 2}
    ),
    "labels of a divided sequence are the next token at hand": Mutation(
        patched(context_parallel.SequenceShard, "cut", _labels_of_the_shard), (1, 1, 1), "loss on rank 0, step 1", {"cp": 2}
    ),
    "dropout of a divided sequence counts tokens at hand": Mutation(
        patched(context_parallel.SequenceShard, "cut", _rows_of_the_shard), (1, 1, 1), "loss on rank 0, step 1", {"cp": 2, "dropout": 0.1}
    ),
    "gradients of a divided sequence are summed over dp alone": Mutation(
        patched(parallelize, "GradientReducer", _one_replica), (1, 1, 1), "gradient in step 1", {"cp": 2}
    ),
    "gradients of keys stay where they were computed": Mutation(
        patched(ring_attention, "send_home", lambda original: lambda gradients, cp: gradients), (1, 1, 1), "gradient in step 1", {"cp": 2}
    ),
    "each rank of a sequence counts its label": Mutation(
        patched(context_parallel.SequenceShard, "cut", _labels_on_each_rank),
        (1, 1, 1),
        "loss on rank 0, step 1",
        {"cp": 2, "model": "bert"},
    ),
}
