"""The collectives the engine uses, under names that hold for every supported torch.

torch 2.13 renamed reduce_scatter_tensor and all_gather_into_tensor to *_single and warns on the old names; 2.11 has only the old.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Group = dist.ProcessGroup


def all_reduce(tensor: Tensor, group: Group | None, *, maximum: bool = False, async_op: bool = False) -> dist.Work | None:
    """Reduce in place over `group` (None: the whole world); returns the work when asynchronous."""
    return dist.all_reduce(tensor, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM, group=group, async_op=async_op)


def reduce_scatter(output: Tensor, tensor: Tensor, group: Group, *, async_op: bool = False) -> dist.Work | None:
    """Sum `tensor` [n * size] over `group` and keep this rank's slice in `output` [n]."""
    return _reduce_scatter(output, tensor, group=group, async_op=async_op)


def all_gather(output: Tensor, tensor: Tensor, group: Group, *, async_op: bool = False) -> dist.Work | None:
    """Concatenate each rank's `tensor` [n] into `output` [n * size]; `tensor` may be this rank's slice of `output`."""
    return _all_gather(output, tensor, group=group, async_op=async_op)


def all_to_all(output: Tensor, tensor: Tensor, group: Group) -> Tensor:
    """Send the i-th of equal pieces of `tensor` along dimension 0 to rank i; `output`, of the same shape, gets theirs in rank order."""
    dist.all_to_all_single(output, tensor, group=group)
    return output


def exchange(sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]], group: Group | None) -> tuple[list, list]:
    """Post sends and receives (tensor, global rank) as one batch; returns (send works, receive works).

    One batch because a blocking send on each of two neighbours waits for the other for ever. NCCL returns a single work for
    a batch, which then stands for both lists.
    """
    operations = [dist.P2POp(dist.isend, tensor, peer, group) for tensor, peer in sends]
    operations += [dist.P2POp(dist.irecv, tensor, peer, group) for tensor, peer in receives]
    works = dist.batch_isend_irecv(operations)
    if len(works) == len(operations):
        return works[: len(sends)], works[len(sends) :]
    return works, works
