"""One AdamW step over a flat segment, or over many tensors at once, in one pass over memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from megactl.engine.ops.library import use_compiled
from megactl.engine.ops.reference import adamw as reference


@torch.no_grad()
def adamw_(
    param: Tensor,
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: Tensor,
    skip: Tensor,
) -> None:
    """Update `master`, `exp_avg` and `exp_avg_sq` in place and write the rounded master to `param`.

    All are contiguous and have one number of elements; master, grad and the averages are float32 or float64. `param` is `master`
    itself (nothing is copied) or a bfloat16 or float16 tensor (float32, too, beside a float64 master).
    lr, step (that of this update: 1 at the first), grad_scale (multiplied onto grad) and skip (not 0: nothing is touched) are 0-d
    tensors of the master's dtype on its device, so the host never waits for them. Constants of the step are computed in float64.
    Source: Loshchilov and Hutter, ICLR 2019; equal to torch.optim.AdamW up to rounding. Raises ValueError for tensors that do not fit.
    """
    _check(param, master, (grad, exp_avg, exp_avg_sq), (lr, step, grad_scale, skip))
    low = None if param is master else param
    tensors = (master, low, grad, exp_avg, exp_avg_sq, lr, step, grad_scale, skip)
    function = torch.ops.megactl.adamw_ if use_compiled() else reference.adamw_
    function(*tensors, beta1, beta2, eps, weight_decay)


@torch.no_grad()
def adamw_many_(
    params: Sequence[Tensor],
    masters: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | Sequence[float],
    grad_scale: Tensor,
    skip: Tensor,
) -> None:
    """`adamw_` for each i of params[i], masters[i], ..., bit for bit, in one pass over all.

    weight_decay is one number, or one a tensor. All masters have one dtype; copies may differ, and some params may be their masters.
    On CUDA a launch serves up to 256 tensors whose params have one dtype; on the CPU threads share the elements of all.
    Raises ValueError for tensors that do not fit.
    """
    lists = (params, masters, grads, exp_avgs, exp_avg_sqs)
    decays = [weight_decay] * len(masters) if isinstance(weight_decay, (int, float)) else list(weight_decay)
    if len({len(each) for each in (*lists, decays)}) != 1:
        raise ValueError(f"lists of {[len(each) for each in lists]} tensors and {len(decays)} weight decays: must have one length")
    scalars = (lr, step, grad_scale, skip)
    groups: dict[torch.dtype | None, list[int]] = defaultdict(list)
    for i, (param, master, *twins) in enumerate(zip(*lists, strict=True)):
        _check(param, master, tuple(twins), scalars)
        groups[None if param is master else param.dtype].append(i)
    function = torch.ops.megactl.adamw_many_ if use_compiled() else reference.adamw_many_
    for dtype, group in groups.items():
        chosen = [[each[i] for i in group] for each in lists[1:]]
        lows = [] if dtype is None else [params[i] for i in group]
        function(chosen[0], lows, *chosen[1:], *scalars, beta1, beta2, eps, [float(decays[i]) for i in group])


def _check(param: Tensor, master: Tensor, twins: tuple[Tensor, ...], scalars: tuple[Tensor, ...]) -> None:
    dtype, device, n = master.dtype, master.device, master.numel()
    if dtype not in (torch.float32, torch.float64) or not master.is_contiguous():
        raise ValueError(f"master is {dtype}{'' if master.is_contiguous() else ', not contiguous'}: must be contiguous float32 or float64")
    if any(t.dtype != dtype or t.device != device or t.numel() != n or not t.is_contiguous() for t in twins):
        shapes = [(t.dtype, t.numel(), str(t.device)) for t in twins]
        raise ValueError(f"grad, exp_avg, exp_avg_sq are {shapes}: must be contiguous and like the master, {(dtype, n, str(device))}")
    if any(t.dtype != dtype or t.device != device or t.dim() != 0 for t in scalars):
        kinds = [(t.dtype, list(t.shape), str(t.device)) for t in scalars]
        raise ValueError(f"lr, step, grad_scale, skip are {kinds}: must be 0-d {dtype} tensors on {device}")
    if param is not master:
        narrower = param.dtype in (torch.bfloat16, torch.float16) or (param.dtype == torch.float32 and dtype == torch.float64)
        if not narrower or param.device != device or param.numel() != n or not param.is_contiguous():
            looks = f"{param.dtype} [{param.numel()}] on {param.device}"
            raise ValueError(f"param is {looks}: must be the master itself or a contiguous narrower copy of its size")


def register() -> None:
    """Tell torch that the operators return nothing."""
    for name in ("adamw_", "adamw_many_"):
        torch.library.register_fake(f"megactl::{name}", lambda *arguments: None)
