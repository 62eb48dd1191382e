"""ZeRO 3: the weights of a unit are whole only while it runs (Rajbhandari et al. 2020, section 5.3; FSDP, Zhao et al. 2023).

Each sharded bucket of weights is a `TransientBuffer`. A unit that forward or backward enters gathers its buckets, and so do the next
`prefetch` units that will be entered, while this one computes; when it is left they are released. Two are kept a little longer,
because they are likely to be next: the last unit of a forward, with whose backward the part goes on, and one that was just
recomputed. They go with the next unit that does not need them. So never more is gathered than the units entered, `prefetch` and one.

What a table of embeddings holds is not read in backward, so it is not gathered for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from megactl.engine.collectives import all_gather
from megactl.engine.flat import FlatParameters
from megactl.engine.functional import Handle
from megactl.engine.mesh import Axis
from megactl.engine.units import Unit, backward_order


class WeightShard(Protocol):
    """Where this rank's share of a bucket of weights lives, and how the whole comes to the device."""

    def gather(self, whole: Tensor) -> Handle | None:
        """Begin to fill `whole` [n x replicas] from the shares [n] of all replicas; None where it is done. Collective over the replicas."""


class DeviceShard:
    """A share on the device."""

    def __init__(self, values: Tensor, replicas: Axis) -> None:
        self.values, self.replicas = values, replicas

    def gather(self, whole: Tensor) -> Handle | None:
        """See WeightShard."""
        if self.replicas.size == 1:
            whole.copy_(self.values)
            return None
        return all_gather(whole, self.values, self.replicas.group, async_op=True)


class WeightGatherer:
    """Gathers and releases the sharded buckets of one model part. `shards` by the bucket's number; an observer of `units.watch`."""

    def __init__(self, units: Sequence[Unit], flat: FlatParameters, shards: Mapping[int, WeightShard], *, prefetch: int) -> None:
        self.flat, self.shards = flat, shards
        self._reads = {
            mode: [frozenset(b for b in shards if flat.buckets[b].is_read(unit.index, backward=mode)) for unit in units]
            for mode in (False, True)
        }
        orders = {False: list(range(len(units))), True: backward_order(units)}
        self._ahead = {mode: _windows(order, self._reads[mode], prefetch) for mode, order in orders.items()}
        self._last = max((i for i in orders[False] if self._reads[False][i]), default=None)
        # What is gathered or under way: what to wait for, None where that has been done.
        self._held: dict[int, Handle | None] = {}
        self._entered: list[tuple[int, frozenset[int]]] = []
        self._in_backward = False

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Around one backward: units are met in the opposite order, and a forward in it is a recomputation."""
        self._in_backward = True
        try:
            yield
        finally:
            self._in_backward = False
            self.release_all()

    def before_forward(self, unit: int) -> None:
        """Gather what the unit reads."""
        self._enter(unit, self._reads[False][unit])

    def after_forward(self, unit: int) -> None:
        """Release it, unless it is likely to be next."""
        self._leave(unit, keep=self._in_backward or (torch.is_grad_enabled() and unit == self._last))

    def before_backward(self, unit: int) -> None:
        """Gather what the unit's backward reads."""
        self._enter(unit, self._reads[True][unit])

    def after_backward(self, unit: int) -> None:
        """Release it."""
        self._leave(unit, keep=False)

    def release_all(self) -> None:
        """Release everything: the weights are about to change, or the order is about to."""
        self._entered.clear()
        for bucket in list(self._held):
            self._release(bucket)

    def _enter(self, unit: int, wanted: frozenset[int]) -> None:
        ahead = self._ahead[self._in_backward][unit]
        needed = wanted.union(ahead, *(buckets for _, buckets in self._entered))
        for bucket in [held for held in self._held if held not in needed]:
            self._release(bucket)
        self._entered.append((unit, wanted))
        for bucket in sorted(wanted):
            self._start(bucket)
        for bucket in sorted(wanted):
            self._finish(bucket)
        for bucket in ahead:
            self._start(bucket)

    def _leave(self, unit: int, *, keep: bool) -> None:
        buckets = next((buckets for entered, buckets in reversed(self._entered) if entered == unit), frozenset())
        self._entered = [(entered, held) for entered, held in self._entered if entered != unit]
        if not keep:
            needed = frozenset(self._ahead[self._in_backward][unit]).union(*(held for _, held in self._entered))
            for bucket in sorted(buckets - needed):
                self._release(bucket)

    def _start(self, bucket: int) -> None:
        if bucket not in self._held:
            self.flat.weight_buffers[bucket].allocate()
            self._held[bucket] = self.shards[bucket].gather(self.flat.weight_buffers[bucket].whole)

    def _finish(self, bucket: int) -> None:
        handle = self._held[bucket]
        if handle is not None:
            handle.wait()
            self._held[bucket] = None

    def _release(self, bucket: int) -> None:
        # Memory that a collective still writes to must not go back to the allocator.
        self._finish(bucket)
        del self._held[bucket]
        self.flat.weight_buffers[bucket].release()


def _windows(order: Sequence[int], reads: Sequence[frozenset[int]], prefetch: int) -> dict[int, tuple[int, ...]]:
    """For each unit the buckets of the next `prefetch` units in `order` that read any, nearest first."""
    found = {}
    for place, unit in enumerate(order):
        following = [reads[other] for other in order[place + 1 :] if reads[other]][:prefetch]
        found[unit] = tuple(dict.fromkeys(bucket for buckets in following for bucket in sorted(buckets)))
    return found
