"""LayerNorm and RMSNorm in plain torch: forward passes that autograd differentiates, and the backward passes written out.

Arithmetic is in float32 (float64 for float64), as in the compiled operators; results are rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the type of the arithmetic."""
    return [tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors]


def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `megactl.engine.ops.norm.layer_norm_forward`."""
    wide, wide_weight, wide_bias = _wide(x, weight, bias)
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    # What rounding the mean left out: beside a large mean it is not small.
    centred = centred - centred.mean(-1, keepdim=True)
    rstd = 1.0 / torch.sqrt(centred.square().mean(-1, keepdim=True) + epsilon)
    y = (centred * rstd * wide_weight + wide_bias).to(x.dtype)
    return y, mean.detach().squeeze(-1), rstd.detach().squeeze(-1)


def add_layer_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `megactl.engine.ops.norm.add_layer_norm_forward`."""
    total = x + residual
    y, mean, rstd = layer_norm_forward(total, weight, bias, epsilon)
    return y, total, mean, rstd


def layer_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, grad_sum: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `megactl.engine.ops.norm.layer_norm_backward`."""
    grad, wide, wide_weight = _wide(grad_y, x, weight)
    centred = wide - mean.unsqueeze(-1)
    z = (centred - centred.mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    a = grad * wide_weight
    grad_x = (a - a.mean(-1, keepdim=True) - z * (a * z).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    return _with_sum(grad_x, grad_sum, x), _over_rows(grad * z), _over_rows(grad)


def rms_norm_forward(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """See `megactl.engine.ops.norm.rms_norm_forward`."""
    wide, wide_weight = _wide(x, weight)
    rstd = 1.0 / torch.sqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * rstd * wide_weight).to(x.dtype), rstd.detach().squeeze(-1)


def add_rms_norm_forward(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `megactl.engine.ops.norm.add_rms_norm_forward`."""
    total = x + residual
    y, rstd = rms_norm_forward(total, weight, epsilon)
    return y, total, rstd


def rms_norm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad_sum: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `megactl.engine.ops.norm.rms_norm_backward`."""
    grad, wide, wide_weight = _wide(grad_y, x, weight)
    z, a = wide * rstd.unsqueeze(-1), grad * wide_weight
    grad_x = (a - z * (a * z).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    return _with_sum(grad_x, grad_sum, x), _over_rows(grad * z)


def _with_sum(grad_x: Tensor, grad_sum: Tensor | None, x: Tensor) -> Tensor:
    return (grad_x if grad_sum is None else grad_x + grad_sum).to(x.dtype)


def _over_rows(products: Tensor) -> Tensor:
    """The sum over all dimensions but the last."""
    return products.reshape(-1, products.shape[-1]).sum(0)
