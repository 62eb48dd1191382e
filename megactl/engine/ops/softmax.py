"""Softmax of attention scores, with their scale and their mask, in one pass over memory and without a float32 copy of the scores."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megactl.engine.ops.calls import compiled, differentiable
from megactl.engine.ops.library import looks, use_compiled
from megactl.engine.ops.reference import softmax as reference

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def masked_softmax(scores: Tensor, *, scale: float, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(scale * scores) over the keys that a query may look at, exactly 0 at the others; in the dtype of scores [b, n, sq, sk].

    `mask` is bool and broadcasts to scores; True means may look. `causal` lets query i see keys j <= i + sk - sq, and both may be
    given. A row in which nothing is allowed is all zeros, and its gradient, too; scores that are not allowed are not used, so NaN
    there does no harm. Arithmetic is float32 (float64 for double). Differentiable once in scores; the result and the mask are kept.
    scores are made contiguous, and so is the mask, in the size it has before it is expanded.
    Raises ValueError for tensors that do not fit, or a scale that is not finite.
    """
    _check(scores, scale, "scores")
    arguments = (scores.contiguous(), _as_rows(mask, scores), float(scale), causal)
    return compiled("masked_softmax", *arguments) if use_compiled() else reference.masked_softmax(*arguments)


@torch.no_grad()
def masked_softmax_backward(grad: Tensor, y: Tensor, *, scale: float, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Gradient of `masked_softmax`'s scores from that of its result y: scale * y * (grad - sum of grad * y over keys), like y.

    `mask` and `causal` are those of the forward pass: what they exclude gets 0, and its grad is not used.
    """
    _check(y, scale, "y")
    if grad.shape != y.shape or grad.dtype != y.dtype or grad.device != y.device:
        raise ValueError(f"grad is {looks(grad)}, y is {looks(y)}: grad must have the shape, dtype and device of y")
    arguments = (grad.contiguous(), y.contiguous(), _as_rows(mask, y), float(scale), causal)
    return compiled("masked_softmax_backward", *arguments) if use_compiled() else reference.masked_softmax_backward(*arguments)


def _as_rows(mask: Tensor | None, scores: Tensor) -> Tensor | None:
    """The mask as the operators take it: contiguous [b or 1, n or 1, sq or 1, sk]."""
    if mask is None:
        return None
    sizes = (*(1,) * (scores.dim() - mask.dim()), *mask.shape)
    fits = len(sizes) == 4 and all(one in (1, size) for one, size in zip(sizes, scores.shape, strict=True))
    if not fits or mask.dtype != torch.bool or mask.device != scores.device:
        raise ValueError(f"mask is {looks(mask)}, scores are {looks(scores)}: mask must be bool, on one device, and broadcast to scores")
    mask = mask.view((1,) * (4 - mask.dim()) + tuple(mask.shape))
    # An expanded dimension is one row repeated; the operators repeat it themselves.
    for dim in range(3):
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask.expand(-1, -1, -1, scores.shape[-1]).contiguous()


def _check(scores: Tensor, scale: float, name: str) -> None:
    if scores.dim() != 4 or scores.dtype not in FLOATS:
        raise ValueError(f"{name} is {looks(scores)}: must be a floating-point tensor [batch, heads, queries, keys]")
    if not math.isfinite(scale):
        raise ValueError(f"scale = {scale}: must be finite, for instance 1 / sqrt(head dimension)")


def register() -> None:
    """Tell torch what shapes the operators give, and masked_softmax's backward."""
    torch.library.register_fake("megactl::masked_softmax", lambda scores, mask, scale, causal: torch.empty_like(scores))
    torch.library.register_fake("megactl::masked_softmax_backward", lambda grad, y, mask, scale, causal: torch.empty_like(y))
    differentiable("masked_softmax", _backward, _context)
    differentiable("masked_softmax_backward", _no_second_derivative)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(output, mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, mask = ctx.saved_tensors
    return compiled("masked_softmax_backward", grad.contiguous(), y, mask, ctx.scale, ctx.causal), None, None, None


def _no_second_derivative(ctx: Any, grad: Tensor) -> None:
    raise NotImplementedError("masked_softmax has no second derivative: set MEGACTL_OPS=torch, whose softmax is torch's own")
