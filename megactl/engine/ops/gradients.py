"""Norm, scaling and clipping of many gradients at once. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megactl.engine.ops.library import use_compiled
from megactl.engine.ops.philox import FLOATS
from megactl.engine.ops.reference import gradients as reference


@torch.no_grad()
def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all elements, float64, 0-d, on the tensors' device.

    `tensors` are contiguous, on one device, of any sizes and of any mix of float64, float32, bfloat16 and float16. Squares are taken and
    added in float64, so nothing overflows; the order of additions depends on the sizes alone, so every run gives the same bits.
    On CUDA two launches serve up to 256 tensors. Raises ValueError for an empty list and for tensors that do not fit.
    """
    tensors = _checked(tensors)
    return torch.ops.megactl.squared_norm(tensors) if use_compiled() else reference.squared_norm(tensors)


@torch.no_grad()
def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply all elements of all tensors by `factor`, 0-d float32 or float64 on their device; where it is 1, nothing is touched.

    The product is taken in float32 (float64 for float64). Tensors and errors as in `squared_norm`.
    """
    tensors = _checked(tensors)
    if factor.dim() != 0 or factor.dtype not in (torch.float32, torch.float64) or factor.device != tensors[0].device:
        found = f"{factor.dtype} {list(factor.shape)} on {factor.device}"
        raise ValueError(f"factor is {found}: must be a 0-d float32 or float64 tensor on {tensors[0].device}")
    if use_compiled():
        torch.ops.megactl.scale_(tensors, factor)
    else:
        reference.scale_(tensors, factor)


@torch.no_grad()
def clip_gradients_(tensors: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale `tensors` in place so that their common 2-norm is at most `max_norm`; returns the norm before, float64, 0-d.

    The factor is that of torch.nn.utils.clip_grad_norm_, min(1, max_norm / (norm + 1e-6)); a norm of NaN makes all elements NaN.
    Tensors and errors as in `squared_norm`; ValueError, too, for a max_norm that is not positive.
    """
    if not max_norm > 0.0:
        raise ValueError(f"max_norm = {max_norm}: must be positive; take squared_norm where nothing is to be clipped")
    norm = squared_norm(tensors).sqrt()
    scale_(tensors, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _checked(tensors: Sequence[Tensor]) -> list[Tensor]:
    tensors = list(tensors)
    if not tensors:
        raise ValueError("the list of tensors is empty: must have one at least, which says on what device the result lies")
    device = tensors[0].device
    for tensor in tensors:
        if tensor.dtype not in FLOATS or not tensor.is_contiguous() or tensor.device != device:
            found = f"{tensor.dtype}{'' if tensor.is_contiguous() else ', not contiguous,'} on {tensor.device}"
            raise ValueError(f"a tensor is {found}: must be contiguous and floating-point, on {device} as the first")
    return tensors


def register() -> None:
    """Tell torch what shapes the operators give."""
    torch.library.register_fake("megactl::squared_norm", lambda tensors: tensors[0].new_empty((), dtype=torch.float64))
    torch.library.register_fake("megactl::scale_", lambda *arguments: None)
