"""Rotary position embedding (RoPE), fused with taking queries, keys and values apart: one pass over memory forward, one backward.

The rows of a grouped qkv product lie group by group (the group's heads, their key, their value), so that tensor parallelism cuts it
anywhere between groups; attention wants heads, keys and values apart. What is written anyway is turned on the way, and backward
packs the three gradients into one tensor, for the matrix multiply that comes next. Turned in place they would still be copied.

Source: Su et al., "RoFormer", 2021 (arXiv:2104.09864). Element i of a head is turned against element i + w / 2, the convention of
Hugging Face's Llama and GPT-NeoX; the paper turns neighbours, which is another order of the same weights' rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megactl.engine.ops.calls import compiled, differentiable
from megactl.engine.ops.library import looks, use_compiled
from megactl.engine.ops.reference import rotary as reference

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def rotary_qkv(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(q [b, s, g r, d], k [b, s, g, d], v [b, s, g, d]) of qkv [b, s, g, r + 2, d], q and k turned by their position's angles.

    A group has r heads that share a key and a value; cos and sin are float32 [b, s, w / 2], and the first w elements of each head are
    turned, w even and at most d. Computed in float32 (float64 for double), rounded once. Differentiable once in qkv; nothing but cos
    and sin is kept. qkv is made contiguous. Raises ValueError for tensors that do not fit.
    """
    if qkv.dtype not in FLOATS or qkv.dim() != 5 or qkv.shape[3] < 3 or qkv.shape[4] % 2:
        raise ValueError(f"qkv is {looks(qkv)}: must be a floating-point tensor [b, s, g, r + 2, d] with r at least 1 and d even")
    _check_angles(qkv, cos, sin)
    arguments = (qkv.contiguous(), cos.contiguous(), sin.contiguous())
    return compiled("rotary_qkv", *arguments) if use_compiled() else reference.rotary_qkv(*arguments)


@torch.no_grad()
def rotary_qkv_backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of `rotary_qkv`'s qkv, contiguous, from those of its results. They may be strided; a row of d elements may not.

    Raises ValueError for tensors that do not fit.
    """
    fits = grad_k.dim() == grad_q.dim() == 4 and grad_v.shape == grad_k.shape and grad_q.shape[:2] == grad_k.shape[:2]
    fits = fits and grad_q.shape[3] == grad_k.shape[3] and grad_k.shape[2] > 0 and grad_q.shape[2] % grad_k.shape[2] == 0
    if not fits or grad_k.shape[3] % 2 or any((t.dtype, t.device) != (grad_q.dtype, grad_q.device) for t in (grad_k, grad_v)):
        shown = f"grad_q is {looks(grad_q)}, grad_k {looks(grad_k)}, grad_v {looks(grad_v)}"
        raise ValueError(f"{shown}: must be [b, s, g r, d] and twice [b, s, g, d], of one dtype and device, d even")
    _check_angles(grad_k, cos, sin)
    arguments = (*map(_rows, (grad_q, grad_k, grad_v)), cos.contiguous(), sin.contiguous())
    return compiled("rotary_qkv_backward", *arguments) if use_compiled() else reference.rotary_qkv_backward(*arguments)


def _check_angles(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    for name, angles in (("cos", cos), ("sin", sin)):
        fits = angles.dtype == torch.float32 and angles.dim() == 3 and angles.shape[:2] == x.shape[:2] and angles.device == x.device
        if not fits or 2 * angles.shape[2] > x.shape[-1] or angles.shape != cos.shape:
            rule = "must be float32 [b, s, w / 2], of one w that is at most d, on one device"
            raise ValueError(f"{name} is {looks(angles)}, beside {looks(x)}: {rule}")


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def register() -> None:
    """Tell torch what shapes the operators give, and rotary_qkv's backward."""
    torch.library.register_fake("megactl::rotary_qkv", _fake)
    torch.library.register_fake("megactl::rotary_qkv_backward", _fake_backward)
    differentiable("rotary_qkv", _backward, _context)
    differentiable("rotary_qkv_backward", _no_second_derivative)


def _fake(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, s, groups, packed, width = qkv.shape
    return tuple(qkv.new_empty((b, s, heads, width)) for heads in (groups * (packed - 2), groups, groups))


def _fake_backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    b, s, groups, width = grad_k.shape
    return grad_k.new_empty((b, s, groups, grad_q.shape[2] // groups + 2, width))


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return compiled("rotary_qkv_backward", *map(_rows, grads), *ctx.saved_tensors), None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("rotary_qkv has no second derivative: set MEGACTL_OPS=torch, whose rotation is torch's own")
