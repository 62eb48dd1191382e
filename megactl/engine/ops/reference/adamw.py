"""AdamW in plain torch, equal to the compiled one bit for bit, float64 square roots apart.

(torch takes those from a vector library that is off by one unit in the last place now and then.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adamw_(
    master: Tensor,
    low: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """See `megactl.engine.ops.adamw.adamw_`. The step's constants are computed in float64 and rounded once."""
    dtype, count, rate = master.dtype, step.double(), lr.double()
    decay = (1.0 - rate * weight_decay).to(dtype)
    step_size = (rate / (1.0 - beta1**count)).to(dtype)
    inverse_root = (1.0 / torch.sqrt(1.0 - beta2**count)).to(dtype)
    g = grad * grad_scale
    m = exp_avg + (1.0 - beta1) * (g - exp_avg)
    v = exp_avg_sq * beta2 + (1.0 - beta2) * g * g
    # In float64 even for float32: torch's own float32 root is not always the nearest, the kernels' is.
    root = torch.sqrt(v.double()).to(dtype)
    weight = master * decay - step_size * m / (root * inverse_root + eps)
    still = skip != 0
    for target, value in ((exp_avg, m), (exp_avg_sq, v), (master, weight)):
        target.copy_(torch.where(still, target, value))
    if low is not None:
        low.copy_(torch.where(still, low, weight.to(low.dtype)))


def adamw_many_(
    masters: Sequence[Tensor],
    lows: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decays: Sequence[float],
) -> None:
    """See `megactl.engine.ops.adamw.adamw_many_`; `lows` is empty where no tensor has a low-precision copy."""
    scalars = (lr, step, grad_scale, skip, beta1, beta2, eps)
    copies = lows or [None] * len(masters)
    for master, low, *others, decay in zip(masters, copies, grads, exp_avgs, exp_avg_sqs, weight_decays, strict=True):
        adamw_(master, low, *others, *scalars, decay)
