"""Optimizer and parameters in host memory (ZeRO-Offload, Ren et al. 2021; ZeRO-Infinity, Rajbhandari et al. 2021).

`--offload optimizer`: masters and both moments lie in page-locked host memory, and the processors update them. Gradients are reduced,
clipped and checked on the device as ever. Then the update goes piece by piece, and three things happen at a time:

    link down    gradient of piece i + 1
    processors                            AdamW of piece i
    link up                                                  weights of piece i - 1

`--offload parameters` (ZeRO 3): this rank's share of the weights lies in host memory as well. A unit that is about to run takes it from
there, beside the computing of the unit before; with several replicas these then gather the whole from each other's devices. The
processors write the new weights where they are read from, so nothing goes up after the step. With the parameters alone the device
updates, and the result goes down.

Bytes a parameter of a rank's share, and what goes over the link in a step of m micro-batches (16 bits; in fp32 the master has 4 bytes as
well, and is the weight where both are in host memory):

                            host        down   up
    optimizer               12          4      2
    optimizer, parameters   14          4      2 for each forward and each backward: 4 m
    parameters              2           2      4 m

A step under optimizer offload waits for the device once: the processors cannot update with numbers that they do not have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megactl.config.memory import offload_targets
from megactl.config.schema import Optimizer, Run
from megactl.costmodel.offload import LANES, PIECE
from megactl.engine.collectives import all_gather
from megactl.engine.flat import Bucket, FlatParameters
from megactl.engine.functional import Handle
from megactl.engine.gather import WeightShard
from megactl.engine.host_memory import CopyStream, host_tensor
from megactl.engine.mesh import Axis, Mesh
from megactl.engine.zero import BucketState, ShardedOptimizer


def make_optimizer(flat: FlatParameters, mesh: Mesh, run: Run) -> ShardedOptimizer:
    """The optimizer of one model part, with its memory where `--offload` wants it."""
    targets = offload_targets(run.memory.offload)
    if "optimizer" in targets:
        return OffloadedOptimizer(flat, mesh, run.optimizer, parameters="parameters" in targets)
    if "parameters" in targets:
        return StreamedParameters(flat, mesh, run.optimizer)
    return ShardedOptimizer(flat, mesh, run.optimizer)


@dataclass(frozen=True)
class _Arrival:
    """A share on its way to the device."""

    link: CopyStream
    event: Any

    def wait(self) -> None:
        self.link.wait(self.event)


class HostShard:
    """A share of weights in host memory. `written`: when the device's last copy into it is done, None where the host wrote it."""

    def __init__(self, values: Tensor, replicas: Axis, link: CopyStream) -> None:
        self.values, self.replicas, self._link = values, replicas, link
        self.written: Any = None
        self._read: Any = None

    def gather(self, whole: Tensor) -> Handle | None:
        """See WeightShard: the own share into its place in `whole`, then the others' into theirs."""
        numel = self.values.numel()
        own = whole[self.replicas.rank * numel : (self.replicas.rank + 1) * numel]
        self._read = self._link.start(partial(own.copy_, self.values, non_blocking=True), after=[self.written])
        if self.replicas.size == 1:
            return _Arrival(self._link, self._read)
        with self._link.behind():
            return all_gather(whole, own, self.replicas.group, async_op=True)

    def write(self, source: Tensor, part: slice, link: CopyStream) -> None:
        """Start to copy `source` into a part of the share, once it is no longer being read."""
        self.written = link.start(partial(self.values[part].copy_, source, non_blocking=True), after=[self._read, self.written])

    def settle(self) -> None:
        """Return once no copy reads or writes the share."""
        CopyStream.finish(self._read)
        CopyStream.finish(self.written)


@dataclass(frozen=True)
class _Piece:
    """A run of the share of bucket `index`, with one weight decay. closes: it is the last of its bucket."""

    index: int
    part: slice
    decay: bool
    closes: bool

    @property
    def numel(self) -> int:
        """Elements."""
        return self.part.stop - self.part.start


def _pieces(states: list[BucketState], limit: int) -> list[_Piece]:
    """The segments of all shares in pieces of at most `limit` elements, in order; of each bucket one piece at least."""
    found = []
    for index, state in enumerate(states):
        parts = [
            (slice(start - state.start, min(start + limit, segment.stop) - state.start), segment.decay)
            for segment in state.segments
            for start in range(segment.start, segment.stop, limit)
        ]
        # A share that is padding alone has a piece of nothing: its bucket is gathered by this replica as by the others.
        parts = parts or [(slice(0, 0), False)]
        found += [_Piece(index, part, decay, number == len(parts)) for number, (part, decay) in enumerate(parts, 1)]
    return found


@dataclass
class _Lane:
    """Staging memory of a piece on the host. low: of its weights in the compute type. Events: gradient here, weights gone."""

    grad: Tensor
    low: Tensor
    arrived: Any = None
    gone: Any = None


class OffloadedOptimizer(ShardedOptimizer):
    """AdamW in host memory. `parameters`: the shares of sharded weights are there as well. See the module."""

    def __init__(self, flat: FlatParameters, mesh: Mesh, config: Optimizer, *, parameters: bool, piece: int = PIECE) -> None:
        self._parameters = parameters
        self._down, self._up = CopyStream(flat.device), CopyStream(flat.device)
        super().__init__(flat, mesh, config)
        self._shards = _host_shards(self, self._up) if parameters else {}
        self._pieces = _pieces(self.states, piece)
        self._lanes = [self._lane() for _ in range(LANES)]

    def _lane(self) -> _Lane:
        device, staged = self.flat.device, [piece.numel for piece in self._pieces if self._is_staged(piece)]
        grad = host_tensor(max((piece.numel for piece in self._pieces), default=0), self.flat.main_dtype, device)
        return _Lane(grad, host_tensor(max(staged, default=0), self.flat.dtype, device))

    def _is_staged(self, piece: _Piece) -> bool:
        """Whether the rounded weights of a piece go to the device by way of a lane."""
        return self.has_master and piece.index not in self._shards

    def _new_weights(self, numel: int) -> Tensor:
        return host_tensor(numel, self.flat.dtype, self.flat.device) if self._parameters else super()._new_weights(numel)

    def _new_state(self, numel: int) -> Tensor:
        return host_tensor(numel, self.flat.main_dtype, self.flat.device)

    def _master(self, bucket: Bucket, param: Tensor) -> Tensor:
        together = self._parameters and bucket.sharded and not self.has_master
        return param if together else self._new_state(param.numel())

    def weight_shards(self) -> Mapping[int, WeightShard]:
        """See ShardedOptimizer."""
        return self._shards if self._parameters else super().weight_shards()

    def settle(self) -> None:
        """See ShardedOptimizer."""
        for lane in self._lanes:
            CopyStream.finish(lane.gone)
        for shard in self._shards.values():
            shard.settle()

    def step(self, *, lr: Tensor, step: Tensor, grad_scale: Tensor, skip: Tensor) -> None:
        """See ShardedOptimizer. Waits for the device: the numbers of the step come to the host, and with them all gradients are there."""
        scalars = dict(zip(("lr", "step", "grad_scale", "skip"), torch.stack((lr, step, grad_scale, skip)).cpu(), strict=True))
        if scalars["skip"]:
            # All replicas know it, so none waits for another's weights.
            return
        self.settle()
        works = []
        for number, piece in enumerate(self._pieces):
            if number == 0:
                self._fetch(0)
            if number + 1 < len(self._pieces):
                self._fetch(number + 1)
            self._compute(number, scalars)
            self._send(number)
            if piece.closes:
                self._up.wait(self._lane_of(number).gone)
                works += self._gather(piece.index)
        for work in works:
            work.wait()

    def _lane_of(self, number: int) -> _Lane:
        return self._lanes[number % LANES]

    def _fetch(self, number: int) -> None:
        """Start to bring a piece's gradient down. The processors are done with the one that was in its lane."""
        piece, lane = self._pieces[number], self._lane_of(number)
        source = self.states[piece.index].grad[piece.part]
        lane.arrived = self._down.start(partial(lane.grad[: piece.numel].copy_, source, non_blocking=True))

    def _compute(self, number: int, scalars: Mapping[str, Tensor]) -> None:
        """Update a piece, once its gradient is here and the weights that its lane held have gone."""
        piece, lane = self._pieces[number], self._lane_of(number)
        if not piece.numel:
            return
        state = self.states[piece.index]
        CopyStream.finish(lane.arrived)
        CopyStream.finish(lane.gone)
        master = state.master[piece.part]
        rounded = lane.low[: piece.numel] if self._is_staged(piece) else state.param[piece.part]
        param = rounded if self.has_master else master
        self._adamw(state, piece.part, param, master, piece.decay, scalars, grad=lane.grad[: piece.numel])

    def _send(self, number: int) -> None:
        """Start to bring a piece's new weights up, unless it is from here that they are read."""
        piece, lane = self._pieces[number], self._lane_of(number)
        if piece.index in self._shards:
            return
        state = self.states[piece.index]
        source = lane.low[: piece.numel] if self._is_staged(piece) else state.master[piece.part]
        lane.gone = self._up.start(partial(state.param[piece.part].copy_, source, non_blocking=True))


class StreamedParameters(ShardedOptimizer):
    """AdamW on the device; of sharded weights the shares are in host memory, where the device writes what it has updated."""

    def __init__(self, flat: FlatParameters, mesh: Mesh, config: Optimizer, *, piece: int = PIECE) -> None:
        super().__init__(flat, mesh, config)
        self._down, self._up = CopyStream(flat.device), CopyStream(flat.device)
        self._shards = _host_shards(self, self._up)
        self._pieces = _pieces(self.states, piece)
        self._leaving: deque[tuple[Tensor, Any]] = deque()

    def _new_weights(self, numel: int) -> Tensor:
        return host_tensor(numel, self.flat.dtype, self.flat.device)

    def weight_shards(self) -> Mapping[int, WeightShard]:
        """See ShardedOptimizer."""
        return self._shards

    def settle(self) -> None:
        """See ShardedOptimizer."""
        for shard in self._shards.values():
            shard.settle()

    def step(self, *, lr: Tensor, step: Tensor, grad_scale: Tensor, skip: Tensor) -> None:
        """See ShardedOptimizer."""
        super().step(lr=lr, step=step, grad_scale=grad_scale, skip=skip)
        self._let_go(0)

    def _update(self, index: int, **scalars: Tensor) -> None:
        shard = self._shards.get(index)
        if shard is None:
            return super()._update(index, **scalars)
        for piece in self._pieces:
            if piece.index == index and piece.numel:
                self._let_go(LANES - 1)
                updated = self._updated(piece, scalars)
                shard.write(updated, piece.part, self._down)
                self._leaving.append((updated, shard.written))

    def _updated(self, piece: _Piece, scalars: Mapping[str, Tensor]) -> Tensor:
        """The new weights of a piece, on the device; after a skipped step the old ones."""
        state = self.states[piece.index]
        source = state.master[piece.part]
        if self.has_master:
            self._adamw(state, piece.part, source, source, piece.decay, scalars)
            # Rounded from the master, not by the update: that would leave them unwritten where it skips.
            return source.to(self.flat.dtype)
        values = torch.empty(piece.numel, dtype=source.dtype, device=self.flat.device)
        self._up.wait(self._up.start(partial(values.copy_, source, non_blocking=True), after=[self._shards[piece.index].written]))
        self._adamw(state, piece.part, values, values, piece.decay, scalars)
        return values

    def _let_go(self, keep: int) -> None:
        """Give up all but `keep` of what is on its way down: its memory may be used again after the copy that reads it."""
        while len(self._leaving) > keep:
            _, event = self._leaving.popleft()
            self._down.wait(event)


def _host_shards(optimizer: ShardedOptimizer, link: CopyStream) -> dict[int, HostShard]:
    """The shares of the sharded buckets, by the bucket's number."""
    replicas = optimizer.mesh.replicas
    return {i: HostShard(state.param, replicas, link) for i, state in enumerate(optimizer.states) if state.bucket.sharded}
