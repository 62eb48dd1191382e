"""One flat buffer of parameters and one of gradients a model part, cut into buckets.

    params  compute dtype (bf16, fp32; fp64 in verification)   each nn.Parameter is a view
    grads   main dtype (fp32; fp64 in verification)            each parameter's `main_grad` is a view

Both have the same layout. Parameters stand in the order in which backward completes them (last layer first), so that a
bucket can be reduced while the layers below it still compute. Inside a bucket they are grouped by (weight decay, counted in
the norm), so that the optimizer and the norm see a few long segments; those whose gradient is summed over the tensor-parallel
ranks stand together in its middle, at the same place on each of them. A bucket is padded to a multiple of
dp x ALIGNMENT elements: slice r of every bucket belongs to data-parallel rank r under ZeRO.

With ZeRO 2 each bucket's gradients have a buffer of their own, whose memory is there only while a backward fills it; with ZeRO 3 so
have the weights of a bucket that is `sharded`, while something reads them. Then a bucket is what one unit reads, and parameters
below the persistence threshold, which stay whole, have buckets apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megactl.engine.mesh import Mesh
from megactl.engine.models.layers import Initial
from megactl.engine.tiles import Tile
from megactl.engine.transient import TransientBuffer
from megactl.engine.units import Unit

# 64 elements: every parameter and every shard starts on a 128-byte line or better, for vector loads in any dtype.
ALIGNMENT = 64


@dataclass(frozen=True)
class ParameterSpec:
    """What a parameter is within the whole model, and which part of it this rank holds.

    `rectangle` is the held part, [start, stop) in each dimension of `logical_shape`; padding rows are outside it.
    counted: whether this rank's copy enters the global norm (a copy on another rank does otherwise).
    tied: the embedding's weight when first and last stage both hold it; is_copy: the last stage's one. unit: the last one that
    backward passes of those that read it. readers: each of them, and whether its backward reads it too. Tiles of one tensor have
    one name and rectangles of their own. partial: whole on each tensor-parallel rank, with the gradient of that rank's tokens
    (sequence parallelism).
    """

    name: str
    logical_shape: tuple[int, ...]
    rectangle: tuple[tuple[int, int], ...]
    local_shape: tuple[int, ...]
    initial: Initial
    decay: bool
    counted: bool
    tied: bool
    is_copy: bool
    unit: int
    readers: tuple[tuple[int, bool], ...]
    partial: bool = False

    @property
    def held_shape(self) -> tuple[int, ...]:
        """Shape of the rectangle: the local shape without padding rows."""
        return tuple(stop - start for start, stop in self.rectangle)

    @property
    def unpadded(self) -> tuple[slice, ...]:
        """The rectangle within a tensor of the local shape."""
        return tuple(slice(0, n) for n in self.held_shape)

    @property
    def numel(self) -> int:
        """Elements of the local shape, padding included."""
        return torch.Size(self.local_shape).numel()


@dataclass(frozen=True)
class Placement:
    """Where a parameter stands in the flat buffers."""

    spec: ParameterSpec
    start: int
    bucket: int

    @property
    def stop(self) -> int:
        """End of the parameter, alignment gap excluded."""
        return self.start + self.spec.numel


@dataclass(frozen=True)
class Segment:
    """A run of a bucket whose parameters agree in decay and counting; alignment gaps inside hold zeros."""

    start: int
    stop: int
    decay: bool
    counted: bool

    def within(self, start: int, stop: int) -> Segment | None:
        """The part of the segment inside [start, stop)."""
        low, high = max(self.start, start), min(self.stop, stop)
        return Segment(low, high, self.decay, self.counted) if low < high else None


@dataclass(frozen=True)
class Bucket:
    """Range [start, stop) of the flat buffers; complete once backward has passed `unit`.

    sharded: its weights are gathered when they are read. gaps: ranges, from the bucket's start, that belong to no parameter.
    partial: the range, from the bucket's start, whose gradients are summed over the tensor-parallel ranks; empty for none.
    """

    start: int
    stop: int
    unit: int
    tied: bool
    segments: tuple[Segment, ...]
    readers: tuple[tuple[int, bool], ...] = ()
    sharded: bool = False
    gaps: tuple[tuple[int, int], ...] = ()
    partial: tuple[int, int] = (0, 0)

    @property
    def numel(self) -> int:
        """Elements, gaps included."""
        return self.stop - self.start

    @property
    def sums_tokens(self) -> bool:
        """Whether some of its gradients are of this tensor-parallel rank's tokens only."""
        return self.partial[0] < self.partial[1]

    def is_read(self, unit: int, *, backward: bool) -> bool:
        """Whether the forward, or the backward, of a unit reads its weights."""
        return any(reader == unit and (in_backward or not backward) for reader, in_backward in self.readers)

    def shard(self, rank: int, size: int) -> tuple[int, int]:
        """The slice of rank `rank` of `size`."""
        length = (self.stop - self.start) // size
        return self.start + rank * length, self.start + (rank + 1) * length


@dataclass(frozen=True)
class Sharing:
    """What the replicas share: the ZeRO stage; with stage 3, parameters of fewer elements than `threshold` stay whole."""

    zero: int = 0
    threshold: int = 0


def parameter_specs(model: nn.Module, mesh: Mesh, units: Sequence[Unit]) -> list[tuple[nn.Parameter, ParameterSpec]]:
    """Each parameter of a model part once, in forward order."""
    # A unit comes after the one it lies in, so the innermost has the last word.
    unit_of = {id(module): unit.index for unit in units for part in unit.modules for module in part.modules()}
    found: dict[int, tuple[nn.Parameter, ParameterSpec]] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            unit = unit_of[id(module)]
            # A table's gradient is made of ids and gradients alone.
            reader = unit, not getattr(module, "is_table", False)
            if id(parameter) in found:
                _, spec = found[id(parameter)]
                found[id(parameter)] = parameter, replace(spec, unit=min(spec.unit, unit), readers=(*spec.readers, reader))
            else:
                found[id(parameter)] = parameter, _spec(model, prefix, module, leaf, parameter, mesh, reader)
    return list(found.values())


def _spec(
    model: nn.Module, prefix: str, module: nn.Module, leaf: str, parameter: nn.Parameter, mesh: Mesh, reader: tuple[int, bool]
) -> ParameterSpec:
    # A tile goes by the name of the matrix it is a part of.
    own_name = f"{prefix.rpartition('.tiles.')[0] if isinstance(module, Tile) else prefix}.{leaf}"
    name = model.canonical_name(own_name)
    local = tuple(parameter.shape)
    split_dim = getattr(module, "split_dim", {}).get(leaf)
    logical, rectangle = _extent(module, leaf, local, mesh)
    is_copy = name != own_name
    return ParameterSpec(
        name, logical, rectangle, local, module.initial[leaf],
        # SwiGLU's bias has two dimensions.
        decay=parameter.ndim > 1 and leaf != "bias",
        counted=not is_copy and (split_dim is not None or mesh.tp.rank == 0),
        tied=None in (model.embedding, model.head) and not model.config.untie_embeddings and name == "embedding.tokens.weight",
        is_copy=is_copy, unit=reader[0], readers=(reader,), partial=leaf in getattr(module, "partial_gradients", ()),
    )  # fmt: skip


def _extent(module: nn.Module, leaf: str, local: tuple[int, ...], mesh: Mesh) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """(logical shape, held rectangle) of a parameter: a tile of a tensor-parallel shard, either of which may be all of it."""
    split_dim, tile_dim = (getattr(module, name, {}).get(leaf) for name in ("split_dim", "tile_dim"))
    logical, starts = list(local), [0] * len(local)
    if tile_dim is not None:
        starts[tile_dim] = module.index * local[tile_dim]
        logical[tile_dim] *= module.count
    if split_dim is not None:
        starts[split_dim] += mesh.tp.rank * logical[split_dim]
        logical[split_dim] *= mesh.tp.size
    if hasattr(module, "vocab_size"):
        logical[0] = module.vocab_size
    ends = [start + size for start, size in zip(starts, local, strict=True)]
    return tuple(logical), tuple((min(a, size), min(b, size)) for a, b, size in zip(starts, ends, logical, strict=True))


class FlatParameters:
    """The flat buffers of one model part, with the model's parameters replaced by views of them.

    `params` and `grads` are the whole buffers, None where buckets have buffers of their own (weights with ZeRO 3, gradients from ZeRO 2
    on); `bucket_params` and `bucket_grads` are there in any case. Those whose memory comes and goes are in `weight_buffers` and
    `grad_buffers`, by the bucket's number: without memory they may be looked at by none.
    """

    def __init__(
        self, model: nn.Module, mesh: Mesh, units: Sequence[Unit], *,
        dtype: torch.dtype, main_dtype: torch.dtype, bucket_size: int, sharing: Sharing,
    ) -> None:  # fmt: skip
        pairs = parameter_specs(model, mesh, units)
        self.dtype, self.main_dtype, self.device, self.sharing = dtype, main_dtype, mesh.device, sharing
        groups = _groups([spec for _, spec in pairs], bucket_size, sharing)
        self.placements, self.buckets, self.total = _place(groups, mesh.replicas.size * ALIGNMENT)
        self.names = {placement.spec.name for placement in self.placements}
        self._allocate()
        old = {id(spec): id(parameter) for parameter, spec in pairs}
        views = {old[id(spec)]: view for index in range(len(self.buckets)) for spec, view in self._views(index)}
        for module in model.modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, leaf, views[id(parameter)])

    def _allocate(self) -> None:
        zero, sharded = self.sharing.zero, {index: bucket.numel for index, bucket in enumerate(self.buckets) if bucket.sharded}
        every = {index: bucket.numel for index, bucket in enumerate(self.buckets)}
        self.weight_buffers = {i: TransientBuffer(n, self.dtype, self.device) for i, n in sharded.items()}
        self.grad_buffers = {i: TransientBuffer(n, self.main_dtype, self.device) for i, n in every.items()} if zero >= 2 else {}
        self.params = None if zero == 3 else torch.zeros(self.total, dtype=self.dtype, device=self.device)
        self.grads = None if zero >= 2 else torch.zeros(self.total, dtype=self.main_dtype, device=self.device)
        self.bucket_params = [self._of_bucket(index, self.params, self.weight_buffers, self.dtype) for index in every]
        self.bucket_grads = [self._of_bucket(index, self.grads, self.grad_buffers, self.main_dtype) for index in every]

    def _of_bucket(self, index: int, flat: Tensor | None, buffers: Mapping[int, TransientBuffer], dtype: torch.dtype) -> Tensor:
        bucket = self.buckets[index]
        if flat is not None:
            return flat[bucket.start : bucket.stop]
        # What autograd saves of a weight must not look changed when the weight is gathered again.
        return buffers[index].alias if index in buffers else torch.zeros(bucket.numel, dtype=dtype, device=self.device)

    def _views(self, index: int) -> list[tuple[ParameterSpec, nn.Parameter]]:
        """The parameters of a bucket. A view of memory that is not there cannot be made, so it is there for this while."""
        buffers = [held[index] for held in (self.weight_buffers, self.grad_buffers) if index in held]
        for buffer in buffers:
            buffer.allocate()
        found = [(placement.spec, self._parameter(placement)) for placement in self.placements if placement.bucket == index]
        for buffer in buffers:
            buffer.release()
        return found

    def _parameter(self, placement: Placement) -> nn.Parameter:
        view = nn.Parameter(self.in_bucket(self.bucket_params, placement))
        view.main_grad = self.in_bucket(self.bucket_grads, placement)
        return view

    def in_bucket(self, tensors: Sequence[Tensor], placement: Placement) -> Tensor:
        """The parameter's part of its bucket's tensor, in its local shape."""
        start = self.buckets[placement.bucket].start
        return tensors[placement.bucket][placement.start - start : placement.stop - start].view(placement.spec.local_shape)

    @staticmethod
    def view(buffer: Tensor, placement: Placement) -> Tensor:
        """The parameter's part of a flat buffer, in its local shape."""
        return buffer[placement.start : placement.stop].view(placement.spec.local_shape)

    def gradients(self) -> Iterator[tuple[ParameterSpec, Tensor]]:
        """Each parameter's gradient, padding rows left out."""
        for placement in self.placements:
            yield placement.spec, self.in_bucket(self.bucket_grads, placement)[placement.spec.unpadded]


Group = tuple[bool, list[ParameterSpec]]


def _place(groups: Iterable[Group], multiple: int) -> tuple[list[Placement], list[Bucket], int]:
    """Fill a bucket with each group, (sharded, parameters); returns placements, buckets and the length of the flat buffers."""
    placements: list[Placement] = []
    buckets: list[Bucket] = []
    offset = 0
    for sharded, group in groups:
        # Long runs of equal flags inside the bucket; the sort is stable, so the order is the same on every replica. Partial gradients
        # stand last among those that decay and first among those that do not: one range, and no more runs than without it.
        ordered = sorted(group, key=lambda spec: (not spec.decay, spec.partial == spec.decay, not spec.counted))
        start, segments, edges = offset, [], [0]
        for spec in ordered:
            placements.append(Placement(spec, offset, len(buckets)))
            end = _rounded(offset + spec.numel, ALIGNMENT)
            if segments and (segments[-1].decay, segments[-1].counted) == (spec.decay, spec.counted):
                segments[-1] = Segment(segments[-1].start, end, spec.decay, spec.counted)
            else:
                segments.append(Segment(offset, end, spec.decay, spec.counted))
            edges += [offset - start, offset - start + spec.numel]
            offset = end
        offset = start + _rounded(offset - start, multiple)
        edges.append(offset - start)
        gaps = tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)
        readers = tuple(dict.fromkeys(reader for spec in group for reader in spec.readers))
        unit = min(spec.unit for spec in group)
        summed = [placement for placement in placements[-len(ordered) :] if placement.spec.partial]
        partial = (summed[0].start - start, summed[-1].stop - start) if summed else (0, 0)
        buckets.append(Bucket(start, offset, unit, group[0].tied, tuple(segments), readers, sharded, gaps, partial))
    return placements, buckets, offset


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _groups(specs: list[ParameterSpec], bucket_size: int, sharing: Sharing) -> Iterator[Group]:
    """Backward order, whole units together, a tied weight alone (its bucket is also summed over first and last stage).

    So is, from ZeRO 2 on, a weight that several units read: its gradients live through most of a backward. With ZeRO 3 what is
    sharded is one bucket a unit, of what its backward reads and of what it does not.
    """
    alone = [spec for spec in specs if spec.tied or (sharing.zero >= 2 and len(spec.readers) > 1)]
    yield from (_alone(spec, sharing) for spec in alone if spec.is_copy)
    group: list[ParameterSpec] = []
    for unit in sorted({spec.unit for spec in specs}, reverse=True):
        own = [spec for spec in specs if spec.unit == unit and spec not in alone]
        for in_backward in (True, False):
            sharded = [spec for spec in own if _is_sharded(spec, sharing) and spec.readers[0][1] == in_backward]
            if sharded:
                yield True, sharded
        group += [spec for spec in own if not _is_sharded(spec, sharing)]
        if sum(spec.numel for spec in group) >= bucket_size:
            yield False, group
            group = []
    if group:
        yield False, group
    yield from (_alone(spec, sharing) for spec in alone if not spec.is_copy)


def _alone(spec: ParameterSpec, sharing: Sharing) -> Group:
    return _is_sharded(spec, sharing), [spec]


def _is_sharded(spec: ParameterSpec, sharing: Sharing) -> bool:
    return sharing.zero == 3 and spec.numel >= sharing.threshold


def by_name(flat: FlatParameters, values: Tensor) -> dict[str, tuple[ParameterSpec, Tensor]]:
    """What a tensor in the layout of the flat buffers holds of each parameter, padding rows left out; the tiles of one put together."""
    pieces: dict[str, list[tuple[ParameterSpec, Tensor]]] = {}
    for placement in flat.placements:
        view = flat.view(values, placement)[placement.spec.unpadded]
        pieces.setdefault(placement.spec.name, []).append((placement.spec, view))
    return {name: _joined(found) for name, found in pieces.items()}


def _joined(tiles: list[tuple[ParameterSpec, Tensor]]) -> tuple[ParameterSpec, Tensor]:
    """Tiles in their order; they differ in one dimension."""
    spec, tensor = tiles[0]
    if len(tiles) == 1:
        return spec, tensor
    (dim,) = (d for d, bounds in enumerate(zip(*(other.rectangle for other, _ in tiles), strict=True)) if len(set(bounds)) > 1)
    tiles = sorted(tiles, key=lambda tile: tile[0].rectangle[dim])
    bounds = tiles[0][0].rectangle[dim][0], tiles[-1][0].rectangle[dim][1]
    rectangle = tuple(bounds if d == dim else held for d, held in enumerate(spec.rectangle))
    shape = tuple(stop - start for start, stop in rectangle)
    return replace(spec, rectangle=rectangle, local_shape=shape), torch.cat([values for _, values in tiles], dim)
