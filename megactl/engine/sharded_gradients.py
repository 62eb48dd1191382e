"""ZeRO 2: a bucket's gradients are whole only while a backward fills them (Rajbhandari et al. 2020, section 5.2).

Each micro-batch's backward takes memory for a bucket as it comes to its first unit and overwrites it. Once it has passed the last, the
bucket is reduce-scattered over the replicas (in fp32) and this rank's slice goes into its shard: the first of a step as it is, later
ones are added. Then the memory is given back. A bucket travels while the next is filled, so two of them are there at a time. A weight
that several units read (a tied one on a single stage) has a bucket of its own, which lives from the first of them to the last.

Under sequence parallelism what all tensor-parallel ranks hold whole has on each the gradients of its own tokens. A shard's part of it
is summed over these ranks at the end of the step: once, and a d-th of what it would be before the reduction.

The price of accumulation: every micro-batch sends its gradients, where ZeRO 1 sends the sum of all, once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, empty_like

from megactl.engine.collectives import all_reduce, reduce_scatter
from megactl.engine.flat import FlatParameters
from megactl.engine.functional import WeightQueue
from megactl.engine.mesh import Mesh


class ShardedReducer:
    """The gradients of one model part on their way into `shards`, this rank's slice of each bucket; an observer of `units.watch`."""

    # Each backward fills empty buckets, also the later ones of a step.
    accumulates = False

    def __init__(self, flat: FlatParameters, shards: Sequence[Tensor], mesh: Mesh, *, overlap: bool) -> None:
        self.flat, self.shards, self.replicas, self.tp, self.overlap = flat, shards, mesh.replicas, mesh.tp, overlap
        self._deferred: WeightQueue | None = None
        self._filling: list[int] = []
        self._begun: set[int] = set()
        self._travelling: deque[tuple[int, Callable[[], None]]] = deque()

    def before_forward(self, unit: int) -> None:
        """Nothing: gradients are a matter of backward."""

    def after_forward(self, unit: int) -> None:
        """Nothing."""

    def before_backward(self, unit: int) -> None:
        """Take memory for the gradients of the unit, or note it on the queue of what is put off."""
        self._in_turn(partial(self._begin, unit))

    def after_backward(self, unit: int) -> None:
        """Reduce the buckets that are complete with it; see `before_backward`."""
        self._in_turn(partial(self._complete, unit))

    def arm(self) -> None:
        """Nothing: every backward reduces, not only the last of a step."""

    def defer_to(self, queue: WeightQueue | None) -> None:
        """Say where the next backward puts its weight gradients off to; None: it computes them."""
        self._deferred = queue

    def end_micro_batch(self) -> None:
        """Reduce what no input's gradient gave notice of; every gradient of one micro-batch is now there."""
        self._close(list(self._filling))

    def flush(self) -> None:
        """Nothing: the last micro-batch has been treated like the others."""

    def wait(self) -> None:
        """Return once every shard holds its sum, ready for the next step."""
        self._arrive()
        self._begun.clear()
        self._sum_tokens()

    def _sum_tokens(self) -> None:
        """Sum over tensor-parallel ranks what each has from its own tokens; they hold the same slices."""
        works = []
        for bucket, shard in zip(self.flat.buckets, self.shards, strict=True):
            first = bucket.shard(self.replicas.rank, self.replicas.size)[0] - bucket.start
            low, high = (min(max(edge - first, 0), shard.numel()) for edge in bucket.partial)
            if low < high:
                works.append(all_reduce(shard[low:high], self.tp.group, async_op=True))
        for work in works:
            work.wait()

    def _in_turn(self, work: Callable[[], None]) -> None:
        if self._deferred is None:
            work()
        else:
            self._deferred.add(work)

    def _begin(self, unit: int) -> None:
        for index, bucket in enumerate(self.flat.buckets):
            if index not in self._filling and any(reader == unit for reader, _ in bucket.readers):
                self._open(index)

    def _complete(self, unit: int) -> None:
        self._close([index for index in self._filling if self.flat.buckets[index].unit == unit])

    def _open(self, index: int) -> None:
        if any(index == travelling for travelling, _ in self._travelling):
            # The last micro-batch's gradients are still in it.
            self._arrive()
        self.flat.grad_buffers[index].allocate()
        for start, stop in self.flat.buckets[index].gaps:
            # Nobody writes there, but norm and optimizer take long runs of a shard.
            self.flat.grad_buffers[index].whole[start:stop].zero_()
        self._filling.append(index)

    def _close(self, complete: list[int]) -> None:
        # In the buckets' order, which is the same on every replica.
        for index in sorted(complete):
            self._arrive()
            self._filling.remove(index)
            self._travelling.append((index, self._send(index)))
            if not self.overlap:
                self._arrive()

    def _send(self, index: int) -> Callable[[], None]:
        """Start the reduction of a bucket; returns what to call when it must be over."""
        whole, shard = self.flat.grad_buffers[index].whole, self.shards[index]
        is_first = index not in self._begun
        self._begun.add(index)
        if self.replicas.size == 1:
            return partial(self._take, index, whole, is_first)
        own = shard if is_first else empty_like(shard)
        work = reduce_scatter(own, whole, self.replicas.group, async_op=True)

        def arrive() -> None:
            work.wait()
            self._take(index, own, is_first)

        return arrive

    def _take(self, index: int, own: Tensor, is_first: bool) -> None:
        shard = self.shards[index]
        if not is_first:
            shard.add_(own)
        elif own is not shard:
            shard.copy_(own)
        self.flat.grad_buffers[index].release()

    def _arrive(self) -> None:
        while self._travelling:
            _, arrive = self._travelling.popleft()
            arrive()
