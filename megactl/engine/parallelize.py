"""The one place where a plain model becomes a parallel one.

In this order: build the stage's layers without memory (meta device), cut them over the tensor-parallel ranks, put what is
left into flat buffers, draw the initial values of exactly those parts, hook the gradient reduction, add the optimizer.
Initial values are drawn by canonical name and global element, so every layout starts from the same model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from megactl.config.schema import Run
from megactl.costmodel.parameters import padded_vocab, split_layers
from megactl.engine import ops
from megactl.engine.data_parallel import GradientReducer
from megactl.engine.flat import FlatParameters, Placement
from megactl.engine.mesh import Mesh
from megactl.engine.models import MODELS
from megactl.engine.tensor_parallel import apply_tensor_parallel
from megactl.engine.zero import ShardedOptimizer

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class Part:
    """One pipeline stage of the model on this rank, ready to train."""

    virtual_stage: int
    model: nn.Module
    flat: FlatParameters
    reducer: GradientReducer
    optimizer: ShardedOptimizer


def compute_dtype(run: Run) -> torch.dtype:
    """Type of weights and activations."""
    return COMPUTE_DTYPES[run.training.precision]


def main_dtype(run: Run) -> torch.dtype:
    """Type of gradients, masters and moments: fp32, except in verification runs."""
    return torch.float64 if run.training.precision == "fp64" else torch.float32


def build_parts(run: Run, mesh: Mesh) -> list[Part]:
    """This rank's share of each of its stages, in the order of the model. `run` is resolved."""
    return [build_part(run, mesh, mesh.pp.rank, mesh.pp.size)]


def build_part(run: Run, mesh: Mesh, virtual_stage: int, num_stages: int) -> Part:
    """This rank's share of one stage. `run` is resolved."""
    model = build_stage(run, mesh, virtual_stage, num_stages)
    flat = FlatParameters(
        model, mesh, dtype=compute_dtype(run), main_dtype=main_dtype(run), bucket_size=run.parallel.bucket_size,
        shards=mesh.replicas.size,
    )  # fmt: skip
    zero = run.parallel.zero or 0
    reducer = GradientReducer(model, flat, mesh, zero=zero, overlap=run.parallel.overlap_grad_reduce)
    optimizer = ShardedOptimizer(flat, mesh, zero, run.optimizer)
    for placement in flat.placements:
        initialise(placement, flat, optimizer, run.training.seed)
    return Part(virtual_stage, model, flat, reducer, optimizer)


def build_stage(run: Run, mesh: Mesh, virtual_stage: int, num_stages: int) -> nn.Module:
    """The stage's module, cut for this tensor-parallel rank, without memory."""
    layers = split_layers(run.model.num_layers, num_stages)[virtual_stage]
    with torch.device("meta"):
        model = MODELS[run.model.architecture](
            run.model, layers=layers, first=virtual_stage == 0, last=virtual_stage == num_stages - 1,
            vocab_rows=padded_vocab(run.model.vocab_size, mesh.tp.size),
        )  # fmt: skip
        apply_tensor_parallel(model, mesh.tp, sequence_parallel=run.parallel.sequence_parallel)
    return model


@torch.no_grad()
def initialise(placement: Placement, flat: FlatParameters, optimizer: ShardedOptimizer, seed: int) -> None:
    """Give a parameter its starting value, and the masters the value before rounding. Padding rows stay zero."""
    spec = placement.spec
    local = torch.zeros(spec.local_shape, dtype=flat.grads.dtype, device=flat.grads.device)
    held = local[tuple(slice(0, n) for n in spec.held_shape)]
    if spec.initial.std:
        # Only rows are padded, so the held part of a contiguous tensor is contiguous too.
        stream = ops.stream_of(spec.name)
        ops.normal_(held, logical_shape=spec.logical_shape, rectangle=spec.rectangle, seed=seed, stream=stream, std=spec.initial.std)
    else:
        held.fill_(spec.initial.constant)
    flat.view(flat.params, placement).copy_(local)
    optimizer.write_master(placement.start, local.view(-1))
