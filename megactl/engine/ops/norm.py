"""LayerNorm and RMSNorm over the last dimension, alone or fused with the addition of a residual before them.

x is [..., columns] in float64, float32, bfloat16 or float16; weight and bias are [columns] in x's dtype or float32. Arithmetic,
statistics and weight gradients are float32 (float64 for a float64 x), and the variance is taken around the mean.
Sources: Ba, Kiros and Hinton, "Layer normalization", 2016; Zhang and Sennrich, "Root mean square layer normalization", NeurIPS 2019.

`layer_norm`, `rms_norm` and their `add_` forms are differentiable. The `_forward` and `_backward` pairs are what they consist of, for
callers that keep weight gradients in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megactl.engine.ops.calls import compiled, differentiable
from megactl.engine.ops.library import looks, use_compiled
from megactl.engine.ops.reference import norm as reference

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias, of x's shape and dtype. Raises ValueError for tensors that do not fit."""
    return layer_norm_forward(x, weight, bias, epsilon)[0]


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(LayerNorm of sum, sum), where sum = x + residual, rounded to x's dtype. Raises ValueError for tensors that do not fit."""
    return add_layer_norm_forward(x, residual, weight, bias, epsilon)[:2]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean of x^2 + epsilon) * weight, of x's shape and dtype. Raises ValueError for tensors that do not fit."""
    return rms_norm_forward(x, weight, epsilon)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(RMSNorm of sum, sum), where sum = x + residual, rounded to x's dtype. Raises ValueError for tensors that do not fit."""
    return add_rms_norm_forward(x, residual, weight, epsilon)[:2]


def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd): mean and rstd = 1 / sqrt(variance + epsilon) have x's shape without its last dimension."""
    _check(x, epsilon, weight, bias)
    return _run("layer_norm_forward", x.contiguous(), *_parameters(x, weight, bias), epsilon)


def add_layer_norm_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, sum, mean, rstd): as `layer_norm_forward` of sum = x + residual."""
    _check(x, epsilon, weight, bias)
    _check_twins(x, residual=residual)
    return _run("add_layer_norm_forward", x.contiguous(), residual.contiguous(), *_parameters(x, weight, bias), epsilon)


def layer_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, grad_sum: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x in x's dtype, grad_weight, grad_bias [columns] in float32, or float64 for a float64 x).

    x is what was normalised: x of `layer_norm_forward`, sum of `add_layer_norm_forward`. Where `grad_sum`, sum's gradient from
    elsewhere, is given, grad_x includes it, and is the gradient of x and of the residual both.
    """
    _check(x, 0.0, weight)
    _check_twins(x, grad_y=grad_y, grad_sum=grad_sum)
    _check_statistics(x, mean=mean, rstd=rstd)
    dense = (grad_y.contiguous(), x.contiguous(), *_parameters(x, weight), mean.contiguous(), rstd.contiguous())
    return _run("layer_norm_backward", *dense, None if grad_sum is None else grad_sum.contiguous())


def rms_norm_forward(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(y, rstd): rstd = 1 / sqrt(mean of x^2 + epsilon) has x's shape without its last dimension."""
    _check(x, epsilon, weight)
    return _run("rms_norm_forward", x.contiguous(), *_parameters(x, weight), epsilon)


def add_rms_norm_forward(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, sum, rstd): as `rms_norm_forward` of sum = x + residual."""
    _check(x, epsilon, weight)
    _check_twins(x, residual=residual)
    return _run("add_rms_norm_forward", x.contiguous(), residual.contiguous(), *_parameters(x, weight), epsilon)


def rms_norm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad_sum: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(grad_x, grad_weight), as `layer_norm_backward`."""
    _check(x, 0.0, weight)
    _check_twins(x, grad_y=grad_y, grad_sum=grad_sum)
    _check_statistics(x, rstd=rstd)
    dense = (grad_y.contiguous(), x.contiguous(), *_parameters(x, weight), rstd.contiguous())
    return _run("rms_norm_backward", *dense, None if grad_sum is None else grad_sum.contiguous())


def _run(name: str, *arguments: Any) -> Any:
    return compiled(name, *arguments) if use_compiled() else getattr(reference, name)(*arguments)


def _parameters(x: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Contiguous; beside a float64 x in float64, so that the kernels need no fourth pair of types."""
    if x.dtype == torch.float64:
        return [tensor.double().contiguous() for tensor in tensors]
    return [tensor.contiguous() for tensor in tensors]


def _check(x: Tensor, epsilon: float, weight: Tensor, bias: Tensor | None = None) -> None:
    """Written for the case that all is well: this runs in every layer of every step."""
    shape, dtype, device, weight_dtype = x.shape, x.dtype, x.device, weight.dtype
    if dtype not in FLOATS or not shape or shape[-1] < 1:
        raise ValueError(f"x is {looks(x)}: must be a floating-point tensor [..., columns] with at least one column")
    if not epsilon >= 0.0:
        raise ValueError(f"epsilon = {epsilon}: must not be negative")
    fits = weight.shape == shape[-1:] and weight.device == device and (weight_dtype == dtype or weight_dtype == torch.float32)
    if not fits or (bias is not None and (bias.shape != weight.shape or bias.device != device or bias.dtype != weight_dtype)):
        found = f"weight is {looks(weight)}{'' if bias is None else f', bias is {looks(bias)}'}"
        raise ValueError(f"{found}, x is {looks(x)}: must be [columns] on x's device, in x's dtype or float32, of one dtype")


def _check_twins(x: Tensor, **twins: Tensor | None) -> None:
    for name, tensor in twins.items():
        if tensor is not None and (tensor.shape != x.shape or tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(f"{name} is {looks(tensor)}, x is {looks(x)}: must have the shape, dtype and device of x")


def _check_statistics(x: Tensor, **statistics: Tensor) -> None:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, tensor in statistics.items():
        if tensor.shape != x.shape[:-1] or tensor.dtype != dtype or tensor.device != x.device:
            raise ValueError(f"{name} is {looks(tensor)}, x is {looks(x)}: must be {dtype} of x's shape without its last dimension")


def register() -> None:
    """Tell torch what shapes the operators give, and which backward belongs to which forward."""
    fakes: dict[str, Callable[..., Any]] = {
        "layer_norm_forward": lambda x, *rest: (torch.empty_like(x), _statistic(x), _statistic(x)),
        "add_layer_norm_forward": lambda x, *rest: (torch.empty_like(x), torch.empty_like(x), _statistic(x), _statistic(x)),
        "layer_norm_backward": lambda grad_y, x, *rest: (torch.empty_like(x), _gradient(x), _gradient(x)),
        "rms_norm_forward": lambda x, *rest: (torch.empty_like(x), _statistic(x)),
        "add_rms_norm_forward": lambda x, *rest: (torch.empty_like(x), torch.empty_like(x), _statistic(x)),
        "rms_norm_backward": lambda grad_y, x, *rest: (torch.empty_like(x), _gradient(x)),
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"megactl::{name}", fake)
    for kind, statistics in (("layer_norm", 2), ("rms_norm", 1)):
        for added, prefix in ((False, ""), (True, "add_")):
            differentiable(f"{prefix}{kind}_forward", _backward_of(kind, added), _context_of(added, statistics))
        # Without this, second derivatives would be silently zero.
        differentiable(f"{kind}_backward", _refuse_second_derivative)


def _statistic(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _gradient(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[-1:], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _context_of(added: bool, statistics: int) -> Callable[..., None]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        weight = inputs[2 if added else 1]
        ctx.save_for_backward(output[1] if added else inputs[0], weight, *output[-statistics:])
        ctx.mark_non_differentiable(*output[-statistics:])
        ctx.set_materialize_grads(False)

    return setup_context


def _backward_of(kind: str, added: bool) -> Callable[..., tuple[Tensor | None, ...]]:
    parameters = 2 if kind == "layer_norm" else 1

    def backward(ctx: Any, grad_y: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, *statistics = ctx.saved_tensors
        grad_sum = others[0] if added else None
        if grad_y is None:  # only the sum was used
            grad_x, gradients = grad_sum, [None] * parameters
        else:
            dense = None if grad_sum is None else grad_sum.contiguous()
            grad_x, *wide = compiled(f"{kind}_backward", grad_y.contiguous(), x, weight, *statistics, dense)
            gradients = [gradient.to(weight.dtype) for gradient in wide]
        return (grad_x, grad_x, *gradients, None) if added else (grad_x, *gradients, None)

    return backward


def _refuse_second_derivative(ctx: Any, *gradients: Any) -> None:
    raise NotImplementedError("second derivatives of the compiled LayerNorm and RMSNorm do not exist: set MEGACTL_OPS=torch")
