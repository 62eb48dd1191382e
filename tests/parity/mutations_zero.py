"""Faults of ZeRO 2 and 3 and of tiles."""

from __future__ import annotations

from collections.abc import Callable

from megactl.engine import (
    gather,
    sharded_gradients,
    tiles,
    transient,
    zero,
)
from parity.faults import Mutation, no_gather, nothing, patched, twice


def _freed_before_use(original: Callable) -> Callable:
    """The memory of what was gathered ahead goes back and is taken again, with something else in it."""

    def mutated(self, unit, wanted):
        original(self, unit, wanted)
        for bucket in set(self._held) - wanted:
            self._finish(bucket)
            self.flat.weight_buffers[bucket].whole.fill_(0.5)

    return mutated


def _keep_begun(original: Callable) -> Callable:
    def mutated(self):
        begun = set(self._begun)
        original(self)
        self._begun = begun

    return mutated


def _as_a_step(original: Callable) -> Callable:
    """What ends a step, after each micro-batch."""

    def mutated(self):
        original(self)
        self.wait()

    return mutated


def _backwards(original: Callable) -> Callable:
    """Tiles in the opposite order: their names and places say one thing, the model computes another."""

    def mutated(self, x, micro_batch, **options):
        self.tiles = type(self.tiles)(reversed(self.tiles))
        try:
            return original(self, x, micro_batch, **options)
        finally:
            self.tiles = type(self.tiles)(reversed(self.tiles))

    return mutated


def _as_it_is(original: Callable) -> Callable:
    return lambda self, x, micro_batch: (x, None)


def _poisoned(original: Callable) -> Callable:
    def mutated(self):
        fresh = not self.nbytes
        original(self)
        if fresh:
            self.whole.fill_(float("nan"))

    return mutated


def _poisoned_gaps(original: Callable) -> Callable:
    """What nobody writes is not cleared either."""

    def mutated(self, index):
        gaps = self.flat.buckets[index].gaps
        original(self, index)
        for start, stop in gaps:
            self.flat.grad_buffers[index].whole[start:stop].fill_(1.0)

    return mutated


def _as_before_the_step(original: Callable) -> Callable:
    """Shares as they were when the first step gathered them: those of a gather that was begun before the update."""

    def mutated(self, whole):
        handle = original(self, whole)
        if handle is not None:
            handle.wait()
        self.__dict__.setdefault("before", whole.clone())
        whole.copy_(self.before)

    return mutated


def _added_to_itself(original: Callable) -> Callable:
    """What a micro-batch brings lies where the sum is."""

    def mutated(self, index, own, is_first):
        original(self, index, own, True)
        if not is_first:
            self.shards[index].add_(self.shards[index])

    return mutated


_REDUCER, _GATHERER = sharded_gradients.ShardedReducer, gather.WeightGatherer
_THREE = {"zero": 3, "micro_batches": 3}
ZERO = {
    "a shard is added twice": Mutation(
        patched(_REDUCER, "_take", twice), (1, 1, 2), "gradient in step 1", {"zero": 2, "micro_batches": 3}
    ),
    "the first micro-batch adds to the last step's shard": Mutation(
        patched(_REDUCER, "wait", _keep_begun), (1, 1, 2), "gradient in step 2", {"zero": 2}
    ),
    "later micro-batches replace the shard": Mutation(
        patched(_REDUCER, "end_micro_batch", _as_a_step), (1, 1, 2), "gradient in step 1", {"zero": 2}
    ),
    "gaps between gradients enter the norm": Mutation(
        patched(_REDUCER, "_open", _poisoned_gaps), (1, 1, 2), "norm on rank 0, step 1", {"zero": 2}
    ),
    "a prefetched unit is freed before use": Mutation(
        patched(_GATHERER, "_enter", _freed_before_use), (1, 1, 2), "loss on rank 0, step 1", _THREE
    ),
    "gathered weights outlive the step": Mutation(patched(_GATHERER, "_release", nothing), (1, 1, 2), "loss on rank 0, step 2", _THREE),
    "the weights of the step before are gathered": Mutation(
        patched(gather.DeviceShard, "gather", _as_before_the_step), (1, 1, 2), "loss on rank 0, step 2", _THREE | {"prefetch": 2}
    ),
    "a lone replica's gradients are added to themselves": Mutation(
        patched(_REDUCER, "_take", _added_to_itself), (1, 1, 1), "gradient in step 1", _THREE
    ),
    "whole weights are not gathered": Mutation(
        patched(zero, "all_gather", no_gather), (1, 1, 2), "weight", {"zero": 3, "threshold": 100}
    ),
    "tiles change places": Mutation(
        patched(tiles.TiledRow, "forward", _backwards), (1, 1, 2), "loss on rank 0, step 1", _THREE | {"tile": 2}
    ),
    "tiles are not summed over ranks in backward": Mutation(
        patched(tiles.TiledColumn, "_entered", _as_it_is), (2, 1, 2), "gradient in step 1", _THREE | {"tile": 2}
    ),
}  # fmt: skip

# What must not be seen.
HARMLESS = {"memory that comes is not empty": Mutation(patched(transient.TransientBuffer, "allocate", _poisoned), (1, 1, 2), "")}
