"""What is timed: each operator of `megactl.engine.ops` with what torch offers for the same job, its shapes, and the bytes it must move.

Bytes are the fewest that any implementation has to move through memory: every input read once, every output written once, nothing
kept for the backward pass counted. So GB/s of these bytes says how far an operator is from a plain copy.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megactl.engine import ops
from megactl.engine.bench.optimizer_operators import OPTIMIZER_OPERATORS
from megactl.engine.bench.sizes import Size
from megactl.engine.bench.work import Function, Operator, Work, differentiable, random_tensor

_EPSILON = 1e-5
_DROPOUT = 0.1


def _layer_norm(size: Size, dtype: torch.dtype, device: torch.device) -> list[Work]:
    x, (weight, bias) = _hidden(size, dtype, device), _affine(size, dtype, device)
    shape = (size.hidden,)
    peers = {"F.layer_norm": lambda x, w, b: F.layer_norm(x, shape, w, b, _EPSILON)}
    n, small = _bytes(x), _bytes(weight, bias)
    return differentiable(
        lambda x, w, b: ops.layer_norm(x, w, b, _EPSILON), peers, (x, weight, bias),
        forward=(2 * n + small, "x, weights -> y"), backward=(3 * n + 3 * small // 2, "dy, x, weight -> dx, dweights"),
    )  # fmt: skip


def _add_layer_norm(size: Size, dtype: torch.dtype, device: torch.device) -> list[Work]:
    x, residual = _hidden(size, dtype, device), _hidden(size, dtype, device)
    weight, bias = _affine(size, dtype, device)
    shape = (size.hidden,)

    def eager(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.layer_norm(total, shape, w, b, _EPSILON), total

    n, small = _bytes(x), _bytes(weight, bias)
    return differentiable(
        lambda x, r, w, b: ops.add_layer_norm(x, r, w, b, _EPSILON), {"add, F.layer_norm": eager}, (x, residual, weight, bias),
        forward=(4 * n + small, "x, residual, weights -> y, sum"),
        backward=(4 * n + 3 * small // 2, "dy, dsum, sum, weight -> dx, dweights"),
    )  # fmt: skip


def _rms_norm(size: Size, dtype: torch.dtype, device: torch.device) -> list[Work]:
    x, (weight, _) = _hidden(size, dtype, device), _affine(size, dtype, device)
    shape = (size.hidden,)
    n, small = _bytes(x), _bytes(weight)
    return differentiable(
        lambda x, w: ops.rms_norm(x, w, _EPSILON), {"F.rms_norm": lambda x, w: F.rms_norm(x, shape, w, _EPSILON)}, (x, weight),
        forward=(2 * n + small, "x, weight -> y"), backward=(3 * n + 2 * small, "dy, x, weight -> dx, dweight"),
    )  # fmt: skip


def _add_rms_norm(size: Size, dtype: torch.dtype, device: torch.device) -> list[Work]:
    x, residual, (weight, _) = _hidden(size, dtype, device), _hidden(size, dtype, device), _affine(size, dtype, device)
    shape = (size.hidden,)

    def eager(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, shape, w, _EPSILON), total

    n, small = _bytes(x), _bytes(weight)
    return differentiable(
        lambda x, r, w: ops.add_rms_norm(x, r, w, _EPSILON), {"add, F.rms_norm": eager}, (x, residual, weight),
        forward=(4 * n + small, "x, residual, weight -> y, sum"), backward=(4 * n + 2 * small, "dy, dsum, sum, weight -> dx, dweight"),
    )  # fmt: skip


def _bias_gelu(size: Size, dtype: torch.dtype, device: torch.device) -> list[Work]:
    x = random_tensor((size.tokens, size.ffn), dtype, device)
    bias = random_tensor((size.ffn,), dtype, device)
    n, small = _bytes(x), _bytes(bias)
    found = []
    for approximate in ("tanh", "none"):
        found += differentiable(
            lambda x, b, kind=approximate: ops.bias_gelu(x, b, kind),
            {"add, F.gelu": lambda x, b, kind=approximate: F.gelu(x + b, approximate=kind)}, (x, bias),
            forward=(2 * n + small, "x, bias -> y"), backward=(3 * n + 2 * small, "dy, x, bias -> dx, dbias"),
            variant="tanh" if approximate == "tanh" else "erf",
        )  # fmt: skip
    return found


def _swiglu(size: Size, dtype: torch.dtype, device: torch.device) -> list[Work]:
    x = random_tensor((size.tokens, 2 * size.ffn), dtype, device)
    n = _bytes(x) // 2

    def eager(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    return differentiable(
        ops.swiglu, {"F.silu, multiply": eager}, (x,), forward=(3 * n, "gate, up -> y"), backward=(5 * n, "dy, gate, up -> dgate, dup")
    )


def _rotary_qkv(size: Size, dtype: torch.dtype, device: torch.device) -> list[Work]:
    groups, width = size.groups, size.hidden // size.heads
    heads = size.heads // groups
    qkv = random_tensor((size.batch, size.seq, groups, heads + 2, width), dtype, device)
    angles = torch.arange(size.seq, device=device, dtype=torch.float32)[:, None] / 10000.0 ** torch.linspace(
        0, 1, width // 2, device=device
    )
    cos, sin = (part.expand(size.batch, -1, -1).contiguous() for part in (angles.cos(), angles.sin()))
    # As it is written where it stands alone: halves exchanged, cosines and sines twice as wide and in the type of the model.
    whole_cos, whole_sin = (torch.cat([part, part], -1).to(dtype)[:, :, None] for part in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * whole_cos + torch.cat([-high, low], -1) * whole_sin

    def eager(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = x.split((heads, 1, 1), dim=3)
        return turned(q.flatten(2, 3)), turned(k.squeeze(3)), v.squeeze(3)

    n = 2 * _bytes(qkv) + _bytes(cos, sin)
    return differentiable(
        lambda x: ops.rotary_qkv(x, cos, sin), {"split, rotate_half": eager}, (qkv,),
        forward=(n, "qkv, angles -> q, k, v"), backward=(n, "dq, dk, dv, angles -> dqkv"),
    )  # fmt: skip


def _masked_softmax(size: Size, dtype: torch.dtype, device: torch.device) -> list[Work]:
    b, n, s = size.batch, size.heads, size.seq
    scores = random_tensor((b, n, s, s), dtype, device)
    scale = 1.0 / math.sqrt(size.hidden // n)
    causal = torch.ones(s, s, dtype=torch.bool, device=device).tril_()
    # Sequences of different lengths, as an encoder sees them; the shortest has half of the positions.
    lengths = torch.linspace(s // 2, s, b, device=device).round()
    padding = (torch.arange(s, device=device) < lengths[:, None]).view(b, 1, 1, s)
    e = scores.element_size()
    # Above the diagonal no score has to be read; the probabilities are written everywhere.
    whole, lower = b * n * s * s * e, b * n * s * (s + 1) // 2 * e

    def eager(allowed: Tensor) -> Function:
        return lambda x: torch.softmax((x * scale).masked_fill(~allowed, float("-inf")), -1)

    return [
        *differentiable(
            lambda x: ops.masked_softmax(x, scale=scale, causal=True), {"masked_fill, softmax": eager(causal)}, (scores,),
            forward=(lower + whole, "scores up to the diagonal -> probabilities"),
            backward=(2 * lower + whole, "dp, p up to the diagonal -> dscores"), variant="causal",
        ),
        *differentiable(
            lambda x: ops.masked_softmax(x, scale=scale, mask=padding), {"masked_fill, softmax": eager(padding)}, (scores,),
            forward=(2 * whole + _bytes(padding), "scores, mask -> probabilities"),
            backward=(3 * whole, "dp, p -> dscores"), variant="padding",
        ),
    ]  # fmt: skip


def _cross_entropy(size: Size, dtype: torch.dtype, device: torch.device) -> list[Work]:
    logits = random_tensor((size.tokens, size.vocab), dtype, device)
    labels = torch.randint(0, size.vocab, (size.tokens,), device=device)
    n = _bytes(logits)
    peers: dict[str, Function] = {"F.cross_entropy": lambda x: F.cross_entropy(x, labels, reduction="none")}
    if dtype not in (torch.float32, torch.float64):
        peers["F.cross_entropy of .float()"] = lambda x: F.cross_entropy(x.float(), labels, reduction="none")
    return differentiable(
        lambda x: ops.cross_entropy(x, labels), peers, (logits,), forward=(n, "logits -> loss"), backward=(2 * n, "logits -> dlogits"),
        # Rounded losses are no loss to train with, so what is compiled is the form that models use.
        compiled=list(peers)[-1],
    )  # fmt: skip


def _dropout_add(size: Size, dtype: torch.dtype, device: torch.device) -> list[Work]:
    x, residual = (random_tensor((size.batch, size.seq, size.hidden), dtype, device) for _ in range(2))
    rng = torch.tensor([1234, 7, 0], device=device)
    n = _bytes(x)
    return differentiable(
        lambda x, r: ops.dropout_add(x, r, _DROPOUT, rng, 5), {"F.dropout, add": lambda x, r: r + F.dropout(x, _DROPOUT)}, (x, residual),
        forward=(3 * n, "x, residual -> y"), backward=(2 * n, "dy -> dx"),
        # The two draw different elements.
        agree=False,
    )  # fmt: skip


def _hidden(size: Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return random_tensor((size.tokens, size.hidden), dtype, device)


def _affine(size: Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return random_tensor((size.hidden,), dtype, device), random_tensor((size.hidden,), dtype, device)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


OPERATORS: dict[str, Operator] = {
    "layer_norm": _layer_norm,
    "add_layer_norm": _add_layer_norm,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "bias_gelu": _bias_gelu,
    "swiglu": _swiglu,
    "rotary_qkv": _rotary_qkv,
    "masked_softmax": _masked_softmax,
    "cross_entropy": _cross_entropy,
    "dropout_add": _dropout_add,
    **OPTIMIZER_OPERATORS,
}
