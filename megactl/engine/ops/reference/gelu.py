"""bias + GELU and its backward in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def _sum(x: Tensor, bias: Tensor) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    return x.to(compute) + bias.to(compute)


def bias_gelu(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    """See `megactl.engine.ops.gelu.bias_gelu`. Differentiable; keeps the sum in the type of the arithmetic."""
    return torch.nn.functional.gelu(_sum(x, bias), approximate="tanh" if tanh else "none").to(x.dtype)


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """See `megactl.engine.ops.gelu.bias_gelu_backward`."""
    v = _sum(x, bias)
    grad_x = torch.ops.aten.gelu_backward(grad.to(v.dtype), v, approximate="tanh" if tanh else "none")
    return grad_x.to(x.dtype), grad_x.sum_to_size(bias.shape)
