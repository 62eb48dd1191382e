"""Data parallelism: gradients summed over replicas, bucket by bucket, while backward still runs.

Sums, not means: the loss is already divided by the tokens of the whole global batch. Only the last backward of a step
reduces; before it the reducer is not armed. With ZeRO each bucket is reduce-scattered in place, so that slice r of a
bucket holds rank r's sum and the other slices hold leftovers.

Where backward comes in two parts, a unit is complete when its weight gradients have been taken off the queue, so the reducer
puts a note on the queue behind them.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from megactl.engine.collectives import all_reduce, reduce_scatter
from megactl.engine.flat import Bucket, FlatParameters
from megactl.engine.functional import WeightQueue
from megactl.engine.mesh import Axis


class GradientReducer:
    """Launches the reduction of each bucket of one model part as soon as its gradients are complete. See `ShardedReducer` for ZeRO 2."""

    # The buckets hold the sum over micro-batches: the first backward of a step overwrites, later ones add.
    accumulates = True

    def __init__(self, model: nn.Module, flat: FlatParameters, replicas: Axis, *, zero: int, overlap: bool) -> None:
        self.flat, self.replicas, self.zero = flat, replicas, zero
        self._armed, self._deferred = False, None
        self._next, self._works = 0, []
        if replicas.size > 1 and overlap:
            # The first unit of the first stage takes integer ids, so no gradient passes through its input: `flush` covers it.
            for index, unit in enumerate(model.units()):
                if index or model.embedding is None:
                    unit.register_full_backward_hook(self._hook(index))

    def _hook(self, unit: int):
        def done(*_) -> None:
            if self._deferred is None:
                self._passed(unit)
            else:
                self._deferred.add(partial(self._passed, unit))

        return done

    def _passed(self, unit: int) -> None:
        if self._armed:
            self._launch_above(unit)

    def arm(self) -> None:
        """Say that the next weight gradients (a whole backward, or its second part) are the last of this step."""
        self._armed = True

    def defer_to(self, queue: WeightQueue | None) -> None:
        """Say where the next backward puts its weight gradients off to; None: it computes them."""
        self._deferred = queue

    def end_micro_batch(self) -> None:
        """Nothing: the last weight gradients of a step alone are reduced."""

    def flush(self) -> None:
        """Launch what is left; every gradient of this part is now complete."""
        if self.replicas.size > 1:
            self._launch_above(-1)
        self._armed = False

    def wait(self) -> None:
        """Return once every bucket is reduced, ready for the next step."""
        for work in self._works:
            work.wait()
        self._next, self._works = 0, []

    def _launch_above(self, unit: int) -> None:
        # Buckets stand in backward order, so the complete ones are always a prefix; the same order on every rank.
        while self._next < len(self.flat.buckets) and self.flat.buckets[self._next].unit >= max(unit, 0):
            self._works.append(self._launch(self.flat.buckets[self._next]))
            self._next += 1

    def _launch(self, bucket: Bucket):
        whole = self.flat.grads[bucket.start : bucket.stop]
        if self.zero == 0:
            return all_reduce(whole, self.replicas.group, async_op=True)
        start, stop = bucket.shard(self.replicas.rank, self.replicas.size)
        return reduce_scatter(self.flat.grads[start:stop], whole, self.replicas.group, async_op=True)
