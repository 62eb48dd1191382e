"""The one place where a plain model becomes a parallel one.

In this order: build the stage's layers without memory (meta device), cut them over the tensor-parallel ranks, let attention work
over the context-parallel ones, cut what is left into tiles, settle what is computed again in backward, put the weights into flat
buffers, add the optimizer, hook the reduction of gradients and the gathering of weights, draw the initial values of exactly those
parts.
Initial values are drawn by canonical name and global element, so every layout starts from the same model.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from megactl.config.schema import Run
from megactl.costmodel.parameters import padded_vocab, split_layers
from megactl.engine import ops
from megactl.engine.activations import apply_recompute
from megactl.engine.context_parallel import apply_context_parallel
from megactl.engine.data_parallel import GradientReducer
from megactl.engine.flat import FlatParameters, Placement, Sharing
from megactl.engine.gather import WeightGatherer
from megactl.engine.mesh import Mesh, stage_ranks
from megactl.engine.models import MODELS
from megactl.engine.offload import make_optimizer
from megactl.engine.sequence_parallel import mark_partial_gradients
from megactl.engine.sharded_gradients import ShardedReducer
from megactl.engine.tensor_parallel import apply_tensor_parallel
from megactl.engine.tiles import apply_tiles
from megactl.engine.units import Unit, units_of, watch
from megactl.engine.zero import ShardedOptimizer

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class Part:
    """One pipeline stage of the model on this rank, ready to train. `gatherer` is there with ZeRO 3."""

    virtual_stage: int
    model: nn.Module
    flat: FlatParameters
    reducer: GradientReducer | ShardedReducer
    optimizer: ShardedOptimizer
    gatherer: WeightGatherer | None = None

    def backward(self) -> AbstractContextManager[None]:
        """Around one backward through the part."""
        return nullcontext() if self.gatherer is None else self.gatherer.backward()

    def release_weights(self) -> None:
        """Give back what is gathered of the weights, which are about to change."""
        if self.gatherer is not None:
            self.gatherer.release_all()


def compute_dtype(run: Run) -> torch.dtype:
    """Type of weights and activations."""
    return COMPUTE_DTYPES[run.training.precision]


def main_dtype(run: Run) -> torch.dtype:
    """Type of gradients, masters and moments: fp32, except in verification runs."""
    return torch.float64 if run.training.precision == "fp64" else torch.float32


def build_parts(run: Run, mesh: Mesh) -> list[Part]:
    """This rank's share of each of its stages, in the order of the model. `run` is resolved."""
    ranks = stage_ranks(run.parallel)
    return [build_part(run, mesh, stage, len(ranks)) for stage, rank in enumerate(ranks) if rank == mesh.pp.rank]


def build_part(run: Run, mesh: Mesh, virtual_stage: int, num_stages: int) -> Part:
    """This rank's share of one stage. `run` is resolved."""
    model, parallel = build_stage(run, mesh, virtual_stage, num_stages), run.parallel
    apply_recompute(model, run, mesh)
    units = units_of(model, split_layers=parallel.split_layers)
    flat = FlatParameters(
        model, mesh, units, dtype=compute_dtype(run), main_dtype=main_dtype(run), bucket_size=parallel.bucket_size,
        sharing=Sharing(parallel.zero or 0, parallel.persistence_threshold),
    )  # fmt: skip
    optimizer = make_optimizer(flat, mesh, run)
    shards = optimizer.weight_shards()
    gatherer = WeightGatherer(units, flat, shards, prefetch=parallel.zero_prefetch) if shards else None
    part = Part(virtual_stage, model, flat, _reducer(model, optimizer, parallel.overlap_grad_reduce), optimizer, gatherer)
    _watch(part, units)
    for placement in flat.placements:
        initialise(placement, flat, optimizer, run.training.seed)
    return part


def _reducer(model: nn.Module, optimizer: ShardedOptimizer, overlap: bool) -> GradientReducer | ShardedReducer:
    mesh, flat = optimizer.mesh, optimizer.flat
    if flat.grad_buffers:
        return ShardedReducer(flat, [state.grad for state in optimizer.states], mesh, overlap=overlap)
    return GradientReducer(model, flat, mesh, zero=optimizer.zero, overlap=overlap)


def _watch(part: Part, units: list[Unit]) -> None:
    observers = [part.gatherer] if part.gatherer is not None else []
    if isinstance(part.reducer, ShardedReducer):
        observers.append(part.reducer)
    if observers:
        watch(units, observers)


def build_stage(run: Run, mesh: Mesh, virtual_stage: int, num_stages: int) -> nn.Module:
    """The stage's module, cut for this tensor-parallel rank, without memory."""
    layers = split_layers(run.model.num_layers, num_stages, run.parallel.pipeline_split)[virtual_stage]
    with torch.device("meta"):
        model = MODELS[run.model.architecture](
            run.model, layers=layers, first=virtual_stage == 0, last=virtual_stage == num_stages - 1,
            vocab_rows=padded_vocab(run.model.vocab_size, mesh.tp.size),
        )  # fmt: skip
        apply_tensor_parallel(model, mesh.tp, sequence_parallel=run.parallel.sequence_parallel)
        apply_context_parallel(model, mesh, run.parallel.context_method)
        apply_tiles(model, run.parallel.tile)
        if run.parallel.sequence_parallel:
            mark_partial_gradients(model)
    return model


@torch.no_grad()
def initialise(placement: Placement, flat: FlatParameters, optimizer: ShardedOptimizer, seed: int) -> None:
    """Give a parameter, or this rank's share of it, its starting value, and the masters that before rounding. Padding rows stay zero."""
    spec = placement.spec
    local = torch.zeros(spec.local_shape, dtype=flat.main_dtype, device=flat.device)
    held = local[spec.unpadded]
    if spec.initial.std:
        # Only rows are padded, so the held part of a contiguous tensor is contiguous too.
        stream = ops.stream_of(spec.name)
        ops.normal_(held, logical_shape=spec.logical_shape, rectangle=spec.rectangle, seed=seed, stream=stream, std=spec.initial.std)
    else:
        held.fill_(spec.initial.constant)
    if not flat.buckets[placement.bucket].sharded:
        flat.in_bucket(flat.bucket_params, placement).copy_(local)
    optimizer.write(placement.start, local.view(-1))
