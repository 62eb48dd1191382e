"""Data parallelism: gradients summed over replicas, bucket by bucket, while backward still runs.

Sums, not means: the loss is already divided by the tokens of the whole global batch. Only the last backward of a step
reduces; before it the reducer is not armed. With ZeRO each bucket is reduce-scattered in place, so that slice r of a
bucket holds rank r's sum and the other slices hold leftovers.

Under sequence parallelism each tensor-parallel rank has, of the parameters that all of them hold whole, the gradients of its own
tokens. They are one range of a bucket, and are summed over these ranks before the bucket is reduced.

Where backward comes in two parts, a unit is complete when its weight gradients have been taken off the queue, so the reducer
puts a note on the queue behind them.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from megactl.engine.collectives import all_reduce, reduce_scatter
from megactl.engine.flat import Bucket, FlatParameters
from megactl.engine.functional import Handle, WeightQueue
from megactl.engine.mesh import Mesh


class GradientReducer:
    """Launches the reduction of each bucket of one model part as soon as its gradients are complete. See `ShardedReducer` for ZeRO 2."""

    # The buckets hold the sum over micro-batches: the first backward of a step overwrites, later ones add.
    accumulates = True

    def __init__(self, model: nn.Module, flat: FlatParameters, mesh: Mesh, *, zero: int, overlap: bool) -> None:
        self.flat, self.replicas, self.tp, self.zero = flat, mesh.replicas, mesh.tp, zero
        self._armed, self._deferred = False, None
        self._next, self._works = 0, []
        partial_sums = any(bucket.sums_tokens for bucket in flat.buckets)
        self._reduces = self.replicas.size > 1 or partial_sums
        self._beside = torch.cuda.Stream(mesh.device) if partial_sums and mesh.device.type == "cuda" else None
        if self._reduces and overlap:
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
        if self._reduces:
            self._launch_above(-1)
        self._armed = False

    def wait(self) -> None:
        """Return once every bucket is reduced, ready for the next step."""
        for work in self._works:
            if work is not None:
                work.wait()
        self._next, self._works = 0, []

    def _launch_above(self, unit: int) -> None:
        # Buckets stand in backward order, so the complete ones are always a prefix; the same order on every rank.
        while self._next < len(self.flat.buckets) and self.flat.buckets[self._next].unit >= max(unit, 0):
            self._works.append(self._launch(self.flat.buckets[self._next]))
            self._next += 1

    def _launch(self, bucket: Bucket) -> Handle:
        """Start a bucket's sums. What the caller's stream writes to its gradients before is in them."""
        if not bucket.sums_tokens or self._beside is None:
            return self._reduce(bucket)
        # The second sum must wait for the first; on a stream of its own the backward of the layers below does not wait with it.
        self._beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._beside):
            return self._reduce(bucket)

    def _reduce(self, bucket: Bucket) -> Handle:
        if self.replicas.size == 1:
            return self._sum_partial(bucket, async_op=True)
        self._sum_partial(bucket)
        whole = self.flat.grads[bucket.start : bucket.stop]
        if self.zero == 0:
            return all_reduce(whole, self.replicas.group, async_op=True)
        start, stop = bucket.shard(self.replicas.rank, self.replicas.size)
        return reduce_scatter(self.flat.grads[start:stop], whole, self.replicas.group, async_op=True)

    def _sum_partial(self, bucket: Bucket, *, async_op: bool = False) -> Handle | None:
        """Sum over tensor-parallel ranks what each has from its own tokens."""
        if not bucket.sums_tokens:
            return None
        start, stop = bucket.partial
        return all_reduce(self.flat.grads[bucket.start + start : bucket.start + stop], self.tp.group, async_op=async_op)
