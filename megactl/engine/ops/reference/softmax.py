"""Softmax of masked, scaled scores in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def _allowed(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """Where a query may look: bool that broadcasts to scores, or None for everywhere."""
    if not causal:
        return mask
    queries, keys = scores.shape[-2:]
    below = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
    return below if mask is None else mask & below


def masked_softmax(scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """See `megactl.engine.ops.softmax.masked_softmax`. Differentiable."""
    work = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    allowed = _allowed(scores, mask, causal)
    if allowed is None:
        return torch.softmax(work, -1).to(scores.dtype)
    # A row of minus infinities would be NaN, and so would its gradient: rows without any key are filled with zeros instead.
    nothing = ~allowed.any(-1, keepdim=True)
    fill = torch.zeros(nothing.shape, dtype=work.dtype, device=work.device).masked_fill(~nothing, float("-inf"))
    return torch.softmax(torch.where(allowed, work, fill), -1).masked_fill(~allowed, 0.0).to(scores.dtype)


def masked_softmax_backward(grad: Tensor, y: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """See `megactl.engine.ops.softmax.masked_softmax_backward`."""
    compute = torch.promote_types(y.dtype, torch.float32)
    allowed = _allowed(y, mask, causal)
    grads, ys = grad.to(compute), y.to(compute)
    if allowed is not None:
        grads, ys = grads.masked_fill(~allowed, 0.0), ys.masked_fill(~allowed, 0.0)
    result = scale * ys * (grads - (grads * ys).sum(-1, keepdim=True))
    return (result if allowed is None else result.masked_fill(~allowed, 0.0)).to(y.dtype)
