"""Sequence parallelism (Korthikanti et al. 2022, section 4.2.2): between the matrices each tensor-parallel rank holds 1/t of the tokens.

    column   the input is gathered: y_i = gather(x) W_i^T. Backward gathers it again and sums and shares out the input gradient.
    row      the output is summed and shared out, then the bias. Backward gathers its gradient.
    between  norms, dropout, residuals, positions and token types work on this rank's tokens alone.

An all-reduce is a reduce-scatter and an all-gather, so as many bytes travel as without, but for the second gather of each column
input, which backward hides behind the input gradient; what is kept for backward between the matrices is 1/t.

Hidden states are [1, b s / t, h]: rank r holds the rows from r b s / t on of the flattened [b s, h], wherever that cuts a sequence.
Cut along s, a gather would have to be transposed for b > 1; this way it is a plain concatenation, and b s alone must be divisible.

A parameter that every rank holds whole and applies to its tokens (norms, row biases, positions) has in each rank the gradient of
these tokens; `mark_partial_gradients` says which they are, and `GradientReducer` sums them over the ranks, once a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import Function

from megactl.engine import functional, ops
from megactl.engine.collectives import all_gather, all_reduce, reduce_scatter
from megactl.engine.mesh import Axis
from megactl.engine.models.layers import Dropout, FirstToken, MicroBatch, WholeEmbedding


def hidden_shape(tokens: torch.Size, hidden: int, ranks: int) -> tuple[int, int, int]:
    """Shape of hidden states between layers and between stages, of tokens [b, s] that `ranks` share (1: none): [1, b s / ranks, h]."""
    return (*tokens, hidden) if ranks == 1 else (1, tokens.numel() // ranks, hidden)


@dataclass(frozen=True)
class RankTokens:
    """This rank's share of the b s tokens of a micro-batch; a `functional.TokenShards`."""

    tp: Axis
    batch: int
    length: int

    @staticmethod
    def of(micro_batch: MicroBatch, tp: Axis) -> RankTokens:
        """The share that `tp` gives this rank."""
        return RankTokens(tp, *micro_batch.position_ids.shape)

    @property
    def count(self) -> int:
        """How many tokens, b s / t."""
        return self.batch * self.length // self.tp.size

    @property
    def shape(self) -> tuple[int, int]:
        """[1, b s / t], in place of [b, s]."""
        return 1, self.count

    @property
    def first(self) -> int:
        """Index of the first of them among the b s of the micro-batch."""
        return self.tp.rank * self.count

    def start_gather(self, x: Tensor) -> tuple[Tensor, functional.Handle]:
        """[1, count, n] to [b, s, n], there once the handle is waited for."""
        whole = x.new_empty(self.batch, self.length, x.shape[-1])
        return whole, all_gather(whole.view(-1), x.contiguous().view(-1), self.tp.group, async_op=True)

    def start_scatter(self, x: Tensor) -> tuple[Tensor, functional.Handle]:
        """[b, s, n], summed over the ranks, to this rank's [1, count, n], there once the handle is waited for."""
        own = x.new_empty(1, self.count, x.shape[-1])
        return own, reduce_scatter(own.view(-1), x.contiguous().view(-1), self.tp.group, async_op=True)

    def rows(self, table: Tensor) -> Tensor:
        """This rank's entries [1, count] of `table` [b, s]."""
        return table.reshape(1, -1)[:, self.first : self.first + self.count]

    def sequence_starts(self) -> tuple[slice, slice]:
        """The sequences whose first token this rank holds, and the places of those tokens among its own."""
        begin, end = (-(-row // self.length) for row in (self.first, self.first + self.count))
        return slice(begin, end), slice(begin * self.length - self.first, self.count, self.length)


class _ScatterSum(Function):
    """Sum over ranks, each keeping its tokens; backward gathers the gradients of all tokens."""

    @staticmethod
    def forward(ctx, x, tokens: RankTokens, unread: bool):
        ctx.tokens = tokens
        return x.new_zeros(()).expand(*tokens.shape, x.shape[-1]) if unread else functional.arrived(*tokens.start_scatter(x))

    @staticmethod
    def backward(ctx, grad):
        return functional.gathered(grad, ctx.tokens), None, None


def scatter_sum(x: Tensor, tokens: RankTokens, *, unread: bool = False) -> Tensor:
    """The sum over ranks of x [b, s, h], this rank's tokens of it: [1, b s / t, h]. unread: zeros, for its backward alone."""
    return _ScatterSum.apply(x, tokens, unread)


class TogetherTokens:
    """`RankTokens` of one input that `count` linears read one after another: they share one gather and one reduce-scatter.

    For one forward and its backward. Between first and last of the linears the tokens of all ranks are kept, and in backward the sum of
    the input gradients so far; the last one's input gradient is then that of all, and the others have none.
    """

    def __init__(self, tokens: RankTokens, count: int) -> None:
        self.tokens, self.count = tokens, count
        self._whole: Tensor | None = None
        self._handle: functional.Handle | None = None
        self._readers, self._sum, self._parts = 0, None, 0

    @property
    def shape(self) -> tuple[int, int]:
        """See `RankTokens.shape`."""
        return self.tokens.shape

    def start_gather(self, x: Tensor) -> tuple[Tensor, functional.Handle]:
        """See `RankTokens.start_gather`; x is the same `count` times."""
        if self._readers == 0:
            self._whole, self._handle = self.tokens.start_gather(x)
        whole, handle, self._readers = self._whole, self._handle, (self._readers + 1) % self.count
        if self._readers == 0:
            self._whole = self._handle = None
        return whole, handle

    def start_scatter(self, x: Tensor) -> tuple[Tensor | None, functional.Handle | None]:
        """See `RankTokens.start_scatter`: of the sum of `count` tensors with the last of them, nothing before."""
        self._sum, self._parts = (x if self._sum is None else self._sum.add_(x)), (self._parts + 1) % self.count
        if self._parts:
            return None, None
        whole, self._sum = self._sum, None
        return self.tokens.start_scatter(whole)


class RankDropout(Dropout):
    """`Dropout` on this rank's tokens: draws for each what one process draws for it."""

    def __init__(self, whole: Dropout, tp: Axis) -> None:
        super().__init__(whole.probability, whole.site)
        self.tp = tp

    def forward(self, x: Tensor, residual: Tensor | None, micro_batch: MicroBatch) -> Tensor:
        """residual + dropout(x), both [1, b s / t, h]."""
        if not self.drops(micro_batch):
            return super().forward(x, residual, micro_batch)
        tokens = RankTokens.of(micro_batch, self.tp)
        if micro_batch.rows is not None:
            own = tokens.rows(micro_batch.rows)
            return ops.dropout_add_rows(x, residual, self.probability, micro_batch.rng, self.site, own)
        place = {"outer_offset": tokens.first, "outer_size": tokens.length}
        return ops.dropout_add(x, residual, self.probability, micro_batch.rng, self.site, **place)


class RankEmbedding(nn.Module):
    """`WholeEmbedding` for this rank's tokens."""

    is_table = True

    def __init__(self, whole: WholeEmbedding, tp: Axis) -> None:
        super().__init__()
        self.tp, self.weight, self.initial = tp, whole.weight, whole.initial

    def forward(self, ids: Tensor, micro_batch: MicroBatch) -> Tensor:
        """ids [b, s] to [1, b s / t, h]."""
        return functional.embedding(RankTokens.of(micro_batch, self.tp).rows(ids), self.weight, **micro_batch.weight_options())


class _FirstTokens(Function):
    """The first token of each sequence, from the rank that holds it to all.

    All ranks make the same gradient of it, so each takes those of its own tokens and nothing is summed.
    """

    @staticmethod
    def forward(ctx, x, tokens: RankTokens):
        ctx.tokens = tokens
        sequences, places = tokens.sequence_starts()
        found = x.new_zeros(tokens.batch, x.shape[-1])
        found[sequences] = x[0, places]
        all_reduce(found, tokens.tp.group)
        return found

    @staticmethod
    def backward(ctx, grad):
        sequences, places = ctx.tokens.sequence_starts()
        grad_x = grad.new_zeros(1, ctx.tokens.count, grad.shape[-1])
        grad_x[0, places] = grad[sequences]
        return grad_x, None


class RankFirstToken(nn.Module):
    """`FirstToken` where each rank holds some of the tokens."""

    def __init__(self, tp: Axis) -> None:
        super().__init__()
        self.tp = tp

    def forward(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """x [1, b s / t, h] to [b, h], the same on every rank."""
        return _FirstTokens.apply(x, RankTokens.of(micro_batch, self.tp))


def rank_form(module: nn.Module, tp: Axis) -> nn.Module | None:
    """What stands in for a module without divided weights that has to know which tokens it is given; None where none is needed."""
    if isinstance(module, Dropout):
        return RankDropout(module, tp)
    if isinstance(module, WholeEmbedding):
        return RankEmbedding(module, tp)
    return RankFirstToken(tp) if isinstance(module, FirstToken) else None


def mark_partial_gradients(model: nn.Module) -> None:
    """Name on each module the parameters that are whole on every rank and see its tokens only: `partial_gradients`.

    After all modules have their final form, since a form that is replaced takes the names with it.
    """
    of_sequences = {id(inner) for module in model.modules() if getattr(module, "of_sequences", False) for inner in module.modules()}
    for module in model.modules():
        whole = {leaf for leaf, _ in module.named_parameters(recurse=False)} - set(getattr(module, "split_dim", {}))
        if whole and id(module) not in of_sequences:
            module.partial_gradients = frozenset(whole)
