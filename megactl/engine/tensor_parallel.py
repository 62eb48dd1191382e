"""Tensor parallelism (Shoeybi et al. 2019, section 3): each layer's matrices are divided over the ranks of the tp axis.

    column   W cut by outputs: y_i = x W_i^T. Forward needs nothing; backward sums the input gradient over ranks.
    row      W cut by inputs:  y = sum_i x_i W_i^T, then the bias once. Forward sums the output; backward needs nothing.
    vocab    embedding and head cut by vocabulary rows; the cross entropy works on shards and never gathers logits.

A block is column, (heads, GELU or SwiGLU on the shard), row: one all-reduce forward and one backward. The backward one runs while
the weight gradient is computed. With sequence parallelism the two are a gather before and a reduce-scatter behind
(`sequence_parallel.py`), and x and y in the shapes below are this rank's tokens, [1, b s / tp, .].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import Function

from megactl.engine import functional, functional_llama
from megactl.engine.collectives import all_reduce
from megactl.engine.mesh import Axis
from megactl.engine.models.layers import CoreAttention, Linear, MicroBatch, VocabEmbedding, VocabHead
from megactl.engine.sequence_parallel import RankTokens, rank_form, scatter_sum


class _SumForward(Function):
    """Sum over ranks forward; backward passes the gradient, which is the same on every rank."""

    @staticmethod
    def forward(ctx, x, group):
        all_reduce(x, group)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def sum_forward(x: Tensor, tp: Axis) -> Tensor:
    """Sum of `x` over the ranks, in place; its gradient is the same on every rank."""
    return _SumForward.apply(x, tp.group)


def _shard(parameter: nn.Parameter, dim: int, size: int) -> nn.Parameter:
    shape = list(parameter.shape)
    shape[dim] //= size
    return nn.Parameter(torch.empty(shape, device=parameter.device, dtype=parameter.dtype))


def _input_options(tp: Axis, sequence_parallel: bool, micro_batch: MicroBatch, start_reduce: functional.StartReduce) -> dict[str, object]:
    """How a product gets its input and gives the gradient of it back: keyword arguments of the linear functions."""
    return {"gather": RankTokens.of(micro_batch, tp)} if sequence_parallel else {"start_reduce": start_reduce}


class ColumnParallelLinear(nn.Module):
    """This rank's outputs of a `Linear`."""

    def __init__(self, whole: Linear, tp: Axis, sequence_parallel: bool = False) -> None:
        super().__init__()
        self.tp, self.sequence_parallel, self.initial = tp, sequence_parallel, whole.initial
        # Of SwiGLU's [2, out, in] each rank takes the same outputs of both.
        outputs = whole.weight.ndim - 2
        self.weight = _shard(whole.weight, outputs, tp.size)
        self.bias = None if whole.bias is None else _shard(whole.bias, outputs, tp.size)
        self.split_dim = {"weight": outputs, "bias": outputs}

    def forward(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """x [b, s, in], the same on every rank, to [b, s, out / tp]."""
        return functional.linear(x, self.weight, self.bias, **self._input(micro_batch), **micro_batch.weight_options())

    def gelu(self, x: Tensor, micro_batch: MicroBatch, approximate: str) -> Tensor:
        """This rank's part of `Linear.gelu`."""
        options = self._input(micro_batch) | micro_batch.weight_options()
        if self.bias is None:
            return functional_llama.linear_plain_gelu(x, self.weight, approximate, **options)
        return functional.linear_gelu(x, self.weight, self.bias, approximate, **options)

    def _input(self, micro_batch: MicroBatch) -> dict[str, object]:
        return _input_options(self.tp, self.sequence_parallel, micro_batch, self._start_reduce)

    def swiglu(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """This rank's part of `Linear.swiglu`."""
        return functional_llama.linear_swiglu(x, self.weight, self.bias, **self._input(micro_batch), **micro_batch.weight_options())

    def _start_reduce(self, grad: Tensor) -> functional.Handle | None:
        return all_reduce(grad, self.tp.group, async_op=True)


class RowParallelLinear(nn.Module):
    """This rank's inputs of a `Linear`. The bias is whole on every rank and added once, after the sum."""

    def __init__(self, whole: Linear, tp: Axis, sequence_parallel: bool = False) -> None:
        super().__init__()
        self.tp, self.sequence_parallel, self.initial = tp, sequence_parallel, whole.initial
        self.weight, self.bias = _shard(whole.weight, 1, tp.size), whole.bias
        self.split_dim = {"weight": 1}

    def forward(self, x: Tensor, micro_batch: MicroBatch, *, unread: bool = False) -> Tensor:
        """x [b, s, in / tp] to [b, s, out], the same on every rank; `unread` (see `functional.linear`) spares the sum as well."""
        options = micro_batch.weight_options()
        if self.sequence_parallel:
            y = functional.linear(x, self.weight, scatter=RankTokens.of(micro_batch, self.tp), unread=unread, **options)
        else:
            y = functional.linear(x, self.weight, unread=unread, **options)
            y = y if unread else sum_forward(y, self.tp)
        return y if self.bias is None else functional.add_bias(y, self.bias, **options)


class VocabParallelEmbedding(nn.Module):
    """This rank's rows of a `VocabEmbedding`."""

    is_table = True

    def __init__(self, whole: VocabEmbedding, tp: Axis, sequence_parallel: bool = False) -> None:
        super().__init__()
        self.tp, self.sequence_parallel, self.initial = tp, sequence_parallel, whole.initial
        self.add_to_head, self.vocab_size = whole.add_to_head, whole.vocab_size
        self.weight = _shard(whole.weight, 0, tp.size)
        self.first_row = tp.rank * self.weight.shape[0]
        self.split_dim = {"weight": 0}

    def forward(self, tokens: Tensor, micro_batch: MicroBatch) -> Tensor:
        """tokens [b, s] to [b, s, h]: each id is held by one rank, the others add zeros."""
        y = functional.embedding(tokens, self.weight, first_row=self.first_row, **micro_batch.weight_options(self.add_to_head))
        return scatter_sum(y, RankTokens.of(micro_batch, self.tp)) if self.sequence_parallel else sum_forward(y, self.tp)


class _VocabReduce:
    """Reductions of the cross entropy over the tp axis."""

    def __init__(self, tp: Axis) -> None:
        self.tp = tp

    def maximum(self, tensor: Tensor) -> None:
        all_reduce(tensor, self.tp.group, maximum=True)

    def sum(self, tensor: Tensor) -> None:
        all_reduce(tensor, self.tp.group)


class VocabParallelHead(nn.Module):
    """This rank's columns of the logits, and the cross entropy over them."""

    def __init__(self, whole: VocabHead, weight: nn.Parameter, tp: Axis, sequence_parallel: bool = False) -> None:
        super().__init__()
        self.tp, self.sequence_parallel, self.initial = tp, sequence_parallel, whole.initial
        self.weight, self.vocab_size = weight, whole.vocab_size
        self.bias = None if whole.bias is None else _shard(whole.bias, 0, tp.size)
        self.first_row = tp.rank * weight.shape[0]
        self.num_rows = max(0, min(weight.shape[0], whole.vocab_size - self.first_row))
        self.split_dim = {"weight": 0, "bias": 0}

    def forward(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """x [b, s, h] to this rank's logits [b, s, rows / tp]."""
        shared = _input_options(self.tp, self.sequence_parallel, micro_batch, self._start_reduce)
        return functional.linear(x, self.weight, self.bias, **shared, **micro_batch.weight_options())

    def _start_reduce(self, grad: Tensor) -> functional.Handle | None:
        return all_reduce(grad, self.tp.group, async_op=True)

    def loss_sum(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Sum of the masked cross entropies over the whole vocabulary, the same on every rank."""
        overwrite = functional.in_training_buffers(self.weight)
        rows = {"first_row": self.first_row, "num_rows": self.num_rows}
        return functional.cross_entropy_sum(logits, labels, mask, **rows, reduce=_VocabReduce(self.tp), overwrite=overwrite)


def apply_tensor_parallel(model: nn.Module, tp: Axis, *, sequence_parallel: bool = False) -> None:
    """Replace each module that names a `split` by this rank's shard of it. The weights are not read: they get their values later.

    sequence_parallel: and each module that has to know which tokens it works on by one for this rank's.
    """
    if tp.size == 1:
        return
    sharded: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, CoreAttention):
            module.first_head = tp.rank * (module.num_heads // tp.size)
            continue
        replacement = _parallel_form(module, tp, sharded, sequence_parallel)
        if replacement is None and sequence_parallel:
            replacement = rank_form(module, tp)
        if replacement is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, replacement)


def _parallel_form(module: nn.Module, tp: Axis, sharded: dict[int, nn.Parameter], sequence_parallel: bool) -> nn.Module | None:
    """`sharded` maps a whole vocabulary weight to its shard, so that a tied head keeps sharing it."""
    if isinstance(module, Linear) and module.split is not None:
        return {"column": ColumnParallelLinear, "row": RowParallelLinear}[module.split](module, tp, sequence_parallel)
    if isinstance(module, VocabEmbedding):
        made = VocabParallelEmbedding(module, tp, sequence_parallel)
        sharded[id(module.weight)] = made.weight
        return made
    if isinstance(module, VocabHead):
        tied = sharded.get(id(module.weight))
        return VocabParallelHead(module, _shard(module.weight, 0, tp.size) if tied is None else tied, tp, sequence_parallel)
    return None
