"""Calls of the compiled operators by a short way.

What torch.library puts between a caller and a kernel is Python, and takes several times as long as a small norm: 60 of 90
microseconds where a gradient is wanted, 12 of 40 where none is. It knows how the operators differentiate all the same: torch.compile,
functorch and whoever calls torch.ops take its way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import Function


@dataclass
class _Operator:
    """overload: what calls the kernel; function: its derivative for eager calls, None where it has none."""

    overload: Callable[..., Any]
    function: type[Function] | None = None


@functools.cache
def _operator(name: str) -> _Operator:
    return _Operator(getattr(torch.ops.megactl, name).default)


@functools.cache
def _short_way() -> bool:
    """Whether this torch has what the short way is made of, which is not of its public interface. The long way computes the same."""
    return all(hasattr(torch._C, name) for name in ("_are_functorch_transforms_active", "_any_requires_grad", "_AutoDispatchBelowAutograd"))


def compiled(name: str, *arguments: Any) -> Any:
    """torch.ops.megactl.<name>(*arguments), recorded for backward where autograd would. The operators must be loaded."""
    if torch.compiler.is_compiling() or not _short_way() or torch._C._are_functorch_transforms_active():
        return getattr(torch.ops.megactl, name)(*arguments)
    operator = _operator(name)
    if operator.function is not None and torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        return operator.function.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator.overload(*arguments)


def differentiable(name: str, backward: Callable[..., Any], context: Callable[..., None] | None = None) -> None:
    """Let operator `name` differentiate, called either way. `context` and `backward` are those of torch.library.register_autograd."""
    torch.library.register_autograd(f"megactl::{name}", backward, setup_context=context)
    operator = _operator(name)

    def forward(ctx: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = operator.overload(*arguments)
        if context is not None:
            context(ctx, arguments, output)
        return output

    # Not torch's own form with `setup_context`: it inspects the signature at every call, which takes longer than all the rest.
    operator.function = type(f"megactl_{name}", (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})
