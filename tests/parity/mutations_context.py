"""Faults of context parallelism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import arange, cat, float64, ones_like
from torch.distributed import get_rank, get_world_size

from megactl.engine import block_attention, context_parallel, parallelize, ring_attention, training_step
from megactl.engine.mesh import Axis
from megactl.engine.models import rotary
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


def _own_mean(original: Callable) -> Callable:
    """The mean over ranks of the means of each rank's tokens; a rank without tokens has none."""

    return lambda self, sums, counts, stop: original(self, sums / counts, ones_like(counts), stop)


def _own_tokens(original: Callable) -> Callable:
    """Backward starts from the mean over this rank's tokens, of which the ranks of a sequence take the mean again."""

    def mutated(self, held, size):
        own = sum(batch.loss_mask.sum(dtype=float64) for batch in held)
        return (1 / (own * self.mesh.replicas.size)).unsqueeze(0)

    return mutated


def _twice_over_the_sequence(original: Callable) -> Callable:
    """A loss that was multiplied by the ranks of a sequence, where gradients are summed over them."""
    return lambda self, *arguments: original(self, *arguments) * self.mesh.cp.size


def _places_at_hand(original: Callable) -> Callable:
    """The last stage, which is the second half of the ranks, takes its angles from a table that nobody has cut."""

    def mutated(self, ids):
        late = get_rank() >= get_world_size() // 2
        return original(self, arange(ids.shape[1]).expand_as(ids) if late else ids)

    return mutated


CONTEXT = {
    "each rank of a sequence takes the mean of its own tokens": Mutation(
        patched(training_step.TrainingStep, "_totals", _own_mean),
        (1, 1, 1),
        "loss on rank 0, step 1: nan",
        # The second half of the first two pairs has no masked token.
        {"cp": 2, "model": "bert", "sentence": False, "micro_batch": 1, "micro_batches": 1, "steps": 2},
    ),
    "each rank of a sequence divides by its own tokens": Mutation(
        patched(training_step.TrainingStep, "_loss_gradient", _own_tokens), (1, 1, 1), "gradient in step 1", {"cp": 2, "documents": "eod"}
    ),
    "the loss is multiplied by the ranks of a sequence": Mutation(
        patched(training_step.TrainingStep, "_loss_gradient", _twice_over_the_sequence),
        (1, 1, 2),
        "gradient in step 1",
        {"cp": 2, "scale": 2.0**40},
    ),
    "a later stage's angles are those of whole sequences": Mutation(
        patched(rotary.RotaryAngles, "__call__", _places_at_hand),
        (1, 2, 1),
        "loss on rank 0, step 1",
        {"cp": 2, "positions": "rope", "zero": 3},
    ),
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
