"""GPT: learned positions, pre-LayerNorm blocks, a tied or untied head. One device, no distribution.

A `GPT` may hold only some of the layers (`layers`), without the embedding (`first=False`) or the head (`last=False`), so
that a pipeline stage is the same class; layers keep their number within the whole model in their names.
Initialisation follows GPT-2: normal(0, std), and std / sqrt(2 L) for the two projections that write to the residual
stream (Radford et al. 2019, section 2.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megactl.config.schema import Model
from megactl.engine.models.layers import MLP, Attention, Dropout, LayerNorm, MicroBatch, PositionEmbedding, VocabEmbedding, VocabHead

# Dropout sites: 0 is the embedding's; layer i has SITES_PER_LAYER of them from SITES_PER_LAYER * (i + 1) on.
SITES_PER_LAYER = 4


class Embedding(nn.Module):
    """Token plus position vectors, then dropout."""

    def __init__(self, config: Model, rows: int) -> None:
        super().__init__()
        self.tokens = VocabEmbedding(config.vocab_size, rows, config.hidden_size, config.init_std)
        self.positions = PositionEmbedding(config.max_positions, config.hidden_size, config.init_std)
        self.dropout = Dropout(config.hidden_dropout, site=0)

    def forward(self, tokens: Tensor, micro_batch: MicroBatch) -> Tensor:
        """tokens [b, s] to [b, s, h]."""
        x = self.tokens(tokens, micro_batch) + self.positions(micro_batch.position_ids, micro_batch)
        return self.dropout(x, None, micro_batch)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Model, index: int) -> None:
        super().__init__()
        hidden, std = config.hidden_size, config.init_std
        output_std = std / math.sqrt(2 * config.num_layers)
        site = SITES_PER_LAYER * (index + 1)
        self.attention_norm = LayerNorm(hidden, config.layernorm_epsilon)
        self.attention = Attention(
            hidden, config.num_heads, dropout=config.attention_dropout, implementation=config.attention,
            std=std, output_std=output_std, site=site,
        )  # fmt: skip
        self.attention_dropout = Dropout(config.hidden_dropout, site + 1)
        self.mlp_norm = LayerNorm(hidden, config.layernorm_epsilon)
        self.mlp = MLP(hidden, config.ffn_size or 4 * hidden, gelu=config.gelu, std=std, output_std=output_std)
        self.mlp_dropout = Dropout(config.hidden_dropout, site + 2)

    def forward(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """x [b, s, h] to [b, s, h]."""
        x = self.attention_dropout(self.attention(self.attention_norm(x, micro_batch), micro_batch), x, micro_batch)
        return self.mlp_dropout(self.mlp(self.mlp_norm(x, micro_batch), micro_batch), x, micro_batch)


class GPT(nn.Module):
    """The decoder. `vocab_rows` is the padded vocabulary (default: no padding)."""

    def __init__(
        self, config: Model, *, layers: Sequence[int] | None = None, first: bool = True, last: bool = True, vocab_rows: int | None = None
    ) -> None:
        super().__init__()
        rows = vocab_rows or config.vocab_size
        self.config = config
        self.embedding = Embedding(config, rows) if first else None
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in (range(config.num_layers) if layers is None else layers)})
        self.final_norm = LayerNorm(config.hidden_size, config.layernorm_epsilon) if last else None
        self.head = self._make_head(rows) if last else None

    def _make_head(self, rows: int) -> VocabHead:
        config = self.config
        if self.embedding is not None and not config.untie_embeddings:
            self.embedding.tokens.add_to_head = True
            return VocabHead(config.vocab_size, self.embedding.tokens.weight, config.init_std)
        return VocabHead(config.vocab_size, nn.Parameter(torch.empty(rows, config.hidden_size)), config.init_std)

    def canonical_name(self, name: str) -> str:
        """Name of a parameter in the whole model: a tied head is the embedding's weight, also where it is a copy on the last stage."""
        return "embedding.tokens.weight" if name == "head.weight" and not self.config.untie_embeddings else name

    def units(self) -> list[nn.Module]:
        """The parts whose gradients become complete together, in forward order."""
        parts = [self.embedding, *self.layers.values(), self.final_norm, self.head]
        return [part for part in parts if part is not None]

    def forward(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Tokens [b, s] (first stage) or hidden states [b, s, h] to logits [b, s, rows] (last stage) or hidden states."""
        if self.embedding is not None:
            x = self.embedding(x, micro_batch)
        for layer in self.layers.values():
            x = layer(x, micro_batch)
        if self.head is not None:
            x = self.head(self.final_norm(x, micro_batch), micro_batch)
        return x

    def loss_sum(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Sum over tokens of mask * cross entropy, 0-d."""
        return self.head.loss_sum(logits, labels, mask)
