"""One flat buffer of parameters and one of gradients a model part, cut into buckets.

    params  compute dtype (bf16, fp32; fp64 in verification)   each nn.Parameter is a view
    grads   main dtype (fp32; fp64 in verification)            each parameter's `main_grad` is a view

Both have the same layout. Parameters stand in the order in which backward completes them (last layer first), so that a
bucket can be reduced while the layers below it still compute. Inside a bucket they are grouped by (weight decay, counted in
the norm), so that the optimizer and the norm see a few long segments; those whose gradient is summed over the tensor-parallel
ranks stand together in its middle, at the same place on each of them. A bucket is padded to a multiple of
dp x ALIGNMENT elements: slice r of every bucket belongs to data-parallel rank r under ZeRO.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megactl.engine.mesh import Mesh
from megactl.engine.models.layers import Initial

# 64 elements: every parameter and every shard starts on a 128-byte line or better, for vector loads in any dtype.
ALIGNMENT = 64


@dataclass(frozen=True)
class ParameterSpec:
    """What a parameter is within the whole model, and which part of it this rank holds.

    `rectangle` is the held part, [start, stop) in each dimension of `logical_shape`; padding rows are outside it.
    counted: whether this rank's copy enters the global norm (a copy on another rank does otherwise).
    tied: the embedding's weight when first and last stage both hold it; is_copy: the last stage's one.
    partial: whole on each tensor-parallel rank, with the gradient of that rank's tokens (sequence parallelism).
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
    partial: bool = False

    @property
    def held_shape(self) -> tuple[int, ...]:
        """Shape of the rectangle: the local shape without padding rows."""
        return tuple(stop - start for start, stop in self.rectangle)

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

    `partial`: the range within it whose gradients are summed over the tensor-parallel ranks; None for none.
    """

    start: int
    stop: int
    unit: int
    tied: bool
    segments: tuple[Segment, ...]
    partial: tuple[int, int] | None = None

    def shard(self, rank: int, size: int) -> tuple[int, int]:
        """The slice of rank `rank` of `size`."""
        length = (self.stop - self.start) // size
        return self.start + rank * length, self.start + (rank + 1) * length


def parameter_specs(model: nn.Module, mesh: Mesh) -> list[tuple[nn.Parameter, ParameterSpec]]:
    """Each parameter of a model part once, in forward order."""
    unit_of = {id(module): index for index, unit in enumerate(model.units()) for module in unit.modules()}
    found: dict[int, tuple[nn.Parameter, ParameterSpec]] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in found:
                spec = _spec(model, prefix, module, leaf, parameter, mesh, unit_of[id(module)])
                found[id(parameter)] = (parameter, spec)
    return list(found.values())


def _spec(model: nn.Module, prefix: str, module: nn.Module, leaf: str, parameter: nn.Parameter, mesh: Mesh, unit: int) -> ParameterSpec:
    own_name = f"{prefix}.{leaf}"
    name = model.canonical_name(own_name)
    local = tuple(parameter.shape)
    split_dim = getattr(module, "split_dim", {}).get(leaf)
    logical = [n * mesh.tp.size if dim == split_dim else n for dim, n in enumerate(local)]
    if hasattr(module, "vocab_size"):
        logical[0] = module.vocab_size
    rectangle = []
    for dim, size in enumerate(logical):
        start = mesh.tp.rank * local[dim] if dim == split_dim else 0
        rectangle.append((min(start, size), min(start + local[dim], size)))
    is_copy = name != own_name
    return ParameterSpec(
        name, tuple(logical), tuple(rectangle), local, module.initial[leaf],
        decay=parameter.ndim > 1,
        counted=not is_copy and (split_dim is not None or mesh.tp.rank == 0),
        tied=mesh.pp.size > 1 and not model.config.untie_embeddings and name == "embedding.tokens.weight",
        is_copy=is_copy, unit=unit, partial=leaf in getattr(module, "partial_gradients", ()),
    )  # fmt: skip


class FlatParameters:
    """The flat buffers of one model part, with the model's parameters replaced by views of them."""

    def __init__(self, model: nn.Module, mesh: Mesh, *, dtype: torch.dtype, main_dtype: torch.dtype, bucket_size: int, shards: int) -> None:
        pairs = parameter_specs(model, mesh)
        self.placements, self.buckets, total = _place([spec for _, spec in pairs], bucket_size, shards * ALIGNMENT)
        self.by_name = {placement.spec.name: placement for placement in self.placements}
        self.params = torch.zeros(total, dtype=dtype, device=mesh.device)
        self.grads = torch.zeros(total, dtype=main_dtype, device=mesh.device)
        old = {spec.name: id(parameter) for parameter, spec in pairs}
        views = {old[p.spec.name]: self._parameter(p) for p in self.placements}
        for module in model.modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, leaf, views[id(parameter)])

    def _parameter(self, placement: Placement) -> nn.Parameter:
        view = nn.Parameter(self.view(self.params, placement))
        view.main_grad = self.view(self.grads, placement)
        return view

    @staticmethod
    def view(buffer: Tensor, placement: Placement) -> Tensor:
        """The parameter's part of a flat buffer, in its local shape."""
        return buffer[placement.start : placement.stop].view(placement.spec.local_shape)

    def gradients(self) -> Iterator[tuple[ParameterSpec, Tensor]]:
        """Each parameter's gradient, padding rows left out."""
        for placement in self.placements:
            yield placement.spec, self.view(self.grads, placement)[tuple(slice(0, n) for n in placement.spec.held_shape)]


def _place(specs: list[ParameterSpec], bucket_size: int, multiple: int) -> tuple[list[Placement], list[Bucket], int]:
    """Fill buckets in backward order; returns placements, buckets and the length of the flat buffers."""
    placements: list[Placement] = []
    buckets: list[Bucket] = []
    offset = 0
    for group in _groups(specs, bucket_size):
        # Long runs of equal flags inside the bucket; the sort is stable, so the order is the same on every replica. Partial gradients
        # stand last among those that decay and first among those that do not: one range, and no more runs than without it.
        ordered = sorted(group, key=lambda spec: (not spec.decay, spec.partial == spec.decay, not spec.counted))
        start, segments = offset, []
        for spec in ordered:
            placements.append(Placement(spec, offset, len(buckets)))
            end = -(-(offset + spec.numel) // ALIGNMENT) * ALIGNMENT
            if segments and (segments[-1].decay, segments[-1].counted) == (spec.decay, spec.counted):
                segments[-1] = Segment(segments[-1].start, end, spec.decay, spec.counted)
            else:
                segments.append(Segment(offset, end, spec.decay, spec.counted))
            offset = end
        offset = start + -(-(offset - start) // multiple) * multiple
        summed = [placement for placement in placements[-len(ordered) :] if placement.spec.partial]
        partial = (summed[0].start, summed[-1].stop) if summed else None
        buckets.append(Bucket(start, offset, min(s.unit for s in group), group[0].tied, tuple(segments), partial))
    return placements, buckets, offset


def _groups(specs: list[ParameterSpec], bucket_size: int) -> Iterator[list[ParameterSpec]]:
    """Backward order, whole units together, a tied weight alone (its bucket is also summed over first and last stage)."""
    yield from ([spec] for spec in specs if spec.tied and spec.is_copy)
    group: list[ParameterSpec] = []
    units = sorted({spec.unit for spec in specs}, reverse=True)
    for unit in units:
        group += [spec for spec in specs if spec.unit == unit and not spec.tied]
        if sum(spec.numel for spec in group) >= bucket_size:
            yield group
            group = []
    if group:
        yield group
    yield from ([spec] for spec in specs if spec.tied and not spec.is_copy)
