"""Recomputation: what backward needs is computed again instead of kept since forward (Chen et al. 2016, Korthikanti et al. 2022).

    selective         the core of attention (scores, softmax, dropout, their product with the values): q, k and v are kept
    full, uniform N   of every N layers only the input is kept
    full, block N     of each of the first N layers of a stage only the input is kept; the other layers keep everything

The second forward calls the modules as the first did, so that hooks on them run, and draws the same dropout: Philox counts elements,
and where a fused attention kernel draws from torch's generator, its state is put back. It leaves out what only a reader of the
output would need: of a group's last layer with norms before the branches that is the last matrix product of the MLP, a third of the
layer's products, and its sum over tensor-parallel ranks. Gradients are those of a run without recomputation, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from megactl.config.memory import offload_targets
from megactl.config.schema import Run
from megactl.engine.mesh import Mesh
from megactl.engine.models import Transformer
from megactl.engine.models.layers import MicroBatch
from megactl.engine.models.transformer import one_after_the_other
from megactl.engine.saved_inputs import HostStore, SavedInput, SavedInputs


def apply_recompute(model: Transformer, run: Run, mesh: Mesh) -> None:
    """Let a stage keep for backward what `run.memory` says. After `apply_tensor_parallel`, which looks for the cores of attention."""
    memory = run.memory
    # Dropout inside a fused kernel is the only thing that Philox does not draw.
    generator = Generator(mesh.device) if run.model.attention == "sdpa" and run.model.attention_dropout > 0 else None
    if memory.recompute == "selective":
        for layer in model.layers.values():
            layer.attention.core = RecomputedCore(layer.attention.core, generator)
    elif memory.recompute == "full":
        store = HostStore(mesh.device) if "activations" in offload_targets(memory.offload) else None
        saved = SavedInputs(mesh.tp if memory.partition_activations else None, store)
        model.run_layers = RecomputedLayers(memory.recompute_method, memory.recompute_layers, saved, generator)


class Generator:
    """torch's generator of a device: its state, without asking the device (on CUDA a seed and an offset on the host)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def state(self) -> Tensor:
        """What `replay` puts back."""
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def _set(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)

    @contextmanager
    def replay(self, state: Tensor) -> Iterator[None]:
        """Inside it torch draws what it drew from `state` on; afterwards it goes on where it was."""
        now = self.state()
        self._set(state)
        try:
            yield
        finally:
            self._set(now)


def _state(generator: Generator | None) -> Tensor | None:
    return None if generator is None else generator.state()


def _replay(generator: Generator | None, state: Tensor | None):
    return nullcontext() if generator is None or state is None else generator.replay(state)


class RecomputedCore(nn.Module):
    """A core of attention that keeps its inputs alone: q, k and v, which the matrix before it would not keep otherwise."""

    def __init__(self, core: nn.Module, generator: Generator | None = None) -> None:
        super().__init__()
        self.core, self.generator = core, generator

    def forward(self, q: Tensor, k: Tensor, v: Tensor, micro_batch: MicroBatch) -> Tensor:
        """q, k, v [b, n, s, d] to [b, n, s, d]."""
        if not torch.is_grad_enabled():
            return self.core(q, k, v, micro_batch)
        return _RecomputeCore.apply(q, k, v, self, micro_batch)


class _RecomputeCore(Function):
    @staticmethod
    def forward(ctx, q, k, v, owner: RecomputedCore, micro_batch: MicroBatch):
        ctx.owner, ctx.micro_batch, ctx.state = owner, micro_batch, _state(owner.generator)
        ctx.save_for_backward(q, k, v)
        return owner.core(q, k, v, micro_batch)

    @staticmethod
    def backward(ctx, grad):
        inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad(), _replay(ctx.owner.generator, ctx.state):
            y = ctx.owner.core(*inputs, ctx.micro_batch)
        return *torch.autograd.grad(y, inputs, grad), None, None


@dataclass(frozen=True)
class _Group:
    """Layers that are computed again together: the `index`-th group of a stage."""

    layers: Sequence[nn.Module]
    index: int
    saved: SavedInputs
    generator: Generator | None


class RecomputedLayers:
    """Runs the layers of a stage in groups that keep their inputs alone. Without gradients (evaluation) it runs them plainly."""

    def __init__(self, method: str, count: int, saved: SavedInputs, generator: Generator | None = None) -> None:
        self.method, self.count, self.saved, self.generator = method, count, saved, generator

    def __call__(self, layers: Sequence[nn.Module], x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """x [b, s, h] through all layers. x must want its gradient, as the gradients of weights are made on the way to it."""
        if not torch.is_grad_enabled():
            return one_after_the_other(layers, x, micro_batch)
        groups, rest = self.groups(layers)
        for index, group in enumerate(groups):
            x = _RecomputeGroup.apply(x, _Group(group, index, self.saved, self.generator), micro_batch)
        return one_after_the_other(rest, x, micro_batch)

    def groups(self, layers: Sequence[nn.Module]) -> tuple[list[Sequence[nn.Module]], Sequence[nn.Module]]:
        """(groups to compute again, layers behind them that keep everything). The last group of uniform may be smaller."""
        if self.method == "block":
            return [[layer] for layer in layers[: self.count]], layers[self.count :]
        return [layers[start : start + self.count] for start in range(0, len(layers), self.count)], []


class _RecomputeGroup(Function):
    @staticmethod
    def forward(ctx, x, group: _Group, micro_batch: MicroBatch):
        ctx.group, ctx.micro_batch, ctx.state = group, micro_batch, _state(group.generator)
        # Before the layers run, so that a copy to the host travels while they do.
        kept, ctx.saved = group.saved.keep(x, group.index)
        ctx.save_for_backward(kept)
        return one_after_the_other(group.layers, x, micro_batch)

    @staticmethod
    def backward(ctx, grad):
        x = _restored(ctx).requires_grad_()
        with torch.enable_grad(), _replay(ctx.group.generator, ctx.state):
            y = _again(ctx.group.layers, x, ctx.micro_batch)
        torch.autograd.backward(y, grad)
        return x.grad, None, None


def _restored(ctx: Any) -> Tensor:
    saved: SavedInput = ctx.saved
    return ctx.group.saved.restore(ctx.saved_tensors[0], saved).detach()


def _again(layers: Sequence[nn.Module], x: Tensor, micro_batch: MicroBatch) -> Tensor:
    """The second forward, with gradients: the same micro-batch (its dropout, its place in the gradient buffer), the end unread."""
    x = one_after_the_other(layers[:-1], x, micro_batch)
    return layers[-1](x, replace(micro_batch, unread=True))
