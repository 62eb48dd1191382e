"""The angles of rotary position embedding (Su et al. 2021, arXiv:2104.09864), with Llama 3's stretched wavelengths.

Computed in float32 from the position ids, once a micro-batch for all layers of a stage; what turns queries and keys by them is
`ops.rotary_qkv`. The arithmetic is step by step that of Hugging Face's Llama, so that weights mean the same there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megactl.config.schema import Model


def rotary_frequencies(config: Model) -> Tensor:
    """Radians a position for each turned pair of elements, float32 [w / 2] on the CPU.

    With a scaling factor, wavelengths beyond original_positions / low_frequency are stretched by it, those below
    original_positions / high_frequency are not, and between them the share is linear in the frequency (Llama 3.1).
    """
    width = config.rotary_width
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    frequencies = 1.0 / config.rope_base**exponents
    factor, low, high = config.rope_scaling_factor, config.rope_low_frequency, config.rope_high_frequency
    if factor == 1.0:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    # 1 where nothing is stretched, 0 where all is.
    share = ((config.rope_original_positions / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - share) * frequencies / factor + share * frequencies


class RotaryAngles:
    """Cosines and sines of positions. No module: it has no weights, and nothing about it changes with the model's type or device."""

    def __init__(self, config: Model) -> None:
        # Made here on the CPU, whatever torch.device the model is built under.
        self._frequencies = rotary_frequencies(config)

    def __call__(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), float32 [b, s, w / 2], of position_ids [b, s]."""
        device = position_ids.device
        if self._frequencies.device != device:
            # Once. From pageable memory the copy would wait for the device.
            source = self._frequencies.pin_memory() if device.type == "cuda" else self._frequencies
            self._frequencies = source.to(device, non_blocking=True)
        angles = position_ids.to(torch.float32).unsqueeze(-1) * self._frequencies
        return angles.cos(), angles.sin()
