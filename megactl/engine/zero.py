"""The optimizer's state and step, whole on every replica (ZeRO 0) or sharded over them (ZeRO 1 to 3; Rajbhandari et al. 2020).

Bytes a parameter with d replicas, from one step to the next:

                  weight  gradient  optimizer    bf16 and fp16     fp32
    ZeRO 0        all     all       all          18                16
    ZeRO 1        all     all       1 / d        6 + 12 / d        8 + 8 / d
    ZeRO 2        all     1 / d     1 / d        2 + 16 / d        4 + 12 / d
    ZeRO 3        1 / d   1 / d     1 / d        18 / d            16 / d

A 16-bit weight takes 2, its gradient 4 (fp32), master copy and two moments 12; an fp32 weight is its own master. During a step, ZeRO 2
adds the buckets of gradients that a backward fills (megactl.engine.sharded_gradients), ZeRO 3 the weights of the units that run
(megactl.engine.gather). After the step each rank's slice of a bucket of whole weights is gathered by the others, one bucket while
the next is updated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megactl.config.schema import Optimizer
from megactl.engine import ops
from megactl.engine.collectives import all_gather, all_reduce
from megactl.engine.flat import Bucket, FlatParameters, Segment
from megactl.engine.functional import Handle
from megactl.engine.gather import DeviceShard, WeightShard
from megactl.engine.mesh import Axis, Mesh

STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class BucketState:
    """This rank's share [start, stop) of a bucket. `master` is the parameter slice itself when both have one dtype and lie in one place.

    `param` and `grad` are slices of the bucket's own tensors where these are whole between steps, else all there is of them.
    """

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
        """One of STATE_KINDS, "param" or "grad", 1-d."""
        return getattr(self, kind)

    def slice_of(self, kind: str, start: int, stop: int) -> Tensor:
        """The part of a kind in [start, stop) of the flat buffers."""
        return self.part(kind)[start - self.start : stop - self.start]


class ShardedOptimizer:
    """AdamW over the flat buffers of one model part. `has_master`: the masters have digits that the weights have not."""

    def __init__(self, flat: FlatParameters, mesh: Mesh, config: Optimizer) -> None:
        self.flat, self.mesh, self.zero, self.config = flat, mesh, flat.sharing.zero, config
        self.has_master = flat.dtype != flat.main_dtype
        self.states = [self._state(index, bucket) for index, bucket in enumerate(flat.buckets)]
        self._norm_parts = [
            state.slice_of("grad", segment.start, segment.stop) for state in self.states for segment in self._norm_segments(state.bucket)
        ]

    def _state(self, index: int, bucket: Bucket) -> BucketState:
        replicas, flat = self.mesh.replicas, self.flat
        start, stop = bucket.shard(replicas.rank, replicas.size) if self.zero else (bucket.start, bucket.stop)
        own, numel = slice(start - bucket.start, stop - bucket.start), stop - start
        param = self._new_weights(numel) if bucket.sharded else flat.bucket_params[index][own]
        transient = index in flat.grad_buffers
        grad = torch.zeros(numel, dtype=flat.main_dtype, device=flat.device) if transient else flat.bucket_grads[index][own]
        segments = tuple(part for segment in bucket.segments if (part := segment.within(start, stop)))
        moments = self._new_state(numel), self._new_state(numel)
        return BucketState(bucket, start, stop, param, grad, self._master(bucket, param), *moments, segments)

    def _new_weights(self, numel: int) -> Tensor:
        """Zeros, where this rank's share of a sharded bucket's weights lives."""
        return torch.zeros(numel, dtype=self.flat.dtype, device=self.flat.device)

    def _new_state(self, numel: int) -> Tensor:
        """Zeros, where one of STATE_KINDS lives."""
        return torch.zeros(numel, dtype=self.flat.main_dtype, device=self.flat.device)

    def _master(self, bucket: Bucket, param: Tensor) -> Tensor:
        return self._new_state(param.numel()) if self.has_master else param

    def weight_shards(self) -> dict[int, WeightShard]:
        """How the weights of each sharded bucket come together, by the bucket's number."""
        return {i: DeviceShard(self.states[i].param, self.mesh.replicas) for i in self.flat.weight_buffers}

    def settle(self) -> None:
        """Return once the host may read and write what this optimizer keeps in its memory."""

    def _norm_segments(self, bucket: Bucket) -> list[Segment]:
        # Each replica counts its own slice, with or without ZeRO, so that the sum over all ranks counts each element once.
        start, stop = bucket.shard(self.mesh.replicas.rank, self.mesh.replicas.size)
        return [part for segment in bucket.segments if segment.counted and (part := segment.within(start, stop))]

    def norm_squared(self) -> Tensor:
        """This rank's share of the squared global gradient norm, float64, 0-d."""
        if not self._norm_parts:
            return torch.zeros((), dtype=torch.float64, device=self.flat.device)
        return ops.squared_norm(self._norm_parts)

    def step(self, *, lr: Tensor, step: Tensor, grad_scale: Tensor, skip: Tensor) -> None:
        """Update this rank's share and bring every replica's whole weights up to date. All arguments are 0-d device tensors."""
        works = []
        for index in range(len(self.states)):
            self._update(index, lr=lr, step=step, grad_scale=grad_scale, skip=skip)
            works += self._gather(index)
        for work in works:
            work.wait()

    def _gather(self, index: int) -> list[Handle]:
        """Start to bring a bucket of weights that stay whole up to date on every replica."""
        state, replicas = self.states[index], self.mesh.replicas
        if not self.zero or replicas.size == 1 or state.bucket.sharded:
            return []
        return [all_gather(self.flat.bucket_params[index], state.param, replicas.group, async_op=True)]

    def _update(self, index: int, **scalars: Tensor) -> None:
        state = self.states[index]
        for segment in state.segments:
            part = slice(segment.start - state.start, segment.stop - state.start)
            master = state.master[part]
            self._adamw(state, part, state.param[part] if self.has_master else master, master, segment.decay, scalars)

    def _adamw(
        self, state: BucketState, part: slice, param: Tensor, master: Tensor, decay: bool, scalars: Mapping[str, Tensor],
        grad: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Update a part of a share, with its weights in `param` (`master` itself, or narrower) and, where it was copied, its `grad`."""
        config = self.config
        ops.adamw_(
            param, master, state.grad[part] if grad is None else grad, state.exp_avg[part], state.exp_avg_sq[part],
            beta1=config.beta1, beta2=config.beta2, eps=config.epsilon, weight_decay=config.weight_decay if decay else 0.0, **scalars,
        )  # fmt: skip

    def write(self, start: int, values: Tensor) -> None:
        """Copy `values` (1-d, beginning at `start` of the flat buffers) into what this rank holds of masters and of sharded weights."""
        self.settle()
        stop = start + values.numel()
        for state in self.states:
            low, high = max(start, state.start), min(stop, state.stop)
            if low < high:
                part = values[low - start : high - start]
                if state.master is not state.param:
                    state.slice_of("master", low, high).copy_(part)
                if state.bucket.sharded:
                    # Rounded first: a copy to the host that also rounds does so on one of its threads, at 2 GB/s.
                    state.slice_of("param", low, high).copy_(part.to(state.param.dtype))

    def whole(self, kind: str) -> Tensor:
        """All replicas' shares of a kind ("grad", "param", or one of STATE_KINDS) in the layout of the flat buffers; collective.

        Weights that are whole between steps are not gathered again: they are this replica's.
        """
        self.settle()
        kind = "param" if kind == "master" and not self.has_master else kind
        dtype = self.flat.dtype if kind == "param" else self.flat.main_dtype
        found = torch.zeros(self.flat.total, dtype=dtype, device=self.flat.device)
        for index, state in enumerate(self.states):
            target = found[state.bucket.start : state.bucket.stop]
            if kind == "param" and not state.bucket.sharded:
                target.copy_(self.flat.bucket_params[index])
            elif state.stop - state.start == target.numel():
                target.copy_(state.part(kind))
            else:
                # From host memory a share at a time: the network of the devices does not reach there.
                all_gather(target, state.part(kind).to(target.device), self.mesh.replicas.group)
        return found


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
