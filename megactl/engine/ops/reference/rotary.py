"""Rotary position embedding of packed queries, keys and values, and its backward, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_qkv(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `megactl.engine.ops.rotary.rotary_qkv`. Differentiable."""
    heads, keys, values = qkv.split((qkv.shape[3] - 2, 1, 1), dim=3)
    return _turned(heads.flatten(2, 3), cos, sin), _turned(keys.squeeze(3), cos, sin), values.squeeze(3).contiguous()


def rotary_qkv_backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `megactl.engine.ops.rotary.rotary_qkv_backward`: the transpose of a rotation is the one by the opposite angle."""
    b, s, groups, width = grad_k.shape
    heads = _turned(grad_q, cos, -sin).view(b, s, groups, grad_q.shape[2] // groups, width)
    return torch.cat([heads, _turned(grad_k, cos, -sin).unsqueeze(3), grad_v.unsqueeze(3)], dim=3)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [b, s, n, d] with the first two halves of its rotary part turned against each other, rounded once."""
    wide, half = torch.promote_types(x.dtype, torch.float32), cos.shape[-1]
    low, high, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    low, high, cos, sin = low.to(wide), high.to(wide), cos.to(wide).unsqueeze(2), sin.to(wide).unsqueeze(2)
    return torch.cat([(low * cos - high * sin).to(x.dtype), (high * cos + low * sin).to(x.dtype), rest], dim=-1)
