"""One measurable piece of work: contestants that do the same, and what the same costs at least."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megactl.engine.bench.measure import Contestant
from megactl.engine.bench.sizes import Size

OURS, COMPILE, COPY = "megactl", "torch.compile", "copy"

# A function of tensors that gives a tensor or several.
Function = Callable[..., Any]


@dataclass(frozen=True)
class Work:
    """One line of the table.

    direction: forward, backward or in place. peers: torch's ways by name; compiled: makes one contestant of torch.compile, or
    None where there is nothing to compile. bytes_moved: the least that must be read and written; `moves` says of what.
    agree: whether all must give the same values (not where they draw random numbers). variant: which form of the operator.
    """

    direction: str
    variant: str
    shape: tuple[int, ...]
    bytes_moved: int
    moves: str
    ours: Contestant
    peers: tuple[Contestant, ...]
    compiled: Callable[[], Contestant] | None
    agree: bool = True


# Builds the work of an operator; allocates its tensors.
Operator = Callable[[Size, torch.dtype, torch.device], list[Work]]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normal values that want a gradient. Not zeros: kernels run faster on zeros than on anything that is ever trained."""
    return torch.randn(shape, dtype=dtype, device=device).requires_grad_()


def differentiable(
    ours: Function,
    peers: Mapping[str, Function],
    inputs: Sequence[Tensor],
    *,
    forward: tuple[int, str],
    backward: tuple[int, str],
    compiled: str | None = None,
    variant: str = "",
    agree: bool = True,
) -> list[Work]:
    """The forward and the backward of a function of `inputs`, all of which get gradients.

    `forward` and `backward` are (bytes that must be moved, of what); `compiled` names the peer for torch.compile (default: the first).
    The forward records what its backward needs, as in training; a backward is timed alone, each time on a new graph.
    """

    # The forward's compilation serves the backward, too: it takes seconds.
    @cache
    def compiled_once() -> Function:
        return torch.compile(peers[compiled or next(iter(peers))], dynamic=False, fullgraph=True)

    # One set of output gradients for all, made from the shapes that the first peer gives.
    gradients: list[tuple[Tensor, ...]] = []

    def seeds(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not gradients:
            gradients.append(tuple(torch.randn(item.shape, dtype=torch.float32, device=item.device) for item in outputs))
        return tuple(seed.to(item.dtype) for seed, item in zip(gradients[0], outputs, strict=True))

    def forward_of(name: str, function: Function) -> Contestant:
        return Contestant(name, lambda _: _several(function(*inputs)))

    def backward_of(name: str, function: Function) -> Contestant:
        def prepare() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            outputs = _several(function(*inputs))
            return outputs, seeds(outputs)

        return Contestant(name, lambda made: torch.autograd.grad(made[0], inputs, made[1]), prepare)

    found = []
    for direction, make, (moved, moves) in (("forward", forward_of, forward), ("backward", backward_of, backward)):
        found.append(
            Work(
                direction, variant, tuple(inputs[0].shape), moved, moves, make(OURS, ours),
                tuple(make(name, function) for name, function in peers.items()),
                lambda make=make: make(COMPILE, compiled_once()), agree,
            )
        )  # fmt: skip
    return found


def copy_of(bytes_moved: int, device: torch.device) -> Contestant:
    """A plain copy that reads and writes `bytes_moved` together: what the memory gives."""
    source = torch.ones(max(1, bytes_moved // 8), device=device)
    target = torch.empty_like(source)
    return Contestant(COPY, lambda _: target.copy_(source))


def disagreement(one: Any, other: Any) -> float:
    """The largest ||a - b|| / ||b|| over the tensors of two results; infinite where shapes differ or a value is not finite."""
    worst = 0.0
    for a, b in zip(_several(one), _several(other), strict=True):
        if a.shape != b.shape:
            return float("inf")
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        a, b = a.detach().to(wide), b.detach().to(wide)
        error = float((a - b).norm() / b.norm().clamp(min=torch.finfo(wide).tiny))
        worst = max(worst, error if error == error else float("inf"))
    return worst


def _several(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)
