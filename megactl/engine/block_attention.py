"""Attention of some queries to some keys, with the log-sum-exp of each row: what ring attention puts together from blocks.

    forward   out = softmax(S) V over the keys at hand, lse = log of the sum of exp(S); S = scale Q K^T, masked
    backward  from the gradient of the WHOLE attention's result, that result and its lse: dQ, dK, dV that are this block's share

Blocks of one row of queries are merged by their lse (Milakov and Gimelshein 2018, Dao et al. 2022), and P = exp(S - lse) with the lse
of the whole row is the block's part of the whole softmax, so each backward needs nothing of the other blocks.

torch's fused kernels give lse and take it back; which of them, torch's own choice says. The plain way is always there: on any device,
in any type, and with dropout by global element. lse is [b, n, queries] in `accumulation(dtype)`, whatever a kernel makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

aten = torch.ops.aten
# Added to a score that is not allowed. Not minus infinity: a row that may see nothing of a block then has a finite lse, so low that any
# other block outweighs it to the last bit, and no kernel divides zero by zero.
_FORBIDDEN = -1e30
_FORBIDDEN_FP16 = -(2.0**15)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The type in which results and gradients of blocks are summed."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Rule:
    """Who may look at whom within a block, and what is dropped.

    causal: query i sees keys up to i (as many queries as keys). mask: bool that broadcasts to [b, n, queries, keys], True may look; not
    both. drop(P) drops elements of probabilities [b, n, queries, keys] by their place in the whole, the same at each call. fused_dropout:
    the probability with which a fused kernel drops from torch's generator. plain: no fused kernel.
    """

    causal: bool = False
    mask: Tensor | None = None
    drop: Callable[[Tensor], Tensor] | None = None
    fused_dropout: float = 0.0
    plain: bool = False


@dataclass(frozen=True)
class Kernel:
    """What computed a block, for its backward: which way, and for dropout inside a fused kernel its draw from torch's generator."""

    name: str = "plain"
    random: tuple[Tensor, ...] = ()


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, rule: Rule) -> tuple[Tensor, Tensor, Kernel]:
    """(out [b, n, queries, d], lse [b, n, queries], kernel). q [b, n, queries, d]; k, v [b, n, keys, d]."""
    name = _choice(q, k, v, scale, rule)
    if name == "plain":
        return *_plain_forward(q, k, v, scale, rule), Kernel()
    out, lse, random = _FUSED[name][0](q, k, v, scale, rule)
    return out, lse.to(accumulation(q.dtype)), Kernel(name, random)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, rule: Rule, kernel: Kernel
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's share of (dQ, dK, dV). grad and out are those of the whole attention for these queries, and so is lse."""
    if kernel.name == "plain":
        return _plain_backward(grad, q, k, v, out, lse, scale, rule)
    return _FUSED[kernel.name][1](grad, q, k, v, out, lse, scale, rule, kernel)


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Add a block to what is merged already, in place: out [b, n, s, d] and lse [b, n, s] in the accumulation type."""
    share = torch.sigmoid(block_lse - lse)
    out.lerp_(block_out.to(out.dtype), share.unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, block_lse))


def _choice(q: Tensor, k: Tensor, v: Tensor, scale: float, rule: Rule) -> str:
    if rule.plain or rule.drop is not None:
        return "plain"
    # Some kernels have no backward for some shapes, which torch considers where a gradient is wanted.
    with torch.enable_grad():
        chosen = torch._fused_sdp_choice(q, k, v, rule.mask, rule.fused_dropout, rule.causal, scale=scale)
    names = _ON_CPU if q.device.type == "cpu" else _ON_CUDA
    return names.get(chosen, "plain")


# The plain way


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, rule: Rule) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, scale, rule)
    lse = torch.logsumexp(scores, -1)
    probabilities = scores.sub_(lse.unsqueeze(-1)).exp_().to(q.dtype)
    return _dropped(probabilities, rule) @ v, lse


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    probabilities = _scores(q, k, scale, rule).sub_(lse.unsqueeze(-1)).exp_()
    grad_v = _dropped(probabilities.to(q.dtype), rule).transpose(-1, -2) @ grad
    grad_probabilities = _dropped(grad @ v.transpose(-1, -2), rule).to(lse.dtype)
    # The sum over all keys of P dP is that of out dout, so it needs no other block.
    rows = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1, keepdim=True)
    grad_scores = (grad_probabilities.sub_(rows).mul_(probabilities)).to(q.dtype)
    return (grad_scores @ k) * scale, grad_scores.transpose(-1, -2) @ (q * scale), grad_v


def _scores(q: Tensor, k: Tensor, scale: float, rule: Rule) -> Tensor:
    # Scaled before the product, which in fp16 ends at 65504.
    scores = ((q * scale) @ k.transpose(-1, -2)).to(accumulation(q.dtype))
    allowed = rule.mask
    if rule.causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril_()
    return scores if allowed is None else scores.masked_fill_(~allowed, _FORBIDDEN)


def _dropped(probabilities: Tensor, rule: Rule) -> Tensor:
    return probabilities if rule.drop is None else rule.drop(probabilities)


# torch's fused kernels: (forward, backward), each with what autograd would pass on


def _bias(rule: Rule, q: Tensor, keys: int) -> Tensor | None:
    """The mask as numbers to add, of its own shape; rows begin on 16 elements, as the memory-efficient kernel wants them."""
    if rule.mask is None:
        return None
    shape = (*rule.mask.shape[:3], -(-keys // 16) * 16)
    bias = torch.zeros(shape, dtype=q.dtype, device=q.device)[..., :keys]
    bias.masked_fill_(~rule.mask, _FORBIDDEN_FP16 if q.dtype == torch.float16 else _FORBIDDEN)
    return bias


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, rule: Rule) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    mask = _bias(rule, q, k.shape[2])
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, rule.causal, attn_mask=mask, scale=scale)
    return out, lse, ()


def _cpu_backward(grad, q, k, v, out, lse, scale: float, rule: Rule, kernel: Kernel) -> tuple[Tensor, Tensor, Tensor]:
    mask = _bias(rule, q, k.shape[2])
    operator = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return operator(grad, q, k, v, out, lse, 0.0, rule.causal, attn_mask=mask, scale=scale)


def _widened(width: int, *tensors: Tensor) -> list[Tensor]:
    """FlashAttention takes heads of a multiple of 8; zeros add nothing to a product."""
    missing = -width % 8
    return [torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor for tensor in tensors]


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, rule: Rule) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    width = q.shape[-1]
    q, k, v = _widened(width, q, k, v)
    out, lse, _, _, _, _, *random, _ = aten._scaled_dot_product_flash_attention(q, k, v, rule.fused_dropout, rule.causal, scale=scale)
    return out[..., :width], lse, tuple(random)


def _flash_backward(grad, q, k, v, out, lse, scale: float, rule: Rule, kernel: Kernel) -> tuple[Tensor, Tensor, Tensor]:
    width, lengths = q.shape[-1], (q.shape[2], k.shape[2])
    grad, q, k, v, out = _widened(width, grad, q, k, v, out)
    grads = aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse.contiguous(), None, None, *lengths, rule.fused_dropout, rule.causal, *kernel.random, scale=scale
    )
    return tuple(one[..., :width] for one in grads)


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, rule: Rule) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    bias = _expanded_bias(rule, q, k)
    out, lse, *random = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, rule.fused_dropout, rule.causal, scale=scale)
    return out, lse[..., : q.shape[2]], tuple(random)


def _efficient_backward(grad, q, k, v, out, lse, scale: float, rule: Rule, kernel: Kernel) -> tuple[Tensor, Tensor, Tensor]:
    bias = _expanded_bias(rule, q, k)
    # The kernel takes the sum of grad x out along memory laid out as its own results are, [b, s, n, d]: else dQ and dK are wrong.
    grad, out = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (grad, out))
    # It reads lse in rows of a multiple of 32.
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32))
    wanted = [True, True, True, False]
    grads = aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, bias, out, lse, *kernel.random, rule.fused_dropout, wanted, rule.causal, scale=scale
    )
    return grads[:3]


def _expanded_bias(rule: Rule, q: Tensor, k: Tensor) -> Tensor | None:
    bias = _bias(rule, q, k.shape[2])
    return None if bias is None else bias.expand(*q.shape[:3], -1)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, rule: Rule) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    bias = _expanded_bias(rule, q, k)
    out, lse, _, _, _, _, *random, _ = aten._scaled_dot_product_cudnn_attention(
        q, k, v, bias, True, rule.fused_dropout, rule.causal, scale=scale
    )
    return out, lse.reshape(q.shape[:3]), tuple(random)


def _cudnn_backward(grad, q, k, v, out, lse, scale: float, rule: Rule, kernel: Kernel) -> tuple[Tensor, Tensor, Tensor]:
    bias, lengths = _expanded_bias(rule, q, k), (q.shape[2], k.shape[2])
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse.contiguous().unsqueeze(-1), *kernel.random, bias, None, None, *lengths, rule.fused_dropout, rule.causal,
        scale=scale,
    )  # fmt: skip


_FUSED = {
    "cpu": (_cpu_forward, _cpu_backward),
    "flash": (_flash_forward, _flash_backward),
    "efficient": (_efficient_forward, _efficient_backward),
    "cudnn": (_cudnn_forward, _cudnn_backward),
}
_ON_CPU = {SDPBackend.FLASH_ATTENTION.value: "cpu"}
_ON_CUDA = {
    SDPBackend.FLASH_ATTENTION.value: "flash",
    SDPBackend.EFFICIENT_ATTENTION.value: "efficient",
    SDPBackend.CUDNN_ATTENTION.value: "cudnn",
}
