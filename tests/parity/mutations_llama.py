"""Faults of Llama-shaped models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import arange

from megactl.engine import flat
from megactl.engine.models import layers, rotary
from parity.faults import Mutation, patched


def _place_for_position(original: Callable) -> Callable:
    """Angles of places in the sequence, whatever the position ids say."""
    return lambda self, ids: original(self, arange(ids.shape[1]).expand_as(ids))


def _decay_by_dimensions(original: Callable) -> Callable:
    def mutated(*arguments):
        spec = original(*arguments)
        return replace(spec, decay=len(spec.local_shape) > 1)

    return mutated


def _heads_take_turns(original: Callable) -> Callable:
    """Keys of g groups for heads 0, g, 2g, ... in place of heads in a row."""

    def mutated(q, k, v, **options):
        times = q.shape[1] // k.shape[1]
        return original(q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1), **options)

    return mutated


LLAMA = {
    "angles do not follow the position ids": Mutation(
        patched(rotary.RotaryAngles, "__call__", _place_for_position),
        (1, 1, 2),
        "loss on rank 1",
        # Behind a mask of documents nothing shows: angles count differences of positions.
        {"positions": "rope", "documents": "positions"},
    ),
    "SwiGLU's biases decay": Mutation(patched(flat, "_spec", _decay_by_dimensions), (1, 1, 2), "weight", {"activation": "swiglu"}),
    "heads take turns at the keys": Mutation(
        patched(layers, "fused_attention", _heads_take_turns), (2, 1, 1), "loss on rank 0, step 1", {"kv_heads": 4}
    ),
}
