"""SwiGLU and its backward in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up, in the type of the arithmetic."""
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return gate, up


def swiglu(x: Tensor) -> Tensor:
    """See `megactl.engine.ops.swiglu.swiglu`. Differentiable."""
    gate, up = _halves(x)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """See `megactl.engine.ops.swiglu.swiglu_backward`."""
    gate, up = _halves(x)
    grad, share = grad.to(gate.dtype), torch.sigmoid(gate)
    slope = share * (1.0 + gate * torch.sigmoid(-gate))
    return torch.cat([grad * up * slope, grad * (gate * share)], dim=-1).to(x.dtype)
