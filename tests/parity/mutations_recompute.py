"""Faults of recomputation and of where its saved inputs stay, each of which the comparison must notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from megactl.engine import activations, saved_inputs
from megactl.engine.models import layers
from parity.faults import Mutation, patched


def _again_with(**changes: Callable) -> Callable:
    """A second forward whose micro-batch differs: each change is a function of the field's value."""

    def make(original: Callable) -> Callable:
        return lambda group, x, micro_batch: original(
            group, x, replace(micro_batch, **{name: change(getattr(micro_batch, name)) for name, change in changes.items()})
        )

    return make


def _next_sample(rng: torch.Tensor) -> torch.Tensor:
    return rng + torch.tensor([0, 0, 1])


def _rotated(original: Callable) -> Callable:
    def mutated(part, shape, tp):
        whole = original(part, shape, tp)
        return whole.view(tp.size, -1).roll(1, 0).view(shape)

    return mutated


def _slot_too_early(original: Callable) -> Callable:
    """A micro-batch's place in host memory is given away while the micro-batch is live."""

    def mutated(self, piece, group):
        if group == 0 and self._passes and not self._free:
            self._free.append(self._passes[0].slot)
        return original(self, piece, group)

    return mutated


def _always_unread(original: Callable) -> Callable:
    return lambda self, x, micro_batch, *, unread=False: original(self, x, micro_batch, unread=micro_batch.unread)


_FULL = {"recompute": "full", "dropout": 0.1, "micro_batches": 3}
RECOMPUTE = {
    "the second forward draws another sample's dropout": Mutation(
        patched(activations, "_again", _again_with(rng=_next_sample)), (1, 2, 1), "gradient in step 1", _FULL
    ),
    "the second forward adds to the last step's gradients": Mutation(
        patched(activations, "_again", _again_with(accumulate=lambda flag: True)), (1, 2, 1), "gradient in step 2", _FULL
    ),
    "the second forward's gradients replace those before": Mutation(
        patched(activations, "_again", _again_with(accumulate=lambda flag: False)), (1, 2, 1), "gradient in step 1", _FULL
    ),
    "shares of saved inputs change places": Mutation(
        patched(saved_inputs, "gathered", _rotated), (2, 1, 1), "gradient in step 1", {**_FULL, "partition": True}
    ),
    "a place in host memory is given away too early": Mutation(
        patched(saved_inputs.HostStore, "put", _slot_too_early), (1, 2, 1), "gradient in step 1", {**_FULL, "offload": "activations"}
    ),
    "a product that a norm reads is left out": Mutation(
        patched(layers.MLP, "forward", _always_unread), (1, 1, 1), "gradient in step 1", {**_FULL, "norm": "post"}
    ),
}
