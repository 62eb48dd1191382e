"""The learning-rate schedule and the arithmetic of clipping. The update itself is `zero.ShardedOptimizer`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megactl.config.schema import Optimizer


def learning_rate(config: Optimizer, warmup: int, iteration: int) -> float:
    """Learning rate of `iteration` (counted from 1) of a resolved configuration; `warmup` in iterations.

    Linear from 0 over the warm-up, so that the first update already moves; then cosine (Loshchilov and Hutter 2017), linear, constant,
    or warmup-stable-decay (Hu et al. 2024: constant, then linear to min_lr over the last wsd_decay_iterations). After the decay: min_lr.
    """
    if iteration <= warmup:
        return config.lr * iteration / warmup
    if config.lr_schedule == "constant":
        return config.lr
    end = config.lr_decay_iterations
    start = warmup
    if config.lr_schedule == "wsd":
        start = max(warmup, end - config.wsd_decay_iterations)
    if iteration <= start:
        return config.lr
    done = min(1.0, (iteration - start) / max(1, end - start))
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if config.lr_schedule == "cosine" else 1.0 - done
    return config.min_lr + (config.lr - config.min_lr) * left


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """What to multiply gradients of global norm `norm` (0-d) with so that it is at most `limit`; 0 means no limit.

    The 1e-6 is torch.nn.utils.clip_grad_norm_'s.
    """
    if limit <= 0.0:
        return torch.ones_like(norm)
    return (limit / (norm + 1e-6)).clamp(max=1.0)
