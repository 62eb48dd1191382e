"""What ZeRO 2 and 3 hold for a while beside a rank's shares: gradients of buckets under way, weights of units that run.

Resident bytes a parameter with d replicas, in 16 bits: 18 (stage 0), 6 + 12/d (1), 2 + 16/d (2), 18/d (3).

Not all of it is there at once, and what is there changes while activations go. So the peak is the fullest of the moments of a
backward, which `fullest_moment` walks unit by unit, as the engine does (megactl.engine.sharded_gradients, megactl.engine.gather):

    arrival   the gradient of a unit's output is there. The unit's weights are gathered, and those of the next `prefetch` units that
              have any. What was closed last still travels: at the first unit that is the last bucket of the micro-batch before
    at work   the buckets that the unit opens have memory. One that still travelled has arrived before it is opened again
    departure the unit's activations are free. A bucket that it completes travels from now on, and what comes of it from the other
              replicas is a share more (the first micro-batch's goes where it belongs); what travelled before has arrived

A weight that embedding and head share on one stage is a bucket of its own: its gradient lives from the first unit to the last, and
then travels until the next backward begins. With large vocabularies the fullest moment is that one, before the head's backward: the
gradient's whole and its share, the logits, the head's weights and those of the layer that is next.
With wide layers it is the backward of the second: the first one's gradients travel, its activations are free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """Weights that are needed together, and the rank's bytes of activations around their backward, of all micro-batches.

    tensors: elements of each parameter. is_table: backward does not read them. arrival: with the gradient of the unit's output.
    at_work: at the fullest moment within its backward.
    """

    tensors: tuple[int, ...]
    arrival: int
    at_work: int
    is_table: bool = False


@dataclass(frozen=True)
class StageUnits:
    """The units of a stage, in the order of backward. entry, departure: bytes of activations when a forward begins, after a backward.

    tied: elements of the weight that embedding and head share, and `tied_readers` the units on this stage that read it; () for none.
    """

    units: tuple[Unit, ...]
    entry: int
    departure: int
    tied: int = 0
    tied_readers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sharing:
    """Settings of ZeRO. weight, gradient: bytes of an element. bucket: elements that close a gradient bucket. prefetch: units ahead.

    threshold: parameters of fewer elements stay whole (stage 3). micro_batches: of a step. The gradients of the first of them arrive
    where they belong; those of later ones in a share of their own, which is then added.
    """

    zero: int
    replicas: int
    bucket: int
    prefetch: int
    threshold: int
    weight: int
    gradient: int
    micro_batches: int

    def is_sharded(self, elements: int) -> bool:
        """Whether the weights of a parameter are gathered for each use."""
        return self.zero == 3 and elements >= self.threshold

    def travelling(self, bucket: Bucket | None, micro_batch: int) -> int:
        """Bytes of a bucket that travels for the micro-batch of that number (from 0 on); none where there is no such."""
        if bucket is None or micro_batch < 0:
            return 0
        share = self.gradient // self.replicas if self.replicas > 1 and micro_batch > 0 else 0
        return bucket.elements * (self.gradient + share)


@dataclass(frozen=True)
class Bucket:
    """Elements whose gradients are reduced together: from unit `first`, which opens it, to unit `last`. `gathered_for`: units whose
    backward needs its weights gathered."""

    elements: int
    first: int
    last: int
    gathered_for: tuple[int, ...] = ()


def fullest_moment(stages: Sequence[StageUnits], sharing: Sharing) -> int:
    """Most bytes of activations and of what ZeRO 2 and 3 have whole, together, over the backwards of a rank's virtual stages.

    While one of them works, the others keep what they closed last, and with stage 3 the weights that their forward used last.
    """
    buckets = [buckets_of(stage, sharing) for stage in stages]
    idle = [_kept_idle(each, sharing) for each in buckets]
    return max(max(_moments(stage, own, sharing)) + sum(idle) - kept for stage, own, kept in zip(stages, buckets, idle, strict=True))


def buckets_of(stage: StageUnits, sharing: Sharing) -> list[Bucket]:
    """The gradient buckets of a stage, in the order in which they close: as `megactl.engine.flat` cuts them."""
    whole: list[Bucket] = []
    found: list[Bucket] = []
    for index, unit in enumerate(stage.units):
        sharded = sum(n for n in unit.tensors if sharing.is_sharded(n))
        if sharded:
            found.append(Bucket(sharded, index, index, () if unit.is_table else (index,)))
        rest = sum(unit.tensors) - sharded
        if rest:
            whole.append(Bucket(rest, index, index))
        if sum(part.elements for part in whole) >= sharing.bucket:
            found.append(_joined(whole))
            whole = []
    found += [_joined(whole)] if whole else []
    tied = _tied(stage, sharing)
    # The head's copy comes before all others; the embedding's weight after them.
    every = [*found, *tied] if not tied or tied[0].last else [*tied, *found]
    return sorted(every, key=lambda bucket: bucket.last)


def largest_bucket(stage: StageUnits, sharing: Sharing) -> int:
    """Elements of the largest bucket of a stage, 0 for none."""
    return max((bucket.elements for bucket in buckets_of(stage, sharing)), default=0)


def whole_elements(stage: StageUnits, sharing: Sharing) -> int:
    """Elements whose weights stay whole between their uses on every replica."""
    tensors = [n for unit in stage.units for n in unit.tensors] + [stage.tied]
    return sum(n for n in tensors if not sharing.is_sharded(n))


def _joined(parts: Sequence[Bucket]) -> Bucket:
    return Bucket(sum(part.elements for part in parts), parts[0].first, parts[-1].last)


def _tied(stage: StageUnits, sharing: Sharing) -> list[Bucket]:
    """The bucket of the shared weight. The head's backward reads it; the embedding's, as of every table, does not."""
    if not stage.tied_readers:
        return []
    reads = tuple(reader for reader in stage.tied_readers if not stage.units[reader].is_table)
    return [Bucket(stage.tied, stage.tied_readers[0], stage.tied_readers[-1], reads if sharing.is_sharded(stage.tied) else ())]


def _moments(stage: StageUnits, buckets: Sequence[Bucket], sharing: Sharing) -> Iterator[int]:
    """Bytes at each moment of the last micro-batch's way through the stage; see the module."""
    now = sharing.micro_batches - 1
    travelling = buckets[-1] if buckets else None
    arriving = sharing.travelling(travelling, now - 1)
    yield stage.entry + _gathered_first(stage, buckets, sharing) + arriving
    filled = 0
    for index, unit in enumerate(stage.units):
        weights = _gathered(buckets, index, sharing)
        yield unit.arrival + weights + filled + arriving
        opened = [bucket for bucket in buckets if bucket.first == index]
        if travelling in opened:
            travelling, arriving = None, 0
        filled += sharing.gradient * sum(bucket.elements for bucket in opened)
        yield unit.at_work + weights + filled + arriving
        after = stage.units[index + 1].arrival if index + 1 < len(stage.units) else stage.departure
        for bucket in (bucket for bucket in buckets if bucket.last == index):
            filled -= sharing.gradient * bucket.elements
            travelling, arriving = bucket, sharing.travelling(bucket, now)
            yield after + weights + filled + arriving


def _gathered_first(stage: StageUnits, buckets: Sequence[Bucket], sharing: Sharing) -> int:
    """Bytes of weights at hand when a forward reads the table of the embedding: that, and those of the first `prefetch` layers."""
    tables = [index for index, unit in enumerate(stage.units) if unit.is_table]
    if not tables or sharing.zero < 3:
        return 0
    readers = sorted({reader for bucket in buckets for reader in bucket.gathered_for}, reverse=True)
    wanted = set(readers[: sharing.prefetch])
    read = [bucket for bucket in buckets if bucket.last == tables[0] or wanted.intersection(bucket.gathered_for)]
    return sharing.weight * sum(bucket.elements for bucket in read)


def _gathered(buckets: Sequence[Bucket], unit: int, sharing: Sharing) -> int:
    """Bytes of weights that the backward of a unit has at hand: its own, and those of the next `prefetch` units that have any."""
    readers = sorted({reader for bucket in buckets for reader in bucket.gathered_for if reader > unit})
    wanted = {unit, *readers[: sharing.prefetch]}
    return sharing.weight * sum(bucket.elements for bucket in buckets if wanted.intersection(bucket.gathered_for))


def _kept_idle(buckets: Sequence[Bucket], sharing: Sharing) -> int:
    """Bytes of a virtual stage that does not run: the bucket that was closed last, and the weights with which its backward begins."""
    first = min((reader for bucket in buckets for reader in bucket.gathered_for), default=None)
    kept = sum(bucket.elements for bucket in buckets if first is not None and first in bucket.gathered_for)
    return sharing.weight * kept + sharing.travelling(buckets[-1] if buckets else None, sharing.micro_batches - 1)
