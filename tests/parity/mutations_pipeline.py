"""Faults of the pipeline: split backward, several stages a rank, scatter-gather."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from megactl.engine import (
    boundary,
    data_parallel,
    functional,
    pipeline,
    training_step,
)
from parity.faults import Mutation, changed, nothing, patched, twice


def _armed_early(original: Callable) -> Callable:
    """Buckets that leave when a unit's input gradient is there, of a backward that puts its weight gradients off."""

    def mutated(self, queue):
        if queue is not None:
            self.arm()

    return mutated


def _first_copy_alone(original: Callable) -> Callable:
    """The sum reaches only the copy that the norm counts."""

    def mutated(optimizers, embedding):
        tied = [state.grad for optimizer in optimizers for state in optimizer.states if state.bucket.tied]
        before = tied[-1].clone() if tied else None
        original(optimizers, embedding)
        if tied:
            tied[-1].copy_(before)

    return mutated


def _next_share(original: Callable) -> Callable:
    """Each rank sends the share of its neighbour."""
    return lambda self, tensor: tensor.contiguous().view(self.shares, -1)[(self.tp.rank + 1) % self.shares]


def _before_it_is_filled(original: Callable) -> Callable:
    """The second part of a backward that runs before the first."""

    def mutated(self, action, received):
        if (action.virtual_stage, action.microbatch) in self.split:
            self.live[action.virtual_stage, action.microbatch].deferred.run()
        original(self, action, received)
        if (action.virtual_stage, action.microbatch) in self.deferred:
            self.deferred[action.virtual_stage, action.microbatch] = functional.WeightQueue()

    return mutated


def _first_input_gradient(original: Callable) -> Callable:
    """Every micro-batch but the last overwrites."""

    def mutated(self, part, m):
        return replace(original(self, part, m), accumulate=m == self.schedule.num_microbatches - 1)

    return mutated


def _other_shares(original: Callable) -> Callable:
    """Copies that lie at different places of their stages' buffers: the last stage adds one replica's share to another's."""

    def mutated(optimizers, embedding):
        states = [state for optimizer in optimizers for state in optimizer.states if state.bucket.tied]
        if embedding is None or embedding.rank == 0:
            return original(optimizers, embedding)
        for state in states:
            state.grad.copy_(state.grad.roll(state.grad.numel() // 2))
        original(optimizers, embedding)

    return mutated


def _not_shared(original: Callable) -> Callable:
    """Losses and counts of this rank alone; the norm is that of all."""

    def mutated(self, sums, counts, stop):
        totals = original(self, sums, counts, stop)
        return torch.cat([totals[:2], sums * self._reports_loss, counts * self._reports_loss])

    return mutated


def _mean_of_one_micro_batch(original: Callable) -> Callable:
    """Backward of each micro-batch starts from its own mean, and nobody divides by their number."""

    def mutated(self, held, size):
        return original(self, held, self.run.training.micro_batch_size * self.mesh.dp.size)

    return mutated


def _last_rank_reports(original: property) -> property:
    return property(lambda self: float(self.mesh.tp.rank == 0 and self.mesh.pp.rank == self.mesh.pp.size - 1))


PIPELINE = {
    "W runs before its I": Mutation(
        patched(pipeline._Step, "_backward", _before_it_is_filled),
        (1, 2, 1),
        "gradient in step 1",
        {"schedule": "zb-h1", "micro_batches": 3},
    ),
    "the first W adds to the last step": Mutation(
        patched(pipeline._Step, "_micro_batch", changed(accumulate=True)),
        (1, 2, 1),
        "gradient in step 2",
        {"schedule": "zb-h1", "micro_batches": 3},
    ),
    "later Ws overwrite": Mutation(
        patched(pipeline._Step, "_micro_batch", _first_input_gradient),
        (1, 2, 1),
        "gradient in step 1",
        {"schedule": "zb-v", "micro_batches": 3},
    ),
    "buckets leave before W": Mutation(
        patched(data_parallel.GradientReducer, "defer_to", _armed_early),
        (1, 2, 2),
        "gradient in step 1",
        {"schedule": "zb-h1", "bucket": 1, "micro_batches": 3},
    ),
    "a tied copy is summed twice": Mutation(
        patched(training_step, "reduce_tied", twice), (1, 2, 1), "gradient in step 1 embedding.tokens.weight", {"schedule": "zb-v"}
    ),
    "two tied copies on one rank are not summed": Mutation(
        patched(training_step, "reduce_tied", nothing), (1, 2, 1), "gradient in step 1 embedding.tokens.weight", {"schedule": "zb-v"}
    ),
    "only one tied copy gets the sum": Mutation(
        patched(training_step, "reduce_tied", _first_copy_alone),
        (1, 2, 1),
        "gradient in step 1 embedding.tokens.weight",
        {"schedule": "zb-v"},
    ),
    "shares of a tied copy meet other shares": Mutation(
        patched(training_step, "reduce_tied", _other_shares), (1, 2, 2), "gradient in step 1 embedding.tokens.weight", {"zero": 1}
    ),
    "the loss stays on the last stage": Mutation(
        patched(training_step.TrainingStep, "_totals", _not_shared), (1, 2, 1), "loss on rank 0, step 1: 0.0"
    ),
    "gradients are a sum over micro-batches": Mutation(
        patched(training_step.TrainingStep, "_loss_gradient", _mean_of_one_micro_batch),
        (1, 2, 2),
        "gradient in step 1",
        {"zero": 3, "micro_batches": 3},
    ),
    "the last rank reports the loss of a V": Mutation(
        patched(training_step.TrainingStep, "_reports_loss", _last_rank_reports),
        (1, 2, 1),
        "loss on rank 0, step 1",
        {"schedule": "zb-v"},
    ),
    "scatter-gather mixes up the shares": Mutation(
        patched(boundary.Boundary, "to_send", _next_share), (2, 2, 1), "loss on rank 0, step 1", {"micro_batches": 3}
    ),
}
