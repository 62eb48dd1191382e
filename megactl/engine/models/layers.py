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

from megactl.config.schema import Model
from megactl.engine import functional, functional_llama, ops


@dataclass(frozen=True)
class MicroBatch:
    """What one forward of one micro-batch needs besides activations.

    rng: int64 [3] on the device: seed, step, index of the first sample within the global batch. accumulate: whether
    backward adds to the gradient buffer (False in the first backward of a step). deferred: where weight gradients are put off to, when
    the schedule has backward in two parts. dropout: off in evaluation.
    position_ids [b, s]; attention_mask bool [b, 1, s or 1, s] (True: may look), or None where every token sees all that its model
    lets it see. token_types int64 [b, s], for encoders. unread: nobody reads the values that the layer gives, only its backward runs
    (the second forward of a recomputation): what backward does not read either need not be computed. rotary: cosines and sines of the
    positions (`RotaryAngles`), which the model fills in before its layers.
    Where a rank holds some tokens of each sequence (s is their number then): rows int64 [b, s], the index of each within the
    [samples, sequence] of the global batch; segments, the document of every token of whole sequences, where attention makes its masks
    piece by piece.
    """

    rng: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None = None
    accumulate: bool = False
    dropout: bool = True
    token_types: Tensor | None = None
    deferred: functional.WeightQueue | None = None
    unread: bool = False
    rotary: tuple[Tensor, Tensor] | None = None
    rows: Tensor | None = None
    segments: Tensor | None = None

    def weight_options(self, add: bool = False) -> functional.WeightOptions:
        """What every operation that owns weights is told about their gradients. `add`: even the first micro-batch adds to the buffer."""
        return {"accumulate": self.accumulate or add, "deferred": self.deferred}


# A label that no loss counts: the default of torch's cross entropy.
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Targets:
    """What a model's losses are computed against.

    labels int64 [b, s]; mask [b, s], 0 where a label does not count; sentence_labels int64 [b], for models with a sentence head;
    IGNORED_LABEL where another rank counts it.
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
    """y = x W^T + b. split 'column' divides the outputs over ranks, 'row' the inputs; None: whole on every rank.

    gated: W [2, out, in] and b [2, out] are those of SwiGLU's gate and up, and `swiglu` takes the place of `forward`.
    """

    def __init__(self, in_features: int, out_features: int, *, split: Split, std: float, bias: bool = True, gated: bool = False) -> None:
        super().__init__()
        self.split, outputs = split, (2, out_features) if gated else (out_features,)
        self.weight = nn.Parameter(torch.empty(*outputs, in_features))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.initial = {"weight": Initial(std=std), "bias": Initial()}

    def forward(self, x: Tensor, micro_batch: MicroBatch, *, unread: bool = False) -> Tensor:
        """x [b, s, in] to [b, s, out]; `unread`: see `functional.linear`."""
        return functional.linear(x, self.weight, self.bias, **micro_batch.weight_options(), unread=unread)

    def gelu(self, x: Tensor, micro_batch: MicroBatch, approximate: str) -> Tensor:
        """GELU of `forward`, with the bias added on the way; `approximate` is torch's word for its form."""
        if self.bias is None:
            return functional_llama.linear_plain_gelu(x, self.weight, approximate, **micro_batch.weight_options())
        return functional.linear_gelu(x, self.weight, self.bias, approximate, **micro_batch.weight_options())

    def swiglu(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """x [b, s, in] to silu(gate) * up, [b, s, out], of a gated linear."""
        return functional_llama.linear_swiglu(x, self.weight, self.bias, **micro_batch.weight_options())


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


class RMSNorm(nn.Module):
    """RMSNorm over h with a weight: no mean is taken off, no bias added."""

    def __init__(self, hidden: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(hidden))
        self.initial = {"weight": Initial(constant=1.0)}

    def forward(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """x [b, s, h] to [b, s, h]."""
        return functional_llama.rms_norm(x, self.weight, self.epsilon, **micro_batch.weight_options())

    def add(self, x: Tensor, residual: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual), each [b, s, h]."""
        return functional_llama.add_rms_norm(x, residual, self.weight, self.epsilon, **micro_batch.weight_options())


Norm = LayerNorm | RMSNorm


def make_norm(config: Model) -> Norm:
    """The model's norm over h."""
    kind = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}[config.normalization]
    return kind(config.hidden_size, config.layernorm_epsilon)


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
        if micro_batch.rows is not None:
            return ops.dropout_add_rows(x, residual, self.probability, micro_batch.rng, self.site, micro_batch.rows)
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
        """q [b, n, s, d] to [b, n, s, d]; k, v [b, g, s, d], each for n / g heads in a row."""
        dropout = self.dropout if micro_batch.dropout else 0.0
        # Dropout inside the fused kernels draws from torch's own generator, which no other layout can repeat.
        if self.implementation == "sdpa" or (self.implementation == "auto" and dropout == 0.0):
            mask = micro_batch.attention_mask
            causal = self.causal and mask is None
            return fused_attention(q, k, v, mask=mask, dropout=dropout, causal=causal, scale=self.scale)
        return self._unfused(q, k, v, dropout, micro_batch)

    def _unfused(self, q: Tensor, k: Tensor, v: Tensor, dropout: float, micro_batch: MicroBatch) -> Tensor:
        mask, (b, n, s, d), groups = micro_batch.attention_mask, q.shape, k.shape[1]
        # Scaled before the product, which in fp16 ends at 65504. A group's heads are rows of one product, so no key is copied for them.
        scores = ((q * self.scale).reshape(b, groups, -1, d) @ k.transpose(-1, -2)).view(b, n, s, -1)
        probabilities = ops.masked_softmax(scores, scale=1.0, mask=mask, causal=self.causal and mask is None)
        if dropout:
            probabilities = ops.dropout_add(
                probabilities, None, dropout, micro_batch.rng, self.site, outer_offset=self.first_head, outer_size=self.num_heads
            )
        return (probabilities.view(b, groups, -1, probabilities.shape[-1]) @ v).view(b, n, s, d)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, dropout: float, causal: bool, scale: float) -> Tensor:
    """scaled_dot_product_attention of q [b, n, s, d] on k, v [b, g, s, d], each for n / g heads in a row."""
    grouped = k.shape[1] != q.shape[1]
    # On CUDA only cuDNN and flash take groups, in 16 bits and without a mask; copied keys are less than the square that is left otherwise.
    if grouped and q.is_cuda and (mask is not None or q.dtype not in (torch.bfloat16, torch.float16)):
        k, v = (x.unsqueeze(2).expand(-1, -1, q.shape[1] // x.shape[1], -1, -1).flatten(1, 2) for x in (k, v))
        grouped = False
    attention = nn.functional.scaled_dot_product_attention
    return attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped)


class Attention(nn.Module):
    """Self-attention whose heads share keys and values in groups, of one head each where there are as many keys as heads.

    The rows of qkv are ordered group by group (the heads, the key, the value of group 0, then of group 1, ...).
    """

    def __init__(self, config: Model, *, std: float, output_std: float, site: int, causal: bool = True) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_heads
        self.head_dim, self.rotary = hidden // heads, config.position_embedding == "rope"
        self.kv_heads, self.heads_a_group = config.key_value_heads, heads // config.key_value_heads
        self.qkv = Linear(hidden, (heads + 2 * self.kv_heads) * self.head_dim, split="column", std=std, bias=config.bias)
        self.core = CoreAttention(heads, self.head_dim, config.attention_dropout, config.attention, site, causal)
        self.output = Linear(hidden, hidden, split="row", std=output_std, bias=config.bias)

    def forward(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """x [b, s, h] to [b, s, h], before dropout."""
        qkv = self.qkv(x, micro_batch)
        # Of the product, not of x: a linear that is divided over ranks may get x with the tokens divided over them.
        b, s, _ = qkv.shape
        # Groups at hand = columns at hand / (heads_a_group + 2) d.
        qkv = qkv.view(b, s, -1, self.heads_a_group + 2, self.head_dim)
        q, k, v = (part.transpose(1, 2) for part in self._apart(qkv, micro_batch))
        y = self.core(q, k, v, micro_batch)
        return self.output(y.transpose(1, 2).reshape(b, s, -1), micro_batch)

    def _apart(self, qkv: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """q [b, s, n, d] and k, v [b, s, g, d] of qkv [b, s, g, n / g + 2, d], turned by their positions where these are rotary."""
        if self.rotary:
            assert micro_batch.rotary is not None, "the model fills in the angles before its layers"
            return ops.rotary_qkv(qkv, *micro_batch.rotary)
        if self.heads_a_group == 1:
            return qkv.unbind(3)
        heads, keys, values = qkv.split((self.heads_a_group, 1, 1), dim=3)
        # The heads of a group cannot be a view; keys and values as views would keep all of qkv beside that copy until backward.
        return heads.flatten(2, 3), keys.squeeze(3).contiguous(), values.squeeze(3).contiguous()


class MLP(nn.Module):
    """h -> f -> GELU -> h."""

    def __init__(self, config: Model, *, std: float, output_std: float) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.mlp_width
        self.approximate = GELU[config.gelu]
        self.up = Linear(hidden, ffn, split="column", std=std, bias=config.bias)
        self.down = Linear(ffn, hidden, split="row", std=output_std, bias=config.bias)

    def forward(self, x: Tensor, micro_batch: MicroBatch, *, unread: bool = False) -> Tensor:
        """x [b, s, h] to [b, s, h], before dropout; `unread`: see `functional.linear`."""
        return self.down(self.up.gelu(x, micro_batch, self.approximate), micro_batch, unread=unread)


class GatedMLP(nn.Module):
    """h -> f twice -> silu(gate) * up -> h (Shazeer 2020). Gate and up are one matrix multiply."""

    def __init__(self, config: Model, *, std: float, output_std: float) -> None:
        super().__init__()
        hidden, ffn = config.hidden_size, config.mlp_width
        self.gate_up = Linear(hidden, ffn, split="column", std=std, bias=config.bias, gated=True)
        self.down = Linear(ffn, hidden, split="row", std=output_std, bias=config.bias)

    def forward(self, x: Tensor, micro_batch: MicroBatch, *, unread: bool = False) -> Tensor:
        """x [b, s, h] to [b, s, h], before dropout; `unread`: see `functional.linear`."""
        return self.down(self.gate_up.swiglu(x, micro_batch), micro_batch, unread=unread)


def make_mlp(config: Model, *, std: float, output_std: float) -> MLP | GatedMLP:
    """The model's MLP; `output_std` is for the matrix that writes to the residual stream."""
    kind = {"gelu": MLP, "swiglu": GatedMLP}[config.activation]
    return kind(config, std=std, output_std=output_std)
