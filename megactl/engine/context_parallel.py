"""Context parallelism: each rank of the cp axis holds seq / cp tokens of every sequence. Only attention needs the others.

    ring         keys and values travel around while queries stay (Liu et al. 2023, arXiv:2310.01889): ring_attention.py
    all-to-all   before attention tokens are traded for heads, and back after it (DeepSpeed-Ulysses, arXiv:2309.14509)

Which tokens: ranks in order hold one piece each, except under a causal ring. There the first ranks would have next to nothing to do, so
a sequence is cut into 2 cp chunks, and rank r holds chunks r and 2 cp - 1 - r (Brandon et al. 2023, arXiv:2311.09431; the cut is
Megatron-LM's): every rank then computes the same number of scores in every step of the ring.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import Function

from megactl.config.schema import Run
from megactl.engine.collectives import all_to_all
from megactl.engine.data.batch import Batch
from megactl.engine.mesh import Axis, Mesh
from megactl.engine.models import MODELS
from megactl.engine.models.layers import IGNORED_LABEL, CoreAttention, MicroBatch
from megactl.engine.ring_attention import RingAttention, chunks_of, repeat_heads


@dataclass(frozen=True)
class SequenceShard:
    """The part of every sequence that this rank holds: `positions` int64 [s / cp] of `seq_length`, ascending. ring: the method."""

    positions: Tensor
    seq_length: int
    rank: int
    ring: bool

    @staticmethod
    def of(run: Run, mesh: Mesh) -> SequenceShard | None:
        """This rank's part, None where it holds whole sequences. `run` is resolved."""
        cp, length = mesh.cp, run.training.seq_length
        if cp.size == 1:
            return None
        ring = run.parallel.context_method == "ring"
        chunks = chunks_of(cp.rank, cp.size, zigzag=ring and MODELS[run.model.architecture].causal)
        size = length // (cp.size * len(chunks))
        pieces = [torch.arange(chunk * size, (chunk + 1) * size) for chunk in chunks]
        return SequenceShard(torch.cat(pieces).to(mesh.device), length, cp.rank, ring)

    def cut(self, batch: Batch, first_sample: Tensor) -> Batch:
        """This rank's tokens of a micro-batch on the device; what says who sees whom stays whole.

        first_sample: 0-d int64 on the device, the index of the first sequence within the global batch. A sequence's label stays with
        the rank that holds its first token.
        """
        sequences = torch.arange(len(batch.tokens), device=self.positions.device)
        rows = (first_sample + sequences)[:, None] * self.seq_length + self.positions
        labels = batch.sentence_labels
        if labels is not None and self.rank > 0:
            labels = torch.full_like(labels, IGNORED_LABEL)
        return batch._replace(
            tokens=self._take(batch.tokens), labels=self._take(batch.labels), loss_mask=self._take(batch.loss_mask),
            position_ids=self._take(batch.position_ids), token_types=self._take(batch.token_types), sentence_labels=labels, rows=rows,
            segments=None if self.ring else batch.segments, block_segments=batch.segments if self.ring else None,
        )  # fmt: skip

    def _take(self, whole: Tensor | None) -> Tensor | None:
        return None if whole is None else whole.index_select(1, self.positions)


class _AllToAll(Function):
    """Piece j of dimension 0 goes to rank j, whose pieces arrive in rank order; the gradients go the same way back."""

    @staticmethod
    def forward(ctx, x: Tensor, cp: Axis) -> Tensor:
        ctx.cp = cp
        return all_to_all(torch.empty_like(x), x, cp.group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        return all_to_all(torch.empty_like(grad), grad, ctx.cp.group), None


class AllToAllAttention(nn.Module):
    """`CoreAttention` on all tokens of a cp-th of the heads at hand."""

    def __init__(self, core: CoreAttention, cp: Axis, heads_at_hand: int) -> None:
        super().__init__()
        self.core, self.cp = core, cp
        core.first_head += cp.rank * (heads_at_hand // cp.size)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, micro_batch: MicroBatch) -> Tensor:
        """q, k, v [b, n, s / cp, d] to [b, n, s / cp, d]. The mask of `micro_batch` is that of whole sequences."""
        k, v = (self._repeated(part) for part in (k, v))
        # q, k and v in one message: [cp, b, heads of one rank, s / cp, d].
        parts = [part.unflatten(1, (self.cp.size, -1)).movedim(1, 0) for part in (q, k, v)]
        arrived = _AllToAll.apply(torch.cat(parts, 2), self.cp)
        heads = [part.shape[2] for part in parts]
        # Tokens arrive in rank order, which is their order in the sequence.
        q, k, v = arrived.permute(1, 2, 0, 3, 4).flatten(2, 3).split(heads, 1)
        y = self.core(q, k, v, micro_batch)
        back = _AllToAll.apply(y.unflatten(2, (self.cp.size, -1)).movedim(2, 0).contiguous(), self.cp)
        return back.movedim(0, 1).flatten(1, 2)

    def _repeated(self, x: Tensor) -> Tensor:
        """Heads of keys or values, repeated for their groups of queries only as often as it takes for cp to divide them."""
        times = 1
        while x.shape[1] * times % self.cp.size:
            times += 1
        return x if times == 1 else repeat_heads(x, times)


def apply_context_parallel(model: nn.Module, mesh: Mesh, method: str) -> None:
    """Replace the core of each attention by one that works over the cp axis. Tensor parallelism must be applied before: it cuts heads."""
    if mesh.cp.size == 1:
        return
    for module in list(model.modules()):
        core = getattr(module, "core", None)
        if isinstance(core, CoreAttention):
            heads = core.num_heads // mesh.tp.size
            module.core = RingAttention(core, mesh.cp) if method == "ring" else AllToAllAttention(core, mesh.cp, heads)
