"""Faults of the pipeline: split backward, several stages a rank, scatter-gather."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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
