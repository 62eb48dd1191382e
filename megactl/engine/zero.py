"""The optimizer's state and step, whole on every replica (ZeRO 0) or sharded over the dp axis (ZeRO 1; Rajbhandari et al. 2020).

Bytes a parameter in bf16 with d replicas: 2 (weight) + 4 (main gradient) + 12 / d (master, two moments) = 6 + 12 / d;
in fp32 the weight is its own master: 8 + 8 / d. After the step each rank's slice of every bucket is gathered by the others,
one bucket while the next is updated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megactl.config.schema import Optimizer
from megactl.engine import ops
from megactl.engine.collectives import all_gather, all_reduce
from megactl.engine.flat import Bucket, FlatParameters, Segment
from megactl.engine.mesh import Axis, Mesh

STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class BucketState:
    """This rank's share [start, stop) of a bucket. `master` is the parameter slice itself when both have one dtype."""

    bucket: Bucket
    start: int
    stop: int
    param: Tensor
    grad: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    segments: tuple[Segment, ...]

    def part(self, kind: str) -> Tensor:
        """One of STATE_KINDS, 1-d."""
        return getattr(self, kind)


class ShardedOptimizer:
    """AdamW over the flat buffers of one model part."""

    def __init__(self, flat: FlatParameters, mesh: Mesh, zero: int, config: Optimizer) -> None:
        self.flat, self.mesh, self.zero, self.config = flat, mesh, zero, config
        self.has_master = flat.params.dtype != flat.grads.dtype
        self.states = [self._state(bucket) for bucket in flat.buckets]
        segments = [segment for bucket in flat.buckets for segment in self._norm_segments(bucket)]
        self._norm_parts = [flat.grads[segment.start : segment.stop] for segment in segments]

    def _state(self, bucket: Bucket) -> BucketState:
        replicas = self.mesh.replicas
        start, stop = bucket.shard(replicas.rank, replicas.size) if self.zero else (bucket.start, bucket.stop)
        param, grad = self.flat.params[start:stop], self.flat.grads[start:stop]
        master = torch.zeros_like(grad) if self.has_master else param
        segments = tuple(part for segment in bucket.segments if (part := segment.within(start, stop)))
        return BucketState(bucket, start, stop, param, grad, master, torch.zeros_like(grad), torch.zeros_like(grad), segments)

    def _norm_segments(self, bucket: Bucket) -> list[Segment]:
        # Each replica counts its own slice, with or without ZeRO, so that the sum over all ranks counts each element once.
        start, stop = bucket.shard(self.mesh.replicas.rank, self.mesh.replicas.size)
        return [part for segment in bucket.segments if segment.counted and (part := segment.within(start, stop))]

    def norm_squared(self) -> Tensor:
        """This rank's share of the squared global gradient norm, float64, 0-d."""
        if not self._norm_parts:
            return torch.zeros((), dtype=torch.float64, device=self.flat.grads.device)
        return ops.squared_norm(self._norm_parts)

    def step(self, *, lr: Tensor, step: Tensor, grad_scale: Tensor, skip: Tensor) -> None:
        """Update this rank's share and bring every replica's parameters up to date. All arguments are 0-d device tensors."""
        works = []
        for state in self.states:
            for segment in state.segments:
                self._update(state, segment, lr=lr, step=step, grad_scale=grad_scale, skip=skip)
            if self.zero and self.mesh.replicas.size > 1:
                whole = self.flat.params[state.bucket.start : state.bucket.stop]
                works.append(all_gather(whole, state.param, self.mesh.replicas.group, async_op=True))
        for work in works:
            work.wait()

    def _update(self, state: BucketState, segment: Segment, **scalars: Tensor) -> None:
        part = slice(segment.start - state.start, segment.stop - state.start)
        config, master = self.config, state.master[part]
        ops.adamw_(
            state.param[part] if self.has_master else master, master, state.grad[part], state.exp_avg[part], state.exp_avg_sq[part],
            beta1=config.beta1, beta2=config.beta2, eps=config.epsilon,
            weight_decay=config.weight_decay if segment.decay else 0.0, **scalars,
        )  # fmt: skip

    def write_master(self, start: int, values: Tensor) -> None:
        """Copy `values` (1-d, beginning at `start` of the flat buffers) into the masters this rank holds."""
        stop = start + values.numel()
        for state in self.states:
            low, high = max(start, state.start), min(stop, state.stop)
            if low < high and self.has_master:
                state.master[low - state.start : high - state.start].copy_(values[low - start : high - start])


def reduce_tied(optimizers: Sequence[ShardedOptimizer], embedding: Axis | None) -> None:
    """Sum the two copies' gradients of a weight tied across the first and last stage (their shards, after the dp reduction).

    `optimizers`: of this rank's stages. The copies are on two ranks, which `embedding` joins, or both here, where the schedule folds
    the stages. Both copies get the same bits and so stay equal.
    """
    shares = [state.grad for optimizer in optimizers for state in optimizer.states if state.bucket.tied]
    if len(shares) == 2:
        first, last = shares
        last.copy_(first.add_(last))
    elif embedding is not None:
        for share in shares:
            all_reduce(share, embedding.group)
