"""Tiled linear layers (DeepSpeed's memory-centric tiling): each matrix of a layer as N smaller ones, run one after another.

    column   W cut by outputs: the outputs of the tiles stand beside each other, each with its own bias and activation
    row      W cut by inputs:  the outputs of the tiles are added, then the bias once

With ZeRO 3 a tile is a unit of its own, so that no more than one tile (and what is prefetched) is gathered at a time. A tile is a
rectangle of the whole matrix, by whose name it is known: initial values and checkpoints are those of one linear. Tiling comes after
tensor parallelism and divides a rank's shard. Under sequence parallelism all tiles of a matrix share one gather of their tokens and
one reduce-scatter, as the matrix would have done.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import Function

from megactl.engine import functional, functional_llama
from megactl.engine.collectives import all_reduce
from megactl.engine.mesh import Axis
from megactl.engine.models.layers import Linear, MicroBatch
from megactl.engine.models.transformer import Block
from megactl.engine.sequence_parallel import RankTokens, TogetherTokens, scatter_sum
from megactl.engine.tensor_parallel import ColumnParallelLinear, RowParallelLinear, sum_forward


class Tile(Linear):
    """Tile `index` of `count` of a matrix, cut in dimension `dim`: a linear of its own without any communication.

    `split_dim` is that of the whole: a tile lies within the tensor-parallel shard.
    """

    # The methods that run it.
    RUNS = ("forward", "gelu", "swiglu")

    def __init__(self, whole: nn.Module, index: int, count: int, dim: int) -> None:
        nn.Module.__init__(self)
        self.index, self.count, self.initial = index, count, whole.initial
        by_outputs = dim < whole.weight.ndim - 1
        self.tile_dim = {"weight": dim} | ({"bias": dim} if by_outputs else {})
        self.split_dim = getattr(whole, "split_dim", {})
        self.weight = _part(whole.weight, dim, count)
        self.bias = _part(whole.bias, dim, count) if by_outputs and whole.bias is not None else None

    def forward(self, x: Tensor, micro_batch: MicroBatch, *, unread: bool = False, gather: functional.TokenShards | None = None) -> Tensor:
        """See `Linear.forward`; `gather` as in `functional.linear`."""
        return functional.linear(x, self.weight, self.bias, unread=unread, gather=gather, **micro_batch.weight_options())

    def gelu(self, x: Tensor, micro_batch: MicroBatch, approximate: str, *, gather: functional.TokenShards | None = None) -> Tensor:
        """See `Linear.gelu`."""
        options = micro_batch.weight_options()
        if self.bias is None:
            return functional_llama.linear_plain_gelu(x, self.weight, approximate, gather=gather, **options)
        return functional.linear_gelu(x, self.weight, self.bias, approximate, gather=gather, **options)

    def swiglu(self, x: Tensor, micro_batch: MicroBatch, *, gather: functional.TokenShards | None = None) -> Tensor:
        """See `Linear.swiglu`."""
        return functional_llama.linear_swiglu(x, self.weight, self.bias, gather=gather, **micro_batch.weight_options())


def _part(whole: nn.Parameter, dim: int, count: int) -> nn.Parameter:
    shape = [size // count if axis == dim else size for axis, size in enumerate(whole.shape)]
    return nn.Parameter(torch.empty(shape, device=whole.device))


class TiledColumn(nn.Module):
    """A `Linear` cut by outputs, whole or this rank's shard."""

    def __init__(self, whole: nn.Module, count: int) -> None:
        super().__init__()
        self.tp: Axis | None = getattr(whole, "tp", None)
        self.sequence_parallel = getattr(whole, "sequence_parallel", False)
        # Of SwiGLU's [2, out, in] each tile takes the same outputs of both.
        outputs = whole.weight.ndim - 2
        self.tiles = nn.ModuleList(Tile(whole, index, count, outputs) for index in range(count))

    def forward(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """x [b, s, in] to [b, s, out], or this rank's outputs."""
        x, gather = self._entered(x, micro_batch)
        return torch.cat([tile(x, micro_batch, gather=gather) for tile in self.tiles], -1)

    def gelu(self, x: Tensor, micro_batch: MicroBatch, approximate: str) -> Tensor:
        """GELU of `forward`."""
        x, gather = self._entered(x, micro_batch)
        return torch.cat([tile.gelu(x, micro_batch, approximate, gather=gather) for tile in self.tiles], -1)

    def swiglu(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """`Linear.swiglu`, some of its outputs in each tile."""
        x, gather = self._entered(x, micro_batch)
        return torch.cat([tile.swiglu(x, micro_batch, gather=gather) for tile in self.tiles], -1)

    def _entered(self, x: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, functional.TokenShards | None]:
        """(what the tiles read, how they gather it)."""
        if self.tp is None:
            return x, None
        if self.sequence_parallel:
            return x, TogetherTokens(RankTokens.of(micro_batch, self.tp), len(self.tiles))
        return _SumBackward.apply(x, self.tp.group), None


class TiledRow(nn.Module):
    """A `Linear` cut by inputs, whole or this rank's shard."""

    def __init__(self, whole: nn.Module, count: int) -> None:
        super().__init__()
        self.tp: Axis | None = getattr(whole, "tp", None)
        self.sequence_parallel = getattr(whole, "sequence_parallel", False)
        self.initial, self.bias = whole.initial, whole.bias
        self.tiles = nn.ModuleList(Tile(whole, index, count, 1) for index in range(count))

    def forward(self, x: Tensor, micro_batch: MicroBatch, *, unread: bool = False) -> Tensor:
        """x [b, s, in], or this rank's inputs, to [b, s, out]; `unread`: see `functional.linear`."""
        # split, not slices: its backward puts the gradients side by side in one copy.
        parts = torch.split(x, x.shape[-1] // len(self.tiles), -1)
        y = self.tiles[0](parts[0], micro_batch, unread=unread)
        for tile, part in zip(self.tiles[1:], parts[1:], strict=True):
            y = y + tile(part, micro_batch, unread=unread)
        if self.sequence_parallel:
            y = scatter_sum(y, RankTokens.of(micro_batch, self.tp), unread=unread)
        elif self.tp is not None and not unread:
            y = sum_forward(y, self.tp)
        return y if self.bias is None else functional.add_bias(y, self.bias, **micro_batch.weight_options())


class _SumBackward(Function):
    """Sum of the gradient over ranks, once for all tiles; forward passes what is the same on every rank."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx, grad):
        # Of at least two tiles the gradients have been added up, so nobody else holds this sum.
        all_reduce(grad, ctx.group)
        return grad, None


def apply_tiles(model: nn.Module, count: int) -> None:
    """Replace each matrix of the layers of `model` by `count` tiles. The weights are not read: they get their values later."""
    if count == 1:
        return
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        for name, module in list(block.named_modules()):
            form = _tiled_form(module)
            if form is not None:
                parent, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf, form(module, count))


def _tiled_form(module: nn.Module) -> type[TiledColumn] | type[TiledRow] | None:
    if isinstance(module, ColumnParallelLinear) or getattr(module, "split", None) == "column":
        return TiledColumn
    return TiledRow if isinstance(module, RowParallelLinear) or getattr(module, "split", None) == "row" else None
