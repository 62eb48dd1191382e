"""A linear's bias and the GELU after it, in one pass over memory forward and one backward.

Source: Hendrycks and Gimpel, "Gaussian error linear units", 2016. Both forms keep their relative accuracy for negative inputs, where
1 + tanh and 1 + erf cancel: about 1e-6 for |x + bias| < 3 and 1e-5 as far out as the result can be represented (float32; the errors
are those of exp's argument).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megactl.engine.ops.calls import compiled, differentiable
from megactl.engine.ops.library import looks, use_compiled
from megactl.engine.ops.reference import gelu as reference

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def bias_gelu(x: Tensor, bias: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(x + bias), for x [..., f] and bias [f] of one dtype. Differentiable once in both; only x and bias are kept.

    `approximate` is torch's: "tanh", or "none" for the exact one. The sum and GELU are computed in float32 (float64 for double)
    and rounded once. x is made contiguous. Raises ValueError for tensors that do not fit.
    """
    tanh = _is_tanh(approximate)
    _check(x, bias)
    arguments = (x.contiguous(), bias.contiguous(), tanh)
    return compiled("bias_gelu", *arguments) if use_compiled() else reference.bias_gelu(*arguments)


@torch.no_grad()
def bias_gelu_forward(x: Tensor, bias: Tensor, approximate: str = "tanh") -> Tensor:
    """`bias_gelu` without a graph, for a caller that has its own backward."""
    return bias_gelu(x, bias, approximate)


@torch.no_grad()
def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor, approximate: str = "tanh") -> tuple[Tensor, Tensor]:
    """Gradients of `bias_gelu`'s x, [..., f] in its dtype, and bias, float32 [f] (float64 for double).

    `grad` is like x. The bias's gradient is the column sum of x's gradient before that is rounded, taken in one order whatever the
    number of threads. Raises ValueError for tensors that do not fit.
    """
    tanh = _is_tanh(approximate)
    _check(x, bias)
    if grad.shape != x.shape or grad.dtype != x.dtype or grad.device != x.device:
        raise ValueError(f"grad is {looks(grad)}, x is {looks(x)}: grad must have the shape, dtype and device of x")
    arguments = (grad.contiguous(), x.contiguous(), bias.contiguous(), tanh)
    return compiled("bias_gelu_backward", *arguments) if use_compiled() else reference.bias_gelu_backward(*arguments)


def _is_tanh(approximate: str) -> bool:
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate = {approximate!r}: must be 'tanh', or 'none' for the exact GELU")
    return approximate == "tanh"


def _check(x: Tensor, bias: Tensor) -> None:
    if x.dtype not in FLOATS or x.dim() == 0:
        raise ValueError(f"x is {looks(x)}: must be a floating-point tensor [..., f]")
    if bias.shape != x.shape[-1:] or bias.dtype != x.dtype or bias.device != x.device:
        raise ValueError(f"bias is {looks(bias)}, x is {looks(x)}: bias must be [f] for x [..., f], of one dtype and device")


def register() -> None:
    """Tell torch what shapes the operators give, and bias_gelu's backward."""
    torch.library.register_fake("megactl::bias_gelu", lambda x, bias, tanh: torch.empty_like(x))
    torch.library.register_fake("megactl::bias_gelu_backward", _fake_backward)
    differentiable("bias_gelu", _backward, _context)
    differentiable("bias_gelu_backward", _no_second_derivative)


def _fake_backward(grad: Tensor, x: Tensor, bias: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), bias.new_empty(bias.shape, dtype=torch.promote_types(bias.dtype, torch.float32))


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.tanh = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = compiled("bias_gelu_backward", grad.contiguous(), x, bias, ctx.tanh)
    return grad_x, grad_bias.to(bias.dtype), None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("bias_gelu has no second derivative: set MEGACTL_OPS=torch, whose GELU is torch's own")
