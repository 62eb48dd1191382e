"""Squared norm and scaling of lists of gradients in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """See `megactl.engine.ops.gradients.squared_norm`."""
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """See `megactl.engine.ops.gradients.scale_`."""
    for tensor in tensors:
        compute = torch.promote_types(tensor.dtype, torch.float32)
        scaled = (tensor.to(compute) * factor.to(compute)).to(tensor.dtype)
        # Not the product where the factor is 1: it would be the same but for the payload of a NaN.
        tensor.copy_(torch.where(factor == 1.0, tensor, scaled))
