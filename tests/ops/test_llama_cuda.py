"""The CUDA kernels of rotary_qkv and swiglu against their definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch

from megactl.engine import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BOUND = {torch.float64: 1e-14, torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-2))


def draw(*shape: int, dtype: torch.dtype = torch.float32, shift: int = 0) -> torch.Tensor:
    """Random numbers; a shift of one element leaves them unaligned."""
    return torch.randn(math.prod(shape) + shift, device="cuda").to(dtype)[shift:].view(shape)


def poison(like: torch.Tensor) -> None:
    torch.full((like.numel(),), float("nan"), dtype=like.dtype, device="cuda")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (5, 64), (2, 3, 264), (1000, 16), (129, 1001), (4097, 1024), (70_000, 8)], ids=str)
def test_swiglu(shape, shift, dtype):
    x, grad = draw(*shape[:-1], 2 * shape[-1], dtype=dtype, shift=shift), draw(*shape, dtype=dtype, shift=shift)
    wide = x.double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    expected = gate * torch.sigmoid(gate) * up
    poison(grad)
    assert error(ops.swiglu(x), expected.detach()) < BOUND[dtype]
    poison(x)
    assert error(ops.swiglu_backward(grad, x), torch.autograd.grad(expected, wide, grad.double())[0]) < BOUND[dtype]


# (batch, positions, groups, heads of a group, width, turned pairs); llama-8b's, whole and a quarter turned; widths that no vector fits.
SHAPES = [
    (1, 1, 1, 1, 2, 1),
    (2, 130, 8, 4, 128, 64),
    (2, 33, 8, 4, 128, 16),
    (3, 7, 2, 3, 48, 20),
    (1, 5, 3, 1, 34, 17),
    (2, 9, 1, 8, 64, 32),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotary_qkv(shape, shift, dtype):
    b, s, g, r, d, half = shape
    qkv, angles = draw(b, s, g, r + 2, d, dtype=dtype, shift=shift), 100 * torch.rand(b, s, half, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    wide = qkv.double().requires_grad_()
    low, high, rest = wide[..., :-1, :].split((half, half, d - 2 * half), -1)
    c, t = (part.double()[:, :, None, None] for part in (cos, sin))
    turned = torch.cat([low * c - high * t, high * c + low * t, rest], -1)
    expected = (turned[:, :, :, :-1].flatten(2, 3), turned[:, :, :, -1], wide[:, :, :, -1])
    poison(qkv)
    for one, other in zip(ops.rotary_qkv(qkv, cos, sin), expected, strict=True):
        assert error(one, other.detach()) < BOUND[dtype]
    grads = [draw(*one.shape, dtype=dtype, shift=shift) for one in expected]
    wanted = torch.autograd.grad(expected, wide, [grad.double() for grad in grads])[0]
    poison(qkv)
    assert error(ops.rotary_qkv_backward(*grads, cos, sin), wanted) < BOUND[dtype]
    transposed = [grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in grads]
    assert error(ops.rotary_qkv_backward(*transposed, cos, sin), wanted) < BOUND[dtype]


@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("masked", [False, True])
def test_grouped_attention_on_every_kernel(dtype, masked):
    """Where no fused kernel takes groups (fp32, masks) keys are copied; either way it is the definition."""
    from megactl.engine.models.layers import fused_attention

    q, k, v = (draw(2, 70, heads, 64, dtype=dtype).transpose(1, 2) for heads in (8, 2, 2))
    mask = torch.ones(70, 70, dtype=torch.bool, device="cuda").tril()[None, None]
    found = fused_attention(q, k, v, mask=mask if masked else None, dropout=0.0, causal=not masked, scale=0.125)
    scores = (q.double() @ k.double().repeat_interleave(4, 1).transpose(-1, -2) * 0.125).masked_fill(~mask, float("-inf"))
    assert error(found, scores.softmax(-1) @ v.double().repeat_interleave(4, 1)) < max(BOUND[dtype], 2e-6)
