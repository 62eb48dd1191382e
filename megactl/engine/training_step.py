"""One optimizer step and one evaluation, without host synchronisation: every decision about numbers is a device tensor.

A loss is the sum of its terms (token or sentence losses) over the global batch divided by their number in it, however they fall
into micro-batches and replicas; the loss of a step is the sum of the model's losses. With one loss backward starts from
1 / (global batch x sequence length); the true number of tokens is known after the forward passes, and the ratio (exactly 1
without a mask) is applied with the clip factor. With several losses one ratio cannot serve: their terms are counted first, and
summed over the replicas, so that backward starts from the true ratios.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megactl.config.schema import Run
from megactl.engine.boundary import Boundary
from megactl.engine.collectives import all_reduce
from megactl.engine.context_parallel import SequenceShard
from megactl.engine.data.batch import Batch
from megactl.engine.flat import ParameterSpec, by_name
from megactl.engine.loss_scale import LossScale
from megactl.engine.mesh import Mesh, stage_ranks
from megactl.engine.optimizer import clip_factor
from megactl.engine.parallelize import Part, build_parts, compute_dtype, main_dtype
from megactl.engine.pipeline import PipelineExecutor, StepInputs, targets_of
from megactl.engine.zero import reduce_tied
from megactl.schedules import Dates, RankProgram, checked_program, forward_only, generate, lower_rank

Batches = Callable[[int], Batch]


@dataclass(frozen=True)
class StepOutcome:
    """What a step found out, equal on all ranks: 0-d float64 device tensors; `stop` > 0 where a rank was asked to stop.

    `loss` is the sum of `parts` [k], the model's losses. `loss_scale` is the one the step was computed with; the losses and the norm
    are without it.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    stop: Tensor
    loss_scale: Tensor
    parts: Tensor

    def packed(self) -> Tensor:
        """All of it as one tensor [5 + k], for one copy to the host."""
        head = torch.stack([self.loss, self.grad_norm, self.skipped, self.stop, self.loss_scale])
        return torch.cat([head, self.parts])


class TrainingStep:
    """The model part of this rank with everything that a step needs. `run` is resolved."""

    def __init__(self, run: Run, mesh: Mesh) -> None:
        self.run, self.mesh = run, mesh
        self.parts = build_parts(run, mesh)
        self.shard = SequenceShard.of(run, mesh)
        self.stage_ranks = stage_ranks(run.parallel)
        boundary = Boundary(
            mesh.tp, hidden_size=run.model.hidden_size, dtype=compute_dtype(run), device=mesh.device,
            scatter_gather=run.parallel.scatter_gather, sequence_parallel=run.parallel.sequence_parallel,
        )  # fmt: skip
        self.executor = PipelineExecutor(self.parts, mesh, boundary=boundary)
        self._schedules: dict[tuple[str, int], RankProgram] = {}
        self.loss_scale = LossScale(run.training, mesh.device)
        self._normaliser = self._scalar(1.0, torch.float64)
        main = main_dtype(run)
        self._lr, self._adam_step, self._one = self._scalar(0.0, main), self._scalar(0.0, main), self._scalar(1.0, main)

    def _scalar(self, value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((), value, dtype=dtype, device=self.mesh.device)

    @property
    def adam_step(self) -> Tensor:
        """Number of updates done, 0-d: iterations less skipped ones."""
        return self._adam_step

    def step(self, iteration: int, batches: Batches, *, global_batch_size: int, learning_rate: float, stop: float = 0.0) -> StepOutcome:
        """Forward, backward, reduce, clip and update. `iteration` counts from 1; `batches(i)` is this replica's micro-batch i.

        Every rank must call it with the same iteration, global_batch_size and learning_rate.
        """
        self._seed_torch(iteration)
        self._lr.fill_(learning_rate)
        count = global_batch_size // (self.run.training.micro_batch_size * self.mesh.dp.size)
        inputs = self._inputs(iteration, batches, count, global_batch_size)
        sums, counts = self.executor.run(self._schedule(self.run.parallel.schedule, count), inputs)
        for part in self.parts:
            part.reducer.wait()
            part.release_weights()
        reduce_tied([part.optimizer for part in self.parts], self.mesh.embedding)
        totals = self._totals(sums, counts, stop)
        return self._update(totals, global_batch_size)

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the model's losses, in the order of `StepOutcome.parts`."""
        return self.parts[0].model.losses

    @property
    def _reports_loss(self) -> float:
        """1 on the ranks whose loss counts: those of the last stage, of tensor-parallel ranks, which all see the same one, the first."""
        return float(self.mesh.tp.rank == 0 and self.mesh.pp.rank == self.stage_ranks[-1])

    def _totals(self, sums: Tensor, counts: Tensor, stop: float) -> Tensor:
        """[squared norm, stop, k loss sums, k counts] over all ranks, in one reduction."""
        squared = torch.stack([part.optimizer.norm_squared() for part in self.parts]).sum()
        numbers = torch.stack([squared, self._scalar(stop, torch.float64)])
        totals = torch.cat([numbers, sums * self._reports_loss, counts * self._reports_loss])
        if self.mesh.world_size > 1:
            all_reduce(totals, None)
        return totals

    def _update(self, totals: Tensor, global_batch_size: int) -> StepOutcome:
        squared, stop = totals[:2]
        sums, counts = totals[2:].view(2, -1)
        counts = counts.clamp(min=1.0)
        # Several losses have their true ratios from the start.
        bound = global_batch_size * self.run.training.seq_length
        ratio = bound / counts[0] if len(counts) == 1 else self._scalar(1.0, torch.float64)
        # Out of the gradients with the factor that AdamW applies: no pass over memory of its own, and exact for a power of 2.
        self._normaliser = self.loss_scale.unscaled(ratio)
        norm = squared.sqrt() * self._normaliser
        skip = (~torch.isfinite(norm)).to(self._one.dtype)
        scale = (self._normaliser * clip_factor(norm, self.run.optimizer.clip_grad)).to(self._one.dtype)
        self._adam_step.add_(1.0 - skip)
        for part in self.parts:
            part.optimizer.step(lr=self._lr, step=self._adam_step, grad_scale=scale, skip=skip)
        used = self.loss_scale.scale.clone()
        self.loss_scale.update(skip)
        parts = sums / counts
        return StepOutcome(parts.sum(), norm, skip.double(), stop, used, parts)

    def _inputs(self, iteration: int, batches: Batches, count: int, global_batch_size: int, dropout: bool = True) -> StepInputs:
        seed, size, dp = self.run.training.seed, self.run.training.micro_batch_size, self.mesh.dp
        keys = [[seed, iteration, (index * dp.size + dp.rank) * size] for index in range(count)]
        # From pageable memory the copy would wait for the device.
        pinned = self.mesh.device.type == "cuda"
        rng = torch.tensor(keys, dtype=torch.int64, pin_memory=pinned).to(self.mesh.device, non_blocking=True)
        held = [batches(index).to(self.mesh.device) for index in range(count)]
        if self.shard is not None:
            held = [self.shard.cut(batch, keys[2]) for batch, keys in zip(held, rng, strict=True)]
        # Evaluation starts no backward, and need not count what its losses will count anyway.
        zeros = torch.zeros(len(self.losses), dtype=torch.float64, device=self.mesh.device)
        gradient = self.loss_scale.scaled(self._loss_gradient(held, global_batch_size)) if dropout else zeros
        return StepInputs(held, rng, gradient, dropout)

    def _loss_gradient(self, held: list[Batch], global_batch_size: int) -> Tensor:
        """What backward starts from, [k] in float64: 1 / the terms of each loss in the global batch; of a single loss, 1 / all tokens."""
        if len(self.losses) == 1:
            return self._scalar(1.0 / (global_batch_size * self.run.training.seq_length), torch.float64).unsqueeze(0)
        counts = sum(self.parts[0].model.loss_counts(targets_of(batch, torch.float64)) for batch in held)
        if self.mesh.replicas.size > 1:
            all_reduce(counts, self.mesh.replicas.group)
        return 1.0 / counts.clamp(min=1.0)

    def _seed_torch(self, iteration: int) -> None:
        # Only dropout inside a fused attention kernel draws from torch's generator. Seeding it by step and place, not by history,
        # makes a resumed run repeat it without saving generator states.
        if self.run.model.attention == "sdpa" and self.run.model.attention_dropout > 0.0:
            torch.manual_seed(hash((self.run.training.seed, iteration, self.mesh.rank)) & 0x7FFFFFFFFFFFFFFF)

    def _schedule(self, name: str, count: int) -> RankProgram:
        key = (name, count)
        if key not in self._schedules:
            ranks, own = self.mesh.pp.size, self.mesh.pp.rank
            if name == "forward":
                self._schedules[key] = lower_rank(Dates(forward_only(self.stage_ranks, count)), own)
            else:
                made = generate(name, num_ranks=ranks, num_microbatches=count, chunks=len(self.stage_ranks) // ranks)
                self._schedules[key] = checked_program(made, own)
        return self._schedules[key]

    def evaluate(self, batches: Batches, count: int, global_batch_size: int) -> Tensor:
        """Each of `losses` over `count` micro-batches a replica, without dropout; [k] in float64, equal on all ranks."""
        return means(self.evaluation_sums(batches, count, global_batch_size))

    def evaluation_sums(self, batches: Batches, count: int, global_batch_size: int) -> Tensor:
        """What `evaluate` divides: sums of each of `losses`, and how many terms they have; [2, k], to be added up over global batches."""
        sums, counts = self.executor.run(self._schedule("forward", count), self._inputs(0, batches, count, global_batch_size, False))
        totals = torch.stack([sums, counts]) * self._reports_loss
        if self.mesh.world_size > 1:
            all_reduce(totals, None)
        return totals

    def gradients(self) -> dict[str, tuple[ParameterSpec, Tensor]]:
        """The last step's gradients before clipping, padding rows left out; collective over the replicas under ZeRO."""
        return self._merged(lambda part: part.optimizer.whole("grad") * self._normaliser.to(part.flat.main_dtype))

    def weights(self) -> dict[str, tuple[ParameterSpec, Tensor]]:
        """The parameters in the main dtype (the masters where there are any), padding rows left out; collective as `gradients` is."""
        return self._merged(lambda part: part.optimizer.whole("master"))

    def _merged(self, values: Callable[[Part], Tensor]) -> dict[str, tuple[ParameterSpec, Tensor]]:
        return {name: found for part in self.parts for name, found in by_name(part.flat, values(part)).items()}


def means(totals: Tensor) -> Tensor:
    """Losses [k] of their sums and numbers of terms [2, k]; 0 for one without terms."""
    return totals[0] / totals[1].clamp(min=1.0)
