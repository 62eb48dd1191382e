"""Randomness that depends on what is drawn and on nothing else: not on the device, the layout, or what was drawn before.

A word is Philox4x32-10 of key = seed and counter = (element >> 2, stream, step), lane element & 3, where `element` is an index in
the whole, unsharded tensor (dropout takes half a word an element: see megactl/csrc/kernels/philox.h). So every parallel layout draws
the same numbers, recomputation needs no saved generator, and a CUDA graph replays with new ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megactl.engine.ops.calls import compiled, differentiable
from megactl.engine.ops.library import looks, use_compiled
from megactl.engine.ops.reference import random as reference
from megactl.errors import ConfigError, Problem

# Counter word 3 of parameter initialisation. Training steps are counted below it.
INITIALISATION_STEP = 0xFFFFFFFF
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def stream_of(name: str) -> int:
    """The random stream of a parameter, in [0, 2^31): the same for a canonical name in every layout, process and Python."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") & 0x7FFFFFFF


def philox_bits_(out: Tensor, *, first_element: int, seed: int, stream: int, step: int) -> None:
    """Fill `out` (int64, contiguous) with the 32-bit words of elements first_element, first_element + 1, ..."""
    _require(out.dtype == torch.int64 and out.is_contiguous(), "must be a contiguous int64 tensor", out=out)
    arguments = (out, first_element, _seed(seed), stream, step)
    if use_compiled():
        torch.ops.megactl.philox_bits_(*arguments)
    else:
        reference.philox_bits_(*arguments)


@torch.no_grad()
def normal_(out: Tensor, *, logical_shape: Sequence[int], rectangle: Sequence[tuple[int, int]], seed: int, stream: int, std: float) -> None:
    """Fill `out` with its part of an N(0, std) tensor of shape `logical_shape`.

    `rectangle` is the part held, a [start, stop) a dimension; `out` has its shape and is contiguous. A part equals that slice of the
    whole bit for bit, on CPU and CUDA: deviates are made in float64 by Box and Muller, without libm, and rounded to out's dtype.
    Raises ConfigError for a negative std, ValueError where the rectangle does not fit.
    """
    if not 0.0 <= std < float("inf"):
        raise ConfigError([Problem(f"std = {std}", "a standard deviation must be finite and not negative", "set init_std to 0 or more")])
    _require(out.dtype in FLOATS and out.is_contiguous(), "must be a contiguous floating-point tensor", out=out)
    shape, parts = tuple(logical_shape), [tuple(part) for part in rectangle]
    fits = len(shape) == len(parts) <= 8 and tuple(out.shape) == tuple(stop - start for start, stop in parts)
    _require(
        fits and all(0 <= start <= stop <= size for (start, stop), size in zip(parts, shape, strict=True)),
        "the rectangle must lie in logical_shape, have at most 8 dimensions, and be of out's shape",
        rectangle=parts,
        logical_shape=shape,
        out=out,
    )
    arguments = (out, list(shape), [start for start, _ in parts], _seed(seed), stream, float(std))
    if use_compiled():
        torch.ops.megactl.normal_(*arguments)
    else:
        reference.normal_(*arguments, INITIALISATION_STEP)


def dropout_add(
    x: Tensor,
    residual: Tensor | None,
    p: float,
    rng: Tensor,
    site: int,
    outer_offset: int = 0,
    outer_size: int | None = None,
) -> Tensor:
    """residual + dropout(x), or dropout(x) where `residual` is None: zero with probability p, scaled by 1 / (1 - p) otherwise.

    x is [batch, outer, *inner], and may hold positions outer_offset .. of outer_size (default: all) along the second dimension. Where
    batch is 1 these may run past outer_size: x is then a range of rows of the flattened [batch, outer], that begins at outer_offset.
    `rng` is int64 [3] on x's device: seed, step (not 0xFFFFFFFF), index of x's first sample in the global batch; `site` says which
    dropout of which layer this is. Differentiable in x and residual: the backward pass draws the mask again, so `rng` must keep its
    values until then (autograd refuses one that was changed in place) and nothing else is saved.
    x and residual are made contiguous; the result is. Raises ConfigError for p outside [0, 1), ValueError for shapes that do not fit.
    """
    _check_probability(p, x, residual)
    if p == 0.0:
        return x if residual is None else residual + x
    _check_dropout(x, rng, outer_offset, outer_size)
    arguments = (x.contiguous(), None if residual is None else residual.contiguous(), p, rng, site, outer_offset, outer_size or 0)
    return compiled("dropout_add", *arguments) if use_compiled() else reference.dropout_add(*arguments)


def dropout_add_rows(x: Tensor, residual: Tensor | None, p: float, rng: Tensor, site: int, rows: Tensor) -> Tensor:
    """`dropout_add` of rows from anywhere in a larger tensor: x [*rows, columns] holds row rows[i] of [all rows, columns] as its i-th.

    `rows` is int64, of x's shape less the last dimension, on x's device: each row's index counted over the whole global batch, so that
    of `rng` only seed and step are used. Rows 0, 1, ... keep what `dropout_add` keeps of the whole tensor with first sample 0.
    Both `rng` and `rows` must keep their values until backward. Raises as `dropout_add` does.
    """
    _check_probability(p, x, residual)
    if p == 0.0:
        return x if residual is None else residual + x
    _require(x.dim() >= 2 and x.dtype in FLOATS, "must be a floating-point tensor [*rows, columns]", x=x)
    _check_rng(x, rng)
    fits = rows.dtype == torch.int64 and rows.shape == x.shape[:-1] and rows.device == x.device
    _require(fits, "rows must be int64 on the device of x, one for each row of it", rows=rows, x=x)
    arguments = (x.contiguous(), None if residual is None else residual.contiguous(), p, rng, site, rows.contiguous())
    return compiled("dropout_add_rows", *arguments) if use_compiled() else reference.dropout_add_rows(*arguments)


def _check_probability(p: float, x: Tensor, residual: Tensor | None) -> None:
    if not 0.0 <= p < 1.0:
        raise ConfigError([Problem(f"dropout probability = {p}", "must lie in [0, 1)", "set 0 for no dropout")])
    if residual is not None:
        fits = residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device
        _require(fits, "residual must have the shape, dtype and device of x", residual=residual, x=x)


def _check_rng(x: Tensor, rng: Tensor) -> None:
    fits = rng.dtype == torch.int64 and rng.shape == (3,) and rng.device == x.device and rng.is_contiguous()
    _require(fits, "rng must be int64 [3] on the device of x: seed, step, first sample", rng=rng, x=x)


def _check_dropout(x: Tensor, rng: Tensor, outer_offset: int, outer_size: int | None) -> None:
    _require(x.dim() >= 2 and x.dtype in FLOATS, "must be a floating-point tensor [batch, outer, *inner]", x=x)
    _check_rng(x, rng)
    if outer_size is not None or outer_offset != 0:
        whole = x.shape[1] if outer_size is None else outer_size
        # One sample may run on into the next: its elements are consecutive there too.
        runs_on = x.shape[0] == 1 and outer_size is not None
        holds = outer_offset >= 0 and (runs_on or outer_offset + x.shape[1] <= whole)
        _require(holds, "x's positions must lie in the outer size, or x be one sample", outer_offset=outer_offset, outer_size=whole, x=x)


def _seed(seed: int) -> int:
    if not 0 <= seed < 2**63:
        raise ConfigError([Problem(f"seed = {seed}", "must lie in [0, 2^63)", "set a seed that is not negative")])
    return seed


def _require(holds: bool, rule: str, **found: object) -> None:
    """Raise ValueError with what was found and the rule. The message is put together only then: this runs in every step."""
    if not holds:
        seen = [f"{name} is {looks(value) if isinstance(value, Tensor) else value}" for name, value in found.items()]
        raise ValueError(f"{', '.join(seen)}: {rule}")


def register() -> None:
    """Tell torch what shapes the operators give, and that dropout's backward is dropout of the gradient."""
    for name in ("dropout_add", "dropout_add_rows"):
        torch.library.register_fake(f"megactl::{name}", lambda x, *rest: torch.empty_like(x))
    for name in ("philox_bits_", "normal_"):
        torch.library.register_fake(f"megactl::{name}", lambda *arguments: None)
    differentiable("dropout_add", _dropout_backward, _dropout_context)
    differentiable("dropout_add_rows", _dropout_rows_backward, _dropout_rows_context)


def _dropout_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, _, ctx.p, rng, ctx.site, ctx.outer_offset, ctx.outer_size = inputs
    # Saved, not cloned: autograd's version check then refuses a backward after rng was changed in place.
    ctx.save_for_backward(rng)


def _dropout_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (rng,) = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        # The gradient is dropped and scaled as the input was: the same operator, without a residual.
        grad_x = compiled("dropout_add", grad.contiguous(), None, ctx.p, rng, ctx.site, ctx.outer_offset, ctx.outer_size)
    return grad_x, grad if ctx.needs_input_grad[1] else None, None, None, None, None, None


def _dropout_rows_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, _, ctx.p, rng, ctx.site, rows = inputs
    ctx.save_for_backward(rng, rows)


def _dropout_rows_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    rng, rows = ctx.saved_tensors
    grad_x = compiled("dropout_add_rows", grad.contiguous(), None, ctx.p, rng, ctx.site, rows) if ctx.needs_input_grad[0] else None
    return grad_x, grad if ctx.needs_input_grad[1] else None, None, None, None, None
