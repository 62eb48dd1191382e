"""Ring attention (Liu et al. 2023, arXiv:2310.01889): keys and values travel around the cp axis, queries stay.

Each rank computes the attention of its queries to the keys at hand while these are on their way to the next rank and the next ones
arrive; after cp steps it has seen all of them. Partial results are merged by log-sum-exp (block_attention.py), so nothing of the size
of the whole sequence is ever made, and nothing of another rank is kept: in backward keys and values travel once more, and the
gradients of each block of them travel with it, one step behind, until they are home.

Under a causal mask rank r holds chunks r and 2 cp - 1 - r of 2 cp. Of the keys of rank j its queries then see

    j = r   what is causal among its own tokens, which are in order
    j < r   the first chunk, from both of its own
    j > r   both chunks, from its second one

which is half of a block in each step but the first, on every rank alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import Function

from megactl.engine import block_attention, ops
from megactl.engine.block_attention import Kernel, Rule
from megactl.engine.collectives import exchange
from megactl.engine.mesh import Axis
from megactl.engine.models.layers import CoreAttention, MicroBatch


def chunks_of(rank: int, size: int, *, zigzag: bool) -> tuple[int, ...]:
    """The chunks of a sequence that a rank of the cp axis holds: of 2 x size under zigzag, else of `size`."""
    return (rank, 2 * size - 1 - rank) if zigzag else (rank,)


@dataclass(frozen=True)
class Block:
    """Which of the local queries meet which of a rank's keys: slices of their positions, and the rule among them."""

    queries: slice
    keys: slice
    rule: Rule


class Blocks:
    """The blocks of one call, by the rank whose keys they are. All ranks hold `length` tokens each."""

    def __init__(self, core: CoreAttention, cp: Axis, length: int, micro_batch: MicroBatch) -> None:
        self.core, self.cp, self.length, self.micro_batch = core, cp, length, micro_batch
        self.dropout = core.dropout if micro_batch.dropout else 0.0
        # Dropout inside the fused kernels draws from torch's own generator, which no other layout can repeat.
        self.fused = core.implementation == "sdpa" or (core.implementation == "auto" and self.dropout == 0.0)

    def of(self, source: int) -> Block:
        """The block of the keys of rank `source`."""
        rank, half = self.cp.rank, self.length // 2
        queries = keys = slice(0, self.length)
        if self.core.causal and source < rank:
            keys = slice(0, half)
        elif self.core.causal and source > rank:
            queries = slice(half, self.length)
        causal, mask = self.core.causal and source == rank, self._mask(source, queries, keys)
        if mask is not None and causal:
            causal, mask = False, mask & torch.ones(self.length, self.length, dtype=torch.bool, device=mask.device).tril_()
        return Block(queries, keys, self._rule(source, queries, keys, causal, mask))

    def _rule(self, source: int, queries: slice, keys: slice, causal: bool, mask: Tensor | None) -> Rule:
        if not self.dropout:
            return Rule(causal, mask, plain=not self.fused)
        # No fused kernel of a CPU drops.
        if self.fused and self.micro_batch.rng.is_cuda:
            return Rule(causal, mask, fused_dropout=self.dropout)
        return Rule(causal, mask, self._drop(source, queries, keys), plain=True)

    def _mask(self, source: int, queries: slice, keys: slice) -> Tensor | None:
        """Documents and padding, cut out of what is known of the whole sequence: bool [b, 1, queries or 1, keys]."""
        segments, padding = self.micro_batch.segments, self.micro_batch.attention_mask
        mask = None
        if segments is not None:
            own, other = self._held(segments, self.cp.rank)[:, queries], self._held(segments, source)[:, keys]
            mask = own[:, None, :, None] == other[:, None, None, :]
        if padding is not None:
            held = self._held(padding, source)[..., keys]
            mask = held if mask is None else mask & held
        return mask

    def _held(self, whole: Tensor, rank: int) -> Tensor:
        """The part of [..., s] that a rank holds."""
        chunks = chunks_of(rank, self.cp.size, zigzag=self.core.causal)
        size = self.length // len(chunks)
        return torch.cat([whole[..., chunk * size : (chunk + 1) * size] for chunk in chunks], -1)

    def _drop(self, source: int, queries: slice, keys: slice) -> Callable[[Tensor], Tensor]:
        """Dropout of a block of probabilities. Its rows are chunks of keys: a row of scores of the whole is all chunks of one query."""
        chunks = chunks_of(source, self.cp.size, zigzag=self.core.causal)
        size, core, micro_batch = self.length // len(chunks), self.core, self.micro_batch
        held = torch.arange(keys.start // size, keys.stop // size, device=micro_batch.rng.device)
        # Ranks hold chunks r and 2 cp - 1 - r, so the step from the first to the second says which they are; no copy from the host.
        ids = chunks[0] + held * (chunks[-1] - chunks[0])

        def drop(probabilities: Tensor) -> Tensor:
            b, n, s, _ = probabilities.shape
            rows = score_rows(micro_batch.rows[:, queries], n, core, self.length * self.cp.size)
            rows = rows.unsqueeze(-1) * (self.length * self.cp.size // size) + ids
            cut = probabilities.view(b, n, s, -1, size)
            return ops.dropout_add_rows(cut, None, self.dropout, micro_batch.rng, core.site, rows).view_as(probabilities)

        return drop


def score_rows(rows: Tensor, heads: int, core: CoreAttention, seq_length: int) -> Tensor:
    """Rows of the whole [samples, all heads, s] of scores, int64 [b, heads, s'], from `rows` [b, s'] of the whole [samples, s].

    `heads` are at hand, from `core.first_head` on.
    """
    sample, query = rows // seq_length, rows % seq_length
    head = core.first_head + torch.arange(heads, device=rows.device)
    return (sample[:, None] * core.num_heads + head[:, None]) * seq_length + query[:, None]


class RingAttention(nn.Module):
    """`CoreAttention` whose keys and values are spread over the cp axis."""

    def __init__(self, core: CoreAttention, cp: Axis) -> None:
        super().__init__()
        self.core, self.cp = core, cp

    def forward(self, q: Tensor, k: Tensor, v: Tensor, micro_batch: MicroBatch) -> Tensor:
        """q [b, n, s / cp, d], k and v with as many heads or a divisor of them, to [b, n, s / cp, d]."""
        blocks = Blocks(self.core, self.cp, q.shape[2], micro_batch)
        return _Ring.apply(q, k, v, blocks)


class _Ring(Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
        cp, scale = blocks.cp, blocks.core.scale
        kernels: list[Kernel] = []
        # One buffer, so that each step is one message.
        held = torch.stack([k, v])
        out = lse = None
        for step in range(cp.size):
            passing = _Passing([held] if step + 1 < cp.size else [], cp)
            block = blocks.of((cp.rank - step) % cp.size)
            part, part_lse, kernel = block_attention.forward(q[:, :, block.queries], *_keys(held, block, q), scale, block.rule)
            kernels.append(kernel)
            if out is None:
                out, lse = part.to(lse_dtype := block_attention.accumulation(q.dtype)), part_lse.to(lse_dtype)
            else:
                block_attention.merge_(out[:, :, block.queries], lse[:, :, block.queries], part, part_lse)
            held = passing.arrived()[0] if step + 1 < cp.size else held
        # Laid out as the next matrix reads it, [b, s, n, d]: no copy there, and one tensor kept for both.
        result = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2).copy_(out)
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.blocks, ctx.kernels = blocks, kernels
        return result

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        blocks, cp = ctx.blocks, ctx.blocks.cp
        held, grads, grad_q = torch.stack([k, v]), None, None
        for step in range(cp.size):
            more = step + 1 < cp.size
            passing = _Passing(([held] if more else []) + ([] if grads is None else [grads]), cp)
            block = blocks.of((cp.rank - step) % cp.size)
            rows = block.queries
            part_q, *part_kv = block_attention.backward(
                grad[:, :, rows], q[:, :, rows], *_keys(held, block, q), out[:, :, rows], lse[:, :, rows], blocks.core.scale, block.rule,
                ctx.kernels[step],
            )  # fmt: skip
            part_kv = [_summed_groups(part, k.shape[1]) for part in part_kv]
            arrived = passing.arrived()
            if step == 0:
                # All queries and all keys of this rank.
                grad_q, grads = part_q.to(lse.dtype), torch.stack(part_kv).to(lse.dtype)
            else:
                grad_q[:, :, rows] += part_q
                # What others have added to this block's gradients comes from the rank before, one step behind the block itself.
                grads = arrived[-1]
                for total, part in zip(grads, part_kv, strict=True):
                    total[:, :, block.keys] += part
            held = arrived[0] if more else held
        grad_k, grad_v = send_home(grads, cp).to(k.dtype)
        return grad_q.to(q.dtype), grad_k, grad_v, None


def _keys(held: Tensor, block: Block, q: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the block, with a head for each of q: those that serve a group of queries are repeated."""
    k, v = held[:, :, :, block.keys]
    groups = q.shape[1] // k.shape[1]
    return (k, v) if groups == 1 else (repeat_heads(k, groups), repeat_heads(v, groups))


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """[b, n, s, d] to [b, n x times, s, d], the copies of a head beside each other."""
    return x.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)


def _summed_groups(grad: Tensor, heads: int) -> Tensor:
    """Gradient of repeated heads [b, n, s, d] to that of the `heads` they were repeated from."""
    return grad if grad.shape[1] == heads else grad.unflatten(1, (heads, -1)).sum(2)


def send_home(gradients: Tensor, cp: Axis) -> Tensor:
    """The last hop of the gradients of keys and values: each rank held those of the next one's; returns its own."""
    return _Passing([gradients], cp).arrived()[0]


class _Passing:
    """Tensors on their way to the next rank of the axis, and the same of the rank before on their way here."""

    def __init__(self, tensors: list[Tensor], cp: Axis) -> None:
        self._sent, self._received, self._works = tensors, [torch.empty_like(tensor) for tensor in tensors], []
        after, before = cp.ranks[(cp.rank + 1) % cp.size], cp.ranks[(cp.rank - 1) % cp.size]
        if tensors:
            sends, receives = exchange(
                [(tensor, after) for tensor in tensors], [(tensor, before) for tensor in self._received], cp.group
            )  # fmt: skip
            self._works = sends if sends is receives else [*sends, *receives]

    def arrived(self) -> list[Tensor]:
        """What arrived; what was sent may be written to from now on."""
        for work in self._works:
            work.wait()
        return self._received
