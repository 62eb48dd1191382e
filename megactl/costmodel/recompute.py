"""What recomputation keeps of a stage's layers for backward, and what it takes while it runs.

A layer keeps A bytes where everything is kept, x of them its input. Of L layers on a rank, per micro-batch:

    none, selective   L A              (selective: A without the core of attention)
    full, uniform N   ceil(L / N) x    and N layers' A again while a group's backward runs
    full, block N     N x + (L - N) A  and one layer's A again

What runs again gives its output again, which nobody reads: another x. The input is whole on each tensor-parallel rank.
`--partition-activations` leaves a rank 1 / t of it, and gathers it before use; `--offload activations` leaves none of it on the device
but what is on its way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Inputs in flight that the device holds beside the one in use: two that leave for the host, one that was fetched ahead.
IN_FLIGHT = 3


@dataclass(frozen=True)
class Recompute:
    """How much is computed again: settings of `config.schema.Memory`. `shares`: ranks that each keep a part of a saved input."""

    mode: str = "none"
    method: str = "uniform"
    count: int = 1
    shares: int = 1
    on_host: bool = False


@dataclass(frozen=True)
class KeptLayers:
    """Bytes a rank keeps for one micro-batch on the device and on the host; `again`: what a group's second forward adds at its peak."""

    device: int
    host: int
    again: int


def kept_layers(recompute: Recompute, layers: int, *, layer: int, layer_input: int) -> KeptLayers:
    """What `layers` layers of a stage keep. `layer`: bytes of one that is not computed again as a whole; `layer_input`: of its input."""
    if recompute.mode != "full":
        return KeptLayers(layers * layer, 0, 0)
    whole = max(0, layers - recompute.count) if recompute.method == "block" else 0
    groups = layers - whole if recompute.method == "block" else -(-layers // recompute.count)
    part = -(-layer_input // recompute.shares)
    # A saved input that is whole and on the device is the first tensor that the second forward would keep.
    found = layer_input if recompute.shares == 1 and not recompute.on_host else 0
    largest = 1 if recompute.method == "block" else min(recompute.count, layers)
    again = largest * layer - found + layer_input + (IN_FLIGHT * part if recompute.on_host else 0) if layers else 0
    return KeptLayers(whole * layer + (0 if recompute.on_host else groups * part), groups * part if recompute.on_host else 0, again)


def held_in_backward(recompute: Recompute, layers: int, *, layer: int, layer_input: int) -> tuple[int, ...]:
    """Bytes that the layers of one micro-batch hold on the device when the backward of each begins, the last layer's first.

    What a second forward adds is in it, so the most is `device + again` of `kept_layers`.
    """
    return tuple(_held(recompute, left, layer, layer_input) for left in range(layers, 0, -1))


def _held(recompute: Recompute, layers: int, layer: int, layer_input: int) -> int:
    """Of the first `layers`, the last of which is next."""
    inputs = kept_layers(recompute, layers, layer=layer, layer_input=layer_input).device
    if recompute.mode != "full" or (recompute.method == "block" and layers > recompute.count):
        return inputs
    # A group's layers are all there when its backward begins, and go one by one.
    left = 1 if recompute.method == "block" else (layers - 1) % recompute.count + 1
    return inputs + kept_layers(replace(recompute, count=left), left, layer=layer, layer_input=layer_input).again
