"""Building blocks of the models: one device, architecture only.

Shape letters: b micro-batch, s sequence, h hidden, n heads, d head width, f MLP width.
A module says how its weights may be split over tensor-parallel ranks (`split`), what they start as (`initial`) and
whether weight decay applies; it never splits anything itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from megactl.engine import functional, ops


@dataclass(frozen=True)
class MicroBatch:
    """What one forward of one micro-batch needs besides activations.

    rng: int64 [3] on the device: seed, step, index of the first sample within the global batch. accumulate: whether
    backward adds to the gradient buffer (False in the first backward of a step). deferred: where weight gradients are put off to, when
    the schedule has backward in two parts. dropout: off in evaluation.
    position_ids [b, s]; attention_mask bool [b, 1, s or 1, s] (True: may look), or None where every token sees all that its model
    lets it see. token_types int64 [b, s], for encoders. unread: nobody reads the values that the layer gives, only its backward runs
    (the second forward of a recomputation): what backward does not read either need not be computed.
    """

    rng: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None = None
    accumulate: bool = False
    dropout: bool = True
    token_types: Tensor | None = None
    deferred: functional.WeightQueue | None = None
    unread: bool = False

    def weight_options(self, add: bool = False) -> functional.WeightOptions:
        """What every operation that owns weights is told about their gradients. `add`: even the first micro-batch adds to the buffer."""
        return {"accumulate": self.accumulate or add, "deferred": self.deferred}


@dataclass(frozen=True)
class Targets:
    """What a model's losses are computed against.

    labels int64 [b, s]; mask [b, s], 0 where a label does not count; sentence_labels int64 [b], for models with a sentence head.
    """

    labels: Tensor
    mask: Tensor
    sentence_labels: Tensor | None = None


@dataclass(frozen=True)
class Initial:
    """Starting value of a parameter: normal with this standard deviation, or the constant when std is 0."""

    std: float = 0.0
    constant: float = 0.0


Split = Literal["column", "row", "vocab"] | None

# The setting's word to torch's.
GELU = {"tanh": "tanh", "erf": "none"}


class Linear(nn.Module):
    """y = x W^T + b. split 'column' divides the outputs over ranks, 'row' the inputs; None: whole on every rank."""

    def __init__(self, in_features: int, out_features: int, *, split: Split, std: float) -> None:
        super().__init__()
        self.split = split
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.initial = {"weight": Initial(std=std), "bias": Initial()}

    def forward(self, x: Tensor, micro_batch: MicroBatch, *, unread: bool = False) -> Tensor:
        """x [b, s, in] to [b, s, out]; `unread`: see `functional.linear`."""
        return functional.linear(x, self.weight, self.bias, **micro_batch.weight_options(), unread=unread)

    def gelu(self, x: Tensor, micro_batch: MicroBatch, approximate: str) -> Tensor:
        """GELU of `forward`, with the bias added on the way; `approximate` is torch's word for its form."""
        return functional.linear_gelu(x, self.weight, self.bias, approximate, **micro_batch.weight_options())


class LayerNorm(nn.Module):
    """LayerNorm over h with weight and bias."""

    def __init__(self, hidden: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(hidden))
        self.bias = nn.Parameter(torch.empty(hidden))
        self.initial = {"weight": Initial(constant=1.0), "bias": Initial()}

    def forward(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """x [b, s, h] to [b, s, h]."""
        return functional.layer_norm(x, self.weight, self.bias, self.epsilon, **micro_batch.weight_options())

    def add(self, x: Tensor, residual: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual), each [b, s, h]."""
        return functional.add_layer_norm(x, residual, self.weight, self.bias, self.epsilon, **micro_batch.weight_options())


class VocabEmbedding(nn.Module):
    """Token ids to vectors. `rows` counts padding; `vocab_size` does not."""

    is_table = True
    split: Split = "vocab"

    def __init__(self, vocab_size: int, rows: int, hidden: int, std: float) -> None:
        super().__init__()
        self.vocab_size, self.add_to_head = vocab_size, False
        self.weight = nn.Parameter(torch.empty(rows, hidden))
        self.initial = {"weight": Initial(std=std)}

    def forward(self, tokens: Tensor, micro_batch: MicroBatch) -> Tensor:
        """tokens [b, s] to [b, s, h]."""
        # A weight shared with the head on this stage already holds the head's gradient when this backward runs.
        return functional.embedding(tokens, self.weight, **micro_batch.weight_options(self.add_to_head))


class WholeEmbedding(nn.Module):
    """Ids to learned vectors, of a table that every rank holds whole: positions, token types."""

    is_table = True

    def __init__(self, rows: int, hidden: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, hidden))
        self.initial = {"weight": Initial(std=std)}

    def forward(self, ids: Tensor, micro_batch: MicroBatch) -> Tensor:
        """ids [b, s] to [b, s, h]."""
        return functional.embedding(ids, self.weight, **micro_batch.weight_options())


class VocabHead(nn.Module):
    """Hidden states to logits over the padded vocabulary; `weight` is its own, or the embedding's when tied on one stage."""

    split: Split = "vocab"

    def __init__(self, vocab_size: int, weight: nn.Parameter, std: float, *, bias: bool = False) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.weight = weight
        self.bias = nn.Parameter(torch.empty(weight.shape[0])) if bias else None
        self.initial = {"weight": Initial(std=std), **({"bias": Initial()} if bias else {})}

    def forward(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """x [b, s, h] to logits [b, s, rows]."""
        return functional.linear(x, self.weight, self.bias, **micro_batch.weight_options())

    def loss_sum(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Sum of the masked cross entropies, 0-d. In a training step its backward writes over the logits."""
        overwrite = functional.in_training_buffers(self.weight)
        return functional.cross_entropy_sum(logits, labels, mask, num_rows=self.vocab_size, overwrite=overwrite)


class FirstToken(nn.Module):
    """The first token of each sequence; a module, so that it can be another where a rank has not all tokens."""

    def forward(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """x [b, s, h] to [b, h]."""
        return x[:, 0]


class Dropout(nn.Module):
    """Dropout added to a residual, drawn from (seed, step, element): `site` tells the dropouts of a model apart."""

    def __init__(self, probability: float, site: int) -> None:
        super().__init__()
        self.probability, self.site = probability, site

    def drops(self, micro_batch: MicroBatch) -> bool:
        """Whether anything is dropped."""
        return self.probability > 0.0 and micro_batch.dropout

    def forward(self, x: Tensor, residual: Tensor | None, micro_batch: MicroBatch) -> Tensor:
        """residual + dropout(x), both [b, s, h]."""
        if not self.drops(micro_batch):
            return x if residual is None else x + residual
        return ops.dropout_add(x, residual, self.probability, micro_batch.rng, self.site)


class CoreAttention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V on the heads at hand; holds no weights.

    `first_head` and `num_heads` place them among all heads, so that dropout draws the same numbers however heads are split.
    causal: a token sees those before it and itself; otherwise all. A mask of the micro-batch stands in place of that rule.
    """

    def __init__(self, num_heads: int, head_dim: int, dropout: float, implementation: str, site: int, causal: bool = True) -> None:
        super().__init__()
        self.num_heads, self.first_head = num_heads, 0
        self.scale, self.dropout, self.site = 1.0 / math.sqrt(head_dim), dropout, site
        self.implementation, self.causal = implementation, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, micro_batch: MicroBatch) -> Tensor:
        """q, k, v [b, n, s, d] to [b, n, s, d]."""
        dropout = self.dropout if micro_batch.dropout else 0.0
        # Dropout inside the fused kernels draws from torch's own generator, which no other layout can repeat.
        if self.implementation == "sdpa" or (self.implementation == "auto" and dropout == 0.0):
            mask = micro_batch.attention_mask
            return nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=self.causal and mask is None, scale=self.scale
            )
        return self._unfused(q, k, v, dropout, micro_batch)

    def _unfused(self, q: Tensor, k: Tensor, v: Tensor, dropout: float, micro_batch: MicroBatch) -> Tensor:
        mask = micro_batch.attention_mask
        # Scaled before the product, which in fp16 ends at 65504.
        scores = (q * self.scale) @ k.transpose(-1, -2)
        probabilities = ops.masked_softmax(scores, scale=1.0, mask=mask, causal=self.causal and mask is None)
        if dropout:
            probabilities = ops.dropout_add(
                probabilities, None, dropout, micro_batch.rng, self.site, outer_offset=self.first_head, outer_size=self.num_heads
            )
        return probabilities @ v


class Attention(nn.Module):
    """Multi-head self-attention. The rows of qkv are ordered head by head (q, k, v of head 0, then of head 1, ...)."""

    def __init__(
        self, hidden: int, num_heads: int, *,
        dropout: float, implementation: str, std: float, output_std: float, site: int, causal: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.head_dim = hidden // num_heads
        self.qkv = Linear(hidden, 3 * hidden, split="column", std=std)
        self.core = CoreAttention(num_heads, self.head_dim, dropout, implementation, site, causal)
        self.output = Linear(hidden, hidden, split="row", std=output_std)

    def forward(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """x [b, s, h] to [b, s, h], before dropout."""
        qkv = self.qkv(x, micro_batch)
        # Of the product, not of x: a linear that is divided over ranks may get x with the tokens divided over them.
        b, s, _ = qkv.shape
        q, k, v = (part.transpose(1, 2) for part in qkv.view(b, s, -1, 3, self.head_dim).unbind(3))  # heads at hand = columns / 3d
        y = self.core(q, k, v, micro_batch)
        return self.output(y.transpose(1, 2).reshape(b, s, -1), micro_batch)


class MLP(nn.Module):
    """h -> f -> GELU -> h."""

    def __init__(self, hidden: int, ffn: int, *, gelu: str, std: float, output_std: float) -> None:
        super().__init__()
        self.approximate = GELU[gelu]
        self.up = Linear(hidden, ffn, split="column", std=std)
        self.down = Linear(ffn, hidden, split="row", std=output_std)

    def forward(self, x: Tensor, micro_batch: MicroBatch, *, unread: bool = False) -> Tensor:
        """x [b, s, h] to [b, s, h], before dropout; `unread`: see `functional.linear`."""
        return self.down(self.up.gelu(x, micro_batch, self.approximate), micro_batch, unread=unread)
