"""What the workers run: the engine under test, with everything it did handed back as arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from unittest import mock

import numpy as np
import torch

from megactl.config.schema import Run
from megactl.engine.data import BatchLoader
from megactl.engine.data.batch import Batch
from megactl.engine.flat import ParameterSpec
from megactl.engine.mesh import Mesh
from megactl.engine.training_step import TrainingStep
from megactl.engine.zero import ShardedOptimizer
from parity.cases import Plan
from parity.corpus import EOD, Corpus, PairCorpus
from parity.mutations import MUTATIONS
from parity.mutations_zero import HARMLESS
from parity.pool import Worker


@dataclass(frozen=True)
class Piece:
    """One rank's part of a tensor, as it says itself."""

    logical_shape: tuple[int, ...]
    rectangle: tuple[tuple[int, int], ...]
    values: np.ndarray


Pieces = dict[str, Piece]


@dataclass(frozen=True)
class RankResult:
    """What one rank saw. `facts` are sizes and types of its buffers."""

    losses: tuple[float, ...]
    parts: tuple[tuple[float, ...], ...]
    norms: tuple[float, ...]
    skipped: tuple[float, ...]
    gradients: tuple[Pieces, ...]
    weights: Pieces
    eval_losses: tuple[float, ...]
    scales: tuple[float, ...]
    facts: dict[str, object]


def train(
    worker: Worker, run: Run, corpus: Corpus | PairCorpus, plan: Plan, mutation: str | None = None, ops: str | None = None
) -> RankResult:
    """The engine's counterpart of `reference.train_reference`. `mutation` names a fault to build in, `ops` sets MEGACTL_OPS."""
    fault = (MUTATIONS | HARMLESS)[mutation].fault() if mutation else nullcontext()
    with fault, mock.patch.dict(os.environ, {} if ops is None else {"MEGACTL_OPS": ops}):
        return _train(worker, run, corpus, plan)


def _train(worker: Worker, run: Run, corpus: Corpus | PairCorpus, plan: Plan) -> RankResult:
    mesh = worker.mesh(run.parallel)
    engine = TrainingStep(run, mesh)
    micro_batch = source(run, corpus, mesh)
    outcomes, gradients = [], []
    for iteration, start, size, rate in plan.steps():
        batches = partial(micro_batch, start)
        with _overflow(mesh) if iteration in plan.overflows else nullcontext():
            outcomes.append(engine.step(iteration, batches, global_batch_size=size, learning_rate=rate))
        gradients.append(_pieces(engine.gradients()))
    weights = _pieces(engine.weights())
    micro_batches = size // (run.training.micro_batch_size * mesh.dp.size)
    last = engine.evaluate(batches, micro_batches, size).tolist()
    numbers = {name: tuple(getattr(o, name).item() for o in outcomes) for name in ("loss", "grad_norm", "skipped", "loss_scale")}
    parts = tuple(tuple(o.parts.tolist()) for o in outcomes)
    return RankResult(
        numbers["loss"], parts, numbers["grad_norm"], numbers["skipped"], tuple(gradients), weights, tuple(last),
        numbers["loss_scale"], _facts(engine),
    )  # fmt: skip


def source(run: Run, corpus: Corpus | PairCorpus, mesh: Mesh) -> Callable[[int, int], Batch]:
    """(samples consumed, index) -> this replica's micro-batch."""
    options, size, dp = run.data, run.training.micro_batch_size, mesh.dp
    if isinstance(corpus, PairCorpus):
        return lambda start, index: corpus.batch(start + (index * dp.size + dp.rank) * size, size)
    loader = BatchLoader(
        corpus, size, dp.rank, dp.size, eod=EOD, reset_position_ids=options.reset_position_ids,
        reset_attention_mask=options.reset_attention_mask, eod_mask_loss=options.eod_mask_loss,
    )  # fmt: skip
    return loader.micro_batch


@contextmanager
def _overflow(mesh: Mesh) -> Iterator[None]:
    """Within it the last rank's gradients have no finite norm, as after an overflow that only one shard sees."""
    original = ShardedOptimizer.norm_squared

    def norm_squared(self: ShardedOptimizer) -> torch.Tensor:
        found = original(self)
        return torch.full_like(found, torch.inf) if mesh.rank == mesh.world_size - 1 else found

    with mock.patch.object(ShardedOptimizer, "norm_squared", norm_squared):
        yield


def _pieces(found: dict[str, tuple[ParameterSpec, torch.Tensor]]) -> Pieces:
    return {name: Piece(spec.logical_shape, spec.rectangle, tensor.numpy().copy()) for name, (spec, tensor) in found.items()}


def _facts(engine: TrainingStep) -> dict[str, object]:
    """Types and sizes of what the rank keeps, in elements."""
    flat, states = engine.parts[0].flat, engine.parts[0].optimizer.states
    kinds = ("param", "grad", "master", "exp_avg", "exp_avg_sq")
    return {
        **{f"{kind}_dtypes": {str(getattr(state, kind).dtype) for state in states} for kind in kinds},
        "parameters": _resident(flat.bucket_params),
        "gradients": _resident(flat.bucket_grads),
        "module_dtypes": {str(p.dtype) for p in engine.parts[0].model.parameters()},
        "module_grads": sum(p.grad is not None for p in engine.parts[0].model.parameters()),
        "state": sum(state.exp_avg.numel() for state in states),
        "masters": sum(state.master.numel() for state in states if state.master.data_ptr() != state.param.data_ptr()),
        "buckets": sum(len(part.flat.buckets) for part in engine.parts),
        "copies_differ": _copies_differ(engine),
        "padding_weight": _padding(engine, "param"),
        "padding_gradient": _padding(engine, "grad"),
    }


def _copies_differ(engine: TrainingStep) -> int:
    """Elements in which two copies of a weight in stages of this rank, or their optimizer states, differ; padding counts too."""
    held: dict[str, torch.Tensor] = {}
    differing = 0
    for part in engine.parts:
        for state in part.optimizer.states:
            if state.bucket.tied:
                for kind in ("param", "master", "exp_avg", "exp_avg_sq"):
                    values = getattr(state, kind)
                    differing += int((held.setdefault(kind, values) != values).sum())
    return differing


def _resident(buckets: list[torch.Tensor]) -> int:
    """Elements of the buckets that have memory between steps."""
    return sum(bucket.numel() for bucket in buckets if bucket.untyped_storage().nbytes())


def _padding(engine: TrainingStep, kind: str) -> float:
    """The largest magnitude in the padding rows of the vocabulary; 0 where the engine keeps them out of everything."""
    flat, buffer, largest = engine.parts[0].flat, engine.parts[0].optimizer.whole(kind), 0.0
    for placement in flat.placements:
        outside = flat.view(buffer, placement)[placement.spec.held_shape[0] :]
        if outside.numel():
            largest = max(largest, outside.abs().max().item())
    return largest
