"""Blocks of attention: every way gives what plain torch gives, blocks merge to the whole, and their gradients add up to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megactl.engine import block_attention
from megactl.engine.block_attention import Kernel, Rule

SCALE = 0.4
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def tensors(count: int, *shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
    """Made as attention makes them: heads in front of tokens by a transposition."""
    generator = torch.Generator().manual_seed(sum(shape))
    b, n, s, d = shape
    return [torch.randn(b, s, n, d, generator=generator).to(device, dtype).transpose(1, 2) for _ in range(count)]


def rules(queries: int, keys: int, device: str = "cpu") -> dict[str, Rule]:
    """What rings ask for; in "documents" some queries see nothing."""
    generator = torch.Generator().manual_seed(1)
    some = (torch.rand(2, 1, queries, keys, generator=generator) > 0.5).to(device)
    some[:, :, :2] = False
    found = {"all": Rule(), "documents": Rule(mask=some), "padding": Rule(mask=(torch.arange(keys) < 3)[None, None, None].to(device))}
    return found | ({"causal": Rule(causal=True)} if queries == keys else {})


def whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """By the definition; rows that see nothing must not be asked for."""
    scores = (q @ k.transpose(-1, -2)) * SCALE
    return torch.softmax(scores if mask is None else scores.masked_fill(~mask, float("-inf")), -1) @ v


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (5, 12), (1, 1), (64, 33)])
def test_the_fused_way_equals_the_plain_one(dtype: torch.dtype, queries: int, keys: int):
    (q, grad), (k, v) = tensors(2, 2, 3, queries, 20, dtype=dtype), tensors(2, 2, 3, keys, 20, dtype=dtype)
    for name, rule in rules(queries, keys).items():
        out, lse, kernel = block_attention.forward(q, k, v, SCALE, rule)
        plain, plain_lse, plainly = block_attention.forward(q, k, v, SCALE, replace(rule, plain=True))
        assert (kernel.name, plainly.name) == ("cpu", "plain") and lse.dtype == block_attention.accumulation(dtype), name
        sees = torch.ones(q.shape[:3], dtype=torch.bool) if rule.mask is None else rule.mask.any(-1).expand(q.shape[:3])
        close(out[sees], plain[sees], dtype, name)
        close(lse[sees].to(dtype), plain_lse[sees].to(dtype), dtype, name)
        # The backward of rows that see nothing has the lse of another block, which they see.
        lse, out = torch.where(sees, plain_lse, 3.0), torch.where(sees[..., None], plain, 0.5)
        results = [block_attention.backward(grad, q, k, v, out, lse, SCALE, rule, way) for way in (kernel, plainly)]
        for one, other in zip(*results, strict=True):
            close(one, other, dtype, name)


def close(one: Tensor, other: Tensor, dtype: torch.dtype, what: str) -> None:
    """Their difference against the norm, or that of numbers of one where they are smaller (a softmax over one key has no gradient)."""
    error, size = (one - other).double().norm(), max(other.double().norm(), other.numel() ** 0.5)
    assert error <= CLOSE[dtype] * size, (what, error / size)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_in_any_order_are_the_whole(plain: bool, order: tuple[int, ...], masked: bool):
    """Keys in three blocks; every query sees something of the whole, and some see nothing of the block that comes first."""
    (q, grad), (k, v) = tensors(2, 2, 3, 7, 8), tensors(2, 2, 3, 12, 8)
    mask = (torch.rand(2, 1, 7, 12, generator=torch.Generator().manual_seed(3)) > 0.6) if masked else None
    if mask is not None:
        mask[..., 0] |= ~mask.any(-1)
        assert not mask[..., 4:8].any(-1).all()
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    expected = whole(*leaves, mask)
    gradients = torch.autograd.grad(expected, leaves, grad)
    pieces = {i: slice(4 * i, 4 * i + 4) for i in order}
    blocks = {i: Rule(mask=None if mask is None else mask[..., piece], plain=plain) for i, piece in pieces.items()}
    out = lse = None
    kernels: dict[int, Kernel] = {}
    for i, piece in pieces.items():
        part, part_lse, kernels[i] = block_attention.forward(q, k[:, :, piece], v[:, :, piece], SCALE, blocks[i])
        if out is None:
            out, lse = part.clone(), part_lse.clone()
        else:
            block_attention.merge_(out, lse, part, part_lse)
    close(out, expected, torch.float64, "out")
    total_q, total_k, total_v = (torch.zeros_like(tensor) for tensor in (q, k, v))
    for i, piece in pieces.items():
        parts = block_attention.backward(grad, q, k[:, :, piece], v[:, :, piece], out, lse, SCALE, blocks[i], kernels[i])
        total_q += parts[0]
        total_k[:, :, piece], total_v[:, :, piece] = parts[1:]
    for one, other in zip((total_q, total_k, total_v), gradients, strict=True):
        close(one, other, torch.float64, "gradient")


def test_dropout_drops_alike_in_forward_and_backward():
    q, k, v, grad = tensors(4, 1, 2, 6, 4)
    kept = (torch.rand(1, 2, 6, 6, generator=torch.Generator().manual_seed(5)) > 0.3).double() / 0.7
    rule = Rule(causal=True, drop=lambda probabilities: probabilities * kept)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    scores = (leaves[0] @ leaves[1].transpose(-1, -2)) * SCALE
    scores = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), float("-inf"))
    expected = (torch.softmax(scores, -1) * kept) @ leaves[2]
    out, lse, kernel = block_attention.forward(q, k, v, SCALE, rule)
    close(out, expected, torch.float64, "out")
    parts = block_attention.backward(grad, q, k, v, out, lse, SCALE, rule, kernel)
    for one, other in zip(parts, torch.autograd.grad(expected, leaves, grad), strict=True):
        close(one, other, torch.float64, "gradient")


@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
@pytest.mark.parametrize("rule", [Rule(), Rule(causal=True), Rule(mask=torch.ones(2, 1, 1, 33, dtype=torch.bool, device="meta"))])
def test_kernels_of_a_gpu_are_called_as_torch_declares_them(name: str, rule: Rule):
    """Shapes alone, on torch's meta device: what goes in and what comes out of each operator."""
    if name == "flash" and rule.mask is not None:
        pytest.skip("FlashAttention takes no mask")
    q, k, v = (torch.empty(2, 33, 3, 24, dtype=torch.bfloat16, device="meta").transpose(1, 2) for _ in range(3))
    forward, backward = block_attention._FUSED[name]
    out, lse, random = forward(q, k, v, SCALE, rule)
    assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32 and len(random) == 2
    grads = backward(out, q, k, v, out, lse, SCALE, rule, Kernel(name, random))
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


ON_GPU = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize(("queries", "keys", "width"), [(256, 256, 64), (128, 256, 64), (256, 128, 128), (33, 33, 20)])
def test_kernels_of_a_gpu_equal_the_plain_way(name: str, queries: int, keys: int, width: int):
    """The plain way in float64 is what both are held against: in bf16 it rounds scores that the kernels keep in float32."""
    if width % 8 and name != "flash":
        pytest.skip(f"{name} does not take heads of {width}")
    (q, grad), (k, v) = (tensors(2, 2, 3, n, width, dtype=torch.bfloat16, device="cuda") for n in (queries, keys))
    scale = width**-0.5
    for kind, rule in rules(queries, keys, "cuda").items():
        if rule.mask is not None and name != "efficient":
            continue
        with sdpa_kernel(ON_GPU[name]):
            out, lse, kernel = block_attention.forward(q, k, v, scale, rule)
        assert kernel.name == name
        exact = [tensor.double() for tensor in (q, k, v)]
        plainly = replace(rule, plain=True)
        plain, plain_lse, way = block_attention.forward(*exact, scale, plainly)
        sees = torch.ones(q.shape[:3], dtype=torch.bool, device="cuda")
        sees = sees if rule.mask is None else rule.mask.any(-1).expand(q.shape[:3])
        close(out[sees].double(), plain[sees], torch.bfloat16, kind)
        close(lse[sees].double(), plain_lse[sees], torch.bfloat16, kind)
        plain_lse, plain = torch.where(sees, plain_lse, 3.0), torch.where(sees[..., None], plain, 0.5)
        found = block_attention.backward(grad, q, k, v, plain.to(q.dtype), plain_lse.float(), scale, rule, kernel)
        expected = block_attention.backward(grad.double(), *exact, plain, plain_lse, scale, plainly, way)
        for one, other in zip(found, expected, strict=True):
            close(one.double(), other, torch.bfloat16, kind)
