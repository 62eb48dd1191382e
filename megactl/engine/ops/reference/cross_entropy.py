"""Cross entropy over a vocabulary shard in plain torch, with a copy of the logits in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def _held(logits: Tensor, num_rows: int) -> Tensor:
    """The columns that are no padding, in the type of the arithmetic."""
    return logits[..., :num_rows].to(torch.promote_types(logits.dtype, torch.float32))


def _columns(labels: Tensor, first_row: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Columns of the labels [..., 1], 0 where this shard does not hold them, and where it does not."""
    outside = (labels < first_row) | (labels >= first_row + num_rows)
    return (labels - first_row).masked_fill(outside, 0).unsqueeze(-1), outside


def cross_entropy_forward(logits: Tensor, labels: Tensor, first_row: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `megactl.engine.ops.cross_entropy.cross_entropy_forward`."""
    held = _held(logits, num_rows)
    if num_rows == 0:
        zero = held.new_zeros(labels.shape)
        return zero - float("inf"), zero, zero.clone()
    column, outside = _columns(labels, first_row, num_rows)
    maximum = held.amax(-1)
    shift = maximum.masked_fill(maximum == -float("inf"), 0.0)
    total = (held - shift.unsqueeze(-1)).exp().sum(-1)
    return maximum, total, held.gather(-1, column).squeeze(-1).masked_fill(outside, 0.0)


def cross_entropy_backward(
    logits: Tensor, labels: Tensor, maximum: Tensor, total: Tensor, scale: Tensor, first_row: int, num_rows: int
) -> Tensor:
    """See `megactl.engine.ops.cross_entropy.cross_entropy_backward`."""
    grad = torch.zeros_like(logits)
    if num_rows:
        column, outside = _columns(labels, first_row, num_rows)
        softmax = (_held(logits, num_rows) - maximum.unsqueeze(-1)).exp() * (scale / total).unsqueeze(-1)
        softmax.scatter_add_(-1, column, -scale.masked_fill(outside, 0.0).unsqueeze(-1))
        grad[..., :num_rows] = softmax.masked_fill((scale == 0.0).unsqueeze(-1), 0.0)
    return grad


def cross_entropy_backward_(
    logits: Tensor, labels: Tensor, maximum: Tensor, total: Tensor, scale: Tensor, first_row: int, num_rows: int
) -> None:
    """See `megactl.engine.ops.cross_entropy.cross_entropy_backward_`."""
    logits.copy_(cross_entropy_backward(logits, labels, maximum, total, scale, first_row, num_rows))


def cross_entropy(logits: Tensor, labels: Tensor, first_row: int, num_rows: int) -> Tensor:
    """The loss alone, differentiable; see `megactl.engine.ops.cross_entropy.cross_entropy`."""
    maximum, total, target = cross_entropy_forward(logits, labels, first_row, num_rows)
    return total.log() - (target - maximum)
