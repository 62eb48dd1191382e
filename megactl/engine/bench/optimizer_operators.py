"""The optimizer's operators, which work in place: AdamW on one flat tensor or on many, the gradient norm, scaling by a factor.

Every contestant has its own copy of the state, and all start from the same values, so that their results can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megactl.engine import ops
from megactl.engine.bench.measure import Contestant
from megactl.engine.bench.sizes import Size
from megactl.engine.bench.work import COMPILE, OURS, Operator, Work, random_tensor

_LR, _BETA1, _BETA2, _EPS, _DECAY = 1e-4, 0.9, 0.95, 1e-8, 0.1
_SETTINGS = {"beta1": _BETA1, "beta2": _BETA2, "eps": _EPS, "weight_decay": _DECAY}
# A few layers are as good as all of them: larger than any cache, and the peers' states still fit beside each other.
_MOST_LAYERS = 4


@dataclass(frozen=True)
class _State:
    """AdamW's tensors for some parameters. `low` holds the narrower copies that a model computes with (empty: the masters are used)."""

    low: list[Tensor]
    master: list[Tensor]
    grad: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]

    def copied(self) -> _State:
        return _State(*([tensor.clone() for tensor in group] for group in vars(self).values()))

    @property
    def results(self) -> tuple[Tensor, ...]:
        """What an update writes."""
        return (*self.low, *self.master, *self.exp_avg, *self.exp_avg_sq)

    @property
    def bytes_moved(self) -> int:
        """Masters and averages are read and written, gradients read, narrower copies written."""
        kept = sum(tensor.numel() * tensor.element_size() for tensor in (*self.master, *self.exp_avg, *self.exp_avg_sq))
        once = sum(tensor.numel() * tensor.element_size() for tensor in (*self.grad, *self.low))
        return 2 * kept + once


def _state(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> _State:
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def group(make: Callable[..., Tensor], scale: float) -> list[Tensor]:
        return [make(shape, dtype=wide, device=device) * scale for shape in shapes]

    master = group(torch.randn, 0.02)
    low = [] if dtype == wide else [tensor.to(dtype) for tensor in master]
    return _State(low, master, group(torch.randn, 1e-3), group(torch.randn, 1e-4), group(torch.rand, 1e-6))


def _scalars(like: Tensor) -> dict[str, Tensor]:
    values = {"lr": _LR, "step": 100.0, "grad_scale": 1.0, "skip": 0.0}
    return {name: torch.tensor(value, dtype=like.dtype, device=like.device) for name, value in values.items()}


def _plain_update(state: _State, grad_scale: Tensor, step: Tensor) -> None:
    """AdamW as its paper writes it, tensor by tensor; torch.compile makes one pass of it."""
    for index, master in enumerate(state.master):
        grad = state.grad[index] * grad_scale
        average, square = state.exp_avg[index], state.exp_avg_sq[index]
        average.lerp_(grad, 1.0 - _BETA1)
        square.mul_(_BETA2).addcmul_(grad, grad, value=1.0 - _BETA2)
        denominator = (square / (1.0 - _BETA2**step)).sqrt_().add_(_EPS)
        master.mul_(1.0 - _LR * _DECAY).sub_(_LR * (average / (1.0 - _BETA1**step)) / denominator)
        if state.low:
            state.low[index].copy_(master)


def _torch_optimizer(state: _State, kind: str) -> Contestant:
    """torch.optim.AdamW with `kind` (foreach or fused) on the masters, then a copy to the narrower tensors. It scales no gradients."""
    parameters = [torch.nn.Parameter(master) for master in state.master]
    optimizer = torch.optim.AdamW(parameters, lr=_LR, betas=(_BETA1, _BETA2), eps=_EPS, weight_decay=_DECAY, **{kind: True})
    for index, parameter in enumerate(parameters):
        parameter.grad = state.grad[index]
        # The step before the one that is timed; fused keeps the count on the device.
        done = torch.tensor(99.0, device=parameter.device if kind == "fused" else "cpu")
        optimizer.state[parameter] = {"step": done, "exp_avg": state.exp_avg[index], "exp_avg_sq": state.exp_avg_sq[index]}

    def run(_: Any) -> tuple[Tensor, ...]:
        optimizer.step()
        if state.low:
            torch._foreach_copy_(state.low, [parameter.detach() for parameter in parameters])
        return state.results

    return Contestant(f"AdamW({kind}=True)", run)


def _adamw_work(start: _State, shape: tuple[int, ...], ours: Callable[[_State, dict[str, Tensor]], None]) -> list[Work]:
    scalars = _scalars(start.master[0])
    own = start.copied()

    def run(_: Any) -> tuple[Tensor, ...]:
        ours(own, scalars)
        return own.results

    def compiled() -> Contestant:
        state = start.copied()
        function = torch.compile(_plain_update, dynamic=False, fullgraph=True)

        def run(_: Any) -> tuple[Tensor, ...]:
            with torch.no_grad():
                function(state, scalars["grad_scale"], scalars["step"])
            return state.results

        return Contestant(COMPILE, run)

    peers = tuple(_torch_optimizer(start.copied(), kind) for kind in ("fused", "foreach"))
    moves = "master, averages (both ways), gradient" + (" -> narrow copy" if start.low else "")
    return [Work("in place", "", shape, start.bytes_moved, moves, Contestant(OURS, run), peers, compiled)]


def _adamw(size: Size, dtype: torch.dtype, device: torch.device) -> list[Work]:
    count = sum(torch.Size(shape).numel() for shape in size.layer_shapes) * min(size.layers, _MOST_LAYERS)

    def ours(state: _State, scalars: dict[str, Tensor]) -> None:
        (master,) = state.master
        param = state.low[0] if state.low else master
        ops.adamw_(param, master, state.grad[0], state.exp_avg[0], state.exp_avg_sq[0], **scalars, **_SETTINGS)

    return _adamw_work(_state([(count,)], dtype, device), (count,), ours)


def _adamw_many(size: Size, dtype: torch.dtype, device: torch.device) -> list[Work]:
    start = _state(_layer_tensors(size), dtype, device)

    def ours(state: _State, scalars: dict[str, Tensor]) -> None:
        params = state.low or state.master
        ops.adamw_many_(params, state.master, state.grad, state.exp_avg, state.exp_avg_sq, **scalars, **_SETTINGS)

    return _adamw_work(start, _many_shape(start.master), ours)


def _squared_norm(size: Size, dtype: torch.dtype, device: torch.device) -> list[Work]:
    tensors = _gradients(size, dtype, device)

    def run(_: Any) -> Tensor:
        return ops.squared_norm(tensors)

    def foreach(_: Any = None) -> Tensor:
        return torch.stack(torch._foreach_norm(tensors)).double().square().sum()

    def plain(tensors: list[Tensor]) -> Tensor:
        return torch.stack([tensor.square().sum() for tensor in tensors]).double().sum()

    def compiled() -> Contestant:
        function = torch.compile(plain, dynamic=False, fullgraph=True)
        return Contestant(COMPILE, lambda _: function(tensors))

    moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    peers = (Contestant("_foreach_norm, sum", foreach),)
    return [Work("forward", "", _many_shape(tensors), moved, "gradients -> one number", Contestant(OURS, run), peers, compiled)]


def _scale(size: Size, dtype: torch.dtype, device: torch.device) -> list[Work]:
    start = _gradients(size, dtype, device)
    # Minus one: any other factor but one would end in infinities or zeros after some hundred rounds.
    factor = torch.tensor(-1.0, dtype=start[0].dtype, device=device)

    def contestant(name: str, function: Callable[[list[Tensor]], Any]) -> Contestant:
        own = [tensor.clone() for tensor in start]

        def run(_: Any) -> tuple[Tensor, ...]:
            function(own)
            return tuple(own)

        return Contestant(name, run)

    def plain(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            tensor.mul_(factor)

    moved = 2 * sum(tensor.numel() * tensor.element_size() for tensor in start)
    peers = (contestant("_foreach_mul_", lambda own: torch._foreach_mul_(own, factor)),)
    return [
        Work("in place", "", _many_shape(start), moved, "gradients (both ways)",
             contestant(OURS, lambda own: ops.scale_(own, factor)), peers,
             lambda: contestant(COMPILE, torch.compile(plain, dynamic=False, fullgraph=True)))
    ]  # fmt: skip


def _layer_tensors(size: Size) -> list[tuple[int, ...]]:
    return size.layer_shapes * min(size.layers, _MOST_LAYERS)


def _gradients(size: Size, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Main gradients: float32, or float64 where the model computes in it."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [random_tensor(shape, wide, device).detach() for shape in _layer_tensors(size)]


def _many_shape(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """(number of tensors, elements of all)."""
    return len(tensors), sum(tensor.numel() for tensor in tensors)


OPTIMIZER_OPERATORS: dict[str, Operator] = {
    "adamw_": _adamw,
    "adamw_many_": _adamw_many,
    "squared_norm": _squared_norm,
    "scale_": _scale,
}
