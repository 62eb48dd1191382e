"""Softmax cross entropy over a vocabulary shard. Logits are read once a pass and never copied into a wider type.

The loss of a token is log(total) - (target - maximum), where total is the sum of exp(logit - maximum). With the vocabulary split over
ranks each gives its own maximum, total and target; totals are rescaled to the common maximum and added (online softmax: Milakov and
Gimelshein 2018), and backward needs nothing but the common maximum and total. `functional.cross_entropy_sum` does that.

Shapes: logits [..., columns] float64, float32, bfloat16 or float16, labels [...] int64. The columns hold the vocabulary's rows
first_row .. first_row + num_rows; further columns are padding: they count as minus infinity and get a gradient of zero. Statistics,
losses and scales [...] are float32 (float64 for float64 logits). Tensors that are not contiguous are copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megactl.engine.ops.calls import compiled, differentiable
from megactl.engine.ops.library import use_compiled
from megactl.engine.ops.philox import FLOATS
from megactl.engine.ops.reference import cross_entropy as reference

Three = tuple[Tensor, Tensor, Tensor]


def cross_entropy(logits: Tensor, labels: Tensor, first_row: int = 0, num_rows: int | None = None) -> Tensor:
    """The loss of each token [...], differentiable once in the logits; for a vocabulary that is held whole.

    A label outside the vocabulary counts as a logit of 0: mask such a token. Raises ValueError for tensors that do not fit.
    """
    rows = _checked(logits, labels, first_row, num_rows)
    arguments = (logits.contiguous(), labels.contiguous(), first_row, rows)
    return compiled("cross_entropy", *arguments)[2] if use_compiled() else reference.cross_entropy(*arguments)


@torch.no_grad()
def cross_entropy_forward(logits: Tensor, labels: Tensor, first_row: int = 0, num_rows: int | None = None) -> Three:
    """This shard's (maximum, total, target) of each token: the largest logit, the sum of exp(logit - maximum), the label's logit.

    target is 0 where the shard does not hold the label; a shard without rows gives minus infinity, 0 and 0. A NaN among the logits
    shows in total. Raises ValueError for tensors that do not fit.
    """
    rows = _checked(logits, labels, first_row, num_rows)
    arguments = (logits.contiguous(), labels.contiguous(), first_row, rows)
    return compiled("cross_entropy_forward", *arguments) if use_compiled() else reference.cross_entropy_forward(*arguments)


@torch.no_grad()
def cross_entropy_backward(
    logits: Tensor, labels: Tensor, maximum: Tensor, total: Tensor, scale: Tensor, first_row: int = 0, num_rows: int | None = None
) -> Tensor:
    """The gradient of sum(scale * loss) in the logits' dtype: (exp(logit - maximum) / total - onehot) * scale.

    maximum and total are those of the whole vocabulary. Where scale is 0, the gradient is 0 whatever the logits are. Maximum and total,
    not their log-sum, because the rounding of a large log-sum would scale the whole row's gradient.
    """
    rows = _checked(logits, labels, first_row, num_rows)
    _check_rows(logits, labels, maximum=maximum, total=total, scale=scale)
    dense = (logits.contiguous(), labels.contiguous(), maximum.contiguous(), total.contiguous(), scale.contiguous())
    arguments = (*dense, first_row, rows)
    return compiled("cross_entropy_backward", *arguments) if use_compiled() else reference.cross_entropy_backward(*arguments)


@torch.no_grad()
def cross_entropy_backward_(
    logits: Tensor, labels: Tensor, maximum: Tensor, total: Tensor, scale: Tensor, first_row: int = 0, num_rows: int | None = None
) -> Tensor:
    """As `cross_entropy_backward`, written over the logits, which must be contiguous and are returned."""
    rows = _checked(logits, labels, first_row, num_rows)
    _check_rows(logits, labels, maximum=maximum, total=total, scale=scale)
    if not logits.is_contiguous():
        raise ValueError("logits are not contiguous: must be to be overwritten; call cross_entropy_backward")
    function = torch.ops.megactl.cross_entropy_backward_ if use_compiled() else reference.cross_entropy_backward_
    function(logits, labels.contiguous(), maximum.contiguous(), total.contiguous(), scale.contiguous(), first_row, rows)
    if not torch.compiler.is_compiling():
        # So that autograd refuses a backward that still needs the logits: torch does not count what a compiled operator changed.
        torch.autograd.graph.increment_version(logits)
    return logits


def _checked(logits: Tensor, labels: Tensor, first_row: int, num_rows: int | None) -> int:
    """num_rows as a number."""
    if logits.dim() == 0 or logits.dtype not in FLOATS:
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}: must be a floating-point tensor [..., columns]")
    if labels.dtype != torch.int64 or labels.shape != logits.shape[:-1] or labels.device != logits.device:
        found = f"{labels.dtype} {list(labels.shape)} on {labels.device}"
        raise ValueError(f"labels are {found}: must be int64 {list(logits.shape[:-1])} on {logits.device}, as the logits")
    columns = logits.shape[-1]
    rows = columns if num_rows is None else num_rows
    if first_row < 0 or not 0 <= rows <= columns:
        raise ValueError(f"first_row = {first_row}, num_rows = {rows}: must not be negative, and num_rows at most the {columns} columns")
    return rows


def _check_rows(logits: Tensor, labels: Tensor, **rows: Tensor) -> None:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    for name, tensor in rows.items():
        if tensor.dtype != dtype or tensor.shape != labels.shape or tensor.device != logits.device:
            found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name} is {found}: must be {dtype} {list(labels.shape)} on {logits.device}, one number a token")


def register() -> None:
    """Tell torch what shapes the operators give and how the loss differentiates."""
    for name in ("cross_entropy", "cross_entropy_forward"):
        torch.library.register_fake(f"megactl::{name}", _fake_forward)
    torch.library.register_fake("megactl::cross_entropy_backward", lambda logits, *rest: torch.empty_like(logits))
    torch.library.register_fake("megactl::cross_entropy_backward_", lambda *arguments: None)
    differentiable("cross_entropy", _backward, _context)
    differentiable("cross_entropy_backward", _no_second_derivative)


def _fake_forward(logits: Tensor, labels: Tensor, *rest: int) -> Three:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    maximum, total, third = (logits.new_empty(labels.shape, dtype=dtype) for _ in range(3))
    return maximum, total, third


def _context(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    logits, labels, ctx.first_row, ctx.num_rows = inputs
    maximum, total, _ = output
    # Without this, autograd would hand a tensor of zeros for each statistic and add its gradient.
    ctx.mark_non_differentiable(maximum, total)
    ctx.save_for_backward(logits, labels, maximum, total)


def _backward(ctx: Any, _maximum: Tensor | None, _total: Tensor | None, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, labels, maximum, total = ctx.saved_tensors
    scale = grad.contiguous()
    grad_logits = compiled("cross_entropy_backward", logits, labels, maximum, total, scale, ctx.first_row, ctx.num_rows)
    return grad_logits, None, None, None


def _no_second_derivative(ctx: Any, grad: Tensor) -> None:
    raise NotImplementedError("cross_entropy is differentiable once, its gradient is not: set MEGACTL_OPS=torch for second derivatives")
