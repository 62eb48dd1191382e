"""The way into a pipeline stage: the input's gradient is caught without the input being kept.

A leaf with its `.grad` would do, but autograd holds a leaf as long as the graph, and with it the whole input of every micro-batch in
flight, also where the stage itself has put it away (saved inputs that are shared over ranks, or in host memory).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function


class _Enter(Function):
    @staticmethod
    def forward(ctx, anchor, x, entrance: Entrance):
        ctx.entrance = entrance
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        ctx.entrance.gradient = grad
        return None, None, None


class Entrance:
    """One micro-batch's way into one stage. `gradient` is there after the stage's backward."""

    gradient: Tensor | None = None

    def enter(self, x: Tensor) -> Tensor:
        """The input x [b, s, h] as a tensor that wants a gradient."""
        # Autograd records what depends on something that wants a gradient; this has no elements.
        anchor = torch.empty(0, device=x.device, requires_grad=True)
        return _Enter.apply(anchor, x, self)
