"""The gradient path, continued: what Llama-shaped models have in place of LayerNorm and of a linear with bias and GELU.

As in `functional`: gradients of weights go straight into `main_grad` where there is one, at once or put off to a queue.
Shapes: x [..., in], weight [out, in], or [2, f, in] for SwiGLU's gate and up, so that a cut along f takes the same rows of both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd import Function

from megactl.engine import ops
from megactl.engine.functional import (
    StartReduce,
    TokenShards,
    WeightQueue,
    _put,
    bias_gradient,
    gathered,
    product_gradients,
    weight_work,
)

# The product to the activation; the activation's gradient and the product to the product's gradient.
Activation = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]


def _matrix(weight: Tensor | None) -> Tensor | None:
    """[out, in] of a weight or its gradient, whatever its rows are parts of."""
    return None if weight is None else weight.flatten(0, -2)


def _vector(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.flatten()


class _LinearActivation(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activation: Activation, accumulate: bool, deferred: WeightQueue | None, start_reduce, gather):
        product = torch.nn.functional.linear(gathered(x, gather), _matrix(weight), _vector(bias))
        ctx.save_for_backward(x, weight, product)
        ctx.targets = _matrix(getattr(weight, "main_grad", None)), _vector(getattr(bias, "main_grad", None))
        ctx.bias_shape, ctx.slope = None if bias is None else bias.shape, activation[1]
        ctx.accumulate, ctx.deferred, ctx.start_reduce, ctx.gather = accumulate, deferred, start_reduce, gather
        return activation[0](product)

    @staticmethod
    def backward(ctx, grad):
        x, weight, product = ctx.saved_tensors
        grad = ctx.slope(grad, product)
        bias_work = None if ctx.bias_shape is None else partial(bias_gradient, grad, ctx.targets[1], ctx.accumulate)
        grad_x, grad_weight, grad_bias = product_gradients(ctx, grad, x, _matrix(weight), bias_work)
        grad_weight = None if grad_weight is None else grad_weight.view(weight.shape)
        grad_bias = None if grad_bias is None else grad_bias.view(ctx.bias_shape)
        return grad_x, grad_weight, grad_bias, *[None] * 5


def linear_swiglu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    accumulate: bool = False,
    deferred: WeightQueue | None = None,
    start_reduce: StartReduce | None = None,
    gather: TokenShards | None = None,
) -> Tensor:
    """silu(x @ weight[0].T + bias[0]) * (x @ weight[1].T + bias[1]), weight [2, f, in], bias [2, f], in one matrix multiply.

    Saved for backward: x, gate and up, not the activation.
    """
    return _LinearActivation.apply(x, weight, bias, (ops.swiglu, ops.swiglu_backward), accumulate, deferred, start_reduce, gather)


def linear_plain_gelu(
    x: Tensor,
    weight: Tensor,
    approximate: str,
    *,
    accumulate: bool = False,
    deferred: WeightQueue | None = None,
    start_reduce: StartReduce | None = None,
    gather: TokenShards | None = None,
) -> Tensor:
    """gelu(x @ weight.T) of a linear without bias. Without a bias to add, torch's own GELU is one pass over memory as well."""
    gelu = partial(torch.nn.functional.gelu, approximate=approximate)
    slope = partial(torch.ops.aten.gelu_backward, approximate=approximate)
    return _LinearActivation.apply(x, weight, None, (gelu, slope), accumulate, deferred, start_reduce, gather)


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, epsilon: float, accumulate: bool, deferred: WeightQueue | None):
        y, rstd = ops.rms_norm_forward(x, weight, epsilon)
        ctx.save_for_backward(x, weight, rstd)
        ctx.target, ctx.accumulate, ctx.deferred = getattr(weight, "main_grad", None), accumulate, deferred
        return y

    @staticmethod
    def backward(ctx, grad):
        return (*_rms_norm_backward(ctx, grad, *ctx.saved_tensors, None), None, None, None)


def _rms_norm_backward(ctx, grad, x, weight, rstd, grad_sum) -> tuple[Tensor, Tensor | None]:
    grad_x, grad_weight = ops.rms_norm_backward(grad, x, weight, rstd, grad_sum)
    return grad_x, *weight_work(ctx.deferred, partial(_put, ctx.target, grad_weight, weight, ctx.accumulate))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, accumulate: bool = False, deferred: WeightQueue | None = None) -> Tensor:
    """RMSNorm over the last dimension."""
    return _RmsNorm.apply(x, weight, epsilon, accumulate, deferred)


class _AddRmsNorm(Function):
    @staticmethod
    def forward(ctx, x, residual, weight, epsilon: float, accumulate: bool, deferred: WeightQueue | None):
        y, total, rstd = ops.add_rms_norm_forward(x, residual, weight, epsilon)
        ctx.save_for_backward(total, weight, rstd)
        ctx.target, ctx.accumulate, ctx.deferred = getattr(weight, "main_grad", None), accumulate, deferred
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx, grad, grad_total):
        grad_x, grad_weight = _rms_norm_backward(ctx, grad, *ctx.saved_tensors, grad_total)
        return grad_x, grad_x, grad_weight, None, None, None


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, *, accumulate: bool = False, deferred: WeightQueue | None = None
) -> tuple[Tensor, Tensor]:
    """(RMSNorm(x + residual), x + residual) in one pass over memory, and their gradients in another."""
    return _AddRmsNorm.apply(x, residual, weight, epsilon, accumulate, deferred)
