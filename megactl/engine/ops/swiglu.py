"""SwiGLU's activation, SiLU of the gate times the other half, in one pass over memory forward and one backward.

Source: Shazeer, "GLU variants improve transformer", 2020 (arXiv:2002.05202).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megactl.engine.ops.calls import compiled, differentiable
from megactl.engine.ops.library import looks, use_compiled
from megactl.engine.ops.reference import swiglu as reference

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, [..., f], for x [..., 2f] whose first half is the gate and whose second half is up. Only x is kept for backward.

    Computed in float32 (float64 for double) and rounded once. Differentiable once. x is made contiguous. Raises ValueError for a tensor
    that does not fit.
    """
    _check(x)
    return compiled("swiglu", x.contiguous()) if use_compiled() else reference.swiglu(x)


@torch.no_grad()
def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of `swiglu`'s x, [..., 2f] in its dtype; `grad` [..., f] is like the result. Raises ValueError for what does not fit."""
    _check(x)
    if grad.shape != (*x.shape[:-1], x.shape[-1] // 2) or grad.dtype != x.dtype or grad.device != x.device:
        raise ValueError(f"grad is {looks(grad)}, x is {looks(x)}: grad must be [..., f] for x [..., 2f], of one dtype and device")
    arguments = (grad.contiguous(), x.contiguous())
    return compiled("swiglu_backward", *arguments) if use_compiled() else reference.swiglu_backward(*arguments)


def _check(x: Tensor) -> None:
    if x.dtype not in FLOATS or x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"x is {looks(x)}: must be a floating-point tensor [..., 2f], gate and up")


def register() -> None:
    """Tell torch what shapes the operators give, and swiglu's backward."""
    torch.library.register_fake("megactl::swiglu", lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)))
    torch.library.register_fake("megactl::swiglu_backward", lambda grad, x: torch.empty_like(x))
    differentiable("swiglu", _backward, _context)
    differentiable("swiglu_backward", _no_second_derivative)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return compiled("swiglu_backward", grad.contiguous(), x)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("swiglu has no second derivative: set MEGACTL_OPS=torch, whose SiLU is torch's own")
