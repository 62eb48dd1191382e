"""GPT and BERT in plain PyTorch, written without megactl: nn.Linear, nn.LayerNorm, F.scaled_dot_product_attention, autograd.

The parameters have the names under which megactl stores them, and the rows of qkv its order (q, k, v of head 0, then of head 1, ...),
so weights can be copied one to one. Dropout is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """A model. `rows` is the padded vocabulary; `encoder`: BERT with its heads, attention in both directions; `post`: norms behind."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab: int
    rows: int
    positions: int
    epsilon: float
    gelu: str
    tied: bool
    encoder: bool
    post: bool
    sentence: bool


class Block(nn.Module):
    """Attention and MLP with residuals."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        h = shape.hidden
        self.shape = shape
        self.attention_norm, self.mlp_norm = nn.LayerNorm(h, shape.epsilon), nn.LayerNorm(h, shape.epsilon)
        self.attention = nn.ModuleDict({"qkv": nn.Linear(h, 3 * h), "output": nn.Linear(h, h)})
        self.mlp = nn.ModuleDict({"up": nn.Linear(h, shape.ffn), "down": nn.Linear(shape.ffn, h)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [b, s, h]; mask bool [b, 1, 1, s], True where there is a token, or None."""
        if self.shape.post:
            x = self.attention_norm(x + self.attend(x, mask))
            return self.mlp_norm(x + self.feed_forward(x))
        x = x + self.attend(self.attention_norm(x), mask)
        return x + self.feed_forward(self.mlp_norm(x))

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Self-attention, [b, s, h]."""
        b, s, h = x.shape
        q, k, v = self.attention["qkv"](x).view(b, s, self.shape.heads, 3, -1).permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not self.shape.encoder)
        return self.attention["output"](y.transpose(1, 2).reshape(b, s, h))

    def feed_forward(self, x: Tensor) -> Tensor:
        """The MLP, [b, s, h]."""
        return self.mlp["down"](F.gelu(self.mlp["up"](x), approximate=self.shape.gelu))


class PlainModel(nn.Module):
    """Tokens to losses."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        h = shape.hidden
        self.shape = shape
        self.embedding = nn.ModuleDict({"tokens": nn.Embedding(shape.rows, h), "positions": nn.Embedding(shape.positions, h)})
        if shape.encoder:
            self.embedding["token_types"] = nn.Embedding(2, h)
            if shape.post:
                self.embedding["norm"] = nn.LayerNorm(h, shape.epsilon)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        if not shape.post:
            self.final_norm = nn.LayerNorm(h, shape.epsilon)
        self.head = self._encoder_head() if shape.encoder else nn.ParameterDict()
        if not shape.tied:
            (self.head["decoder"] if shape.encoder else self.head)["weight"] = nn.Parameter(torch.empty(shape.rows, h))

    def _encoder_head(self) -> nn.ModuleDict:
        shape, h = self.shape, self.shape.hidden
        decoder = nn.ParameterDict({"bias": nn.Parameter(torch.zeros(shape.rows))})
        head = nn.ModuleDict({"dense": nn.Linear(h, h), "norm": nn.LayerNorm(h, shape.epsilon), "decoder": decoder})
        if shape.sentence:
            head["sentence"] = nn.ModuleDict({"pooler": nn.Linear(h, h), "classifier": nn.Linear(h, 2)})
        return head

    def hidden_states(self, tokens: Tensor, positions: Tensor, token_types: Tensor | None, padding_mask: Tensor | None) -> Tensor:
        """[b, s] of ids to [b, s, h]."""
        x = self.embedding["tokens"](tokens) + self.embedding["positions"](positions)
        if self.shape.encoder:
            x = x + self.embedding["token_types"](token_types)
            x = self.embedding["norm"](x) if self.shape.post else x
        mask = None if padding_mask is None else padding_mask[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        return x if self.shape.post else self.final_norm(x)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        token_types: Tensor | None = None,
        padding_mask: Tensor | None = None,
        sentence_labels: Tensor | None = None,
    ) -> Tensor:
        """[1] or [2]: the sum over counted tokens of the cross entropy, and with a sentence head that over sequences; float32 at least."""
        x = self.hidden_states(tokens, positions, token_types, padding_mask)
        y, bias = x, None
        weights = self.head["decoder"] if self.shape.encoder else self.head
        if self.shape.encoder:
            y = self.head["norm"](F.gelu(self.head["dense"](x), approximate=self.shape.gelu))
            bias = weights["bias"]
        table = self.embedding["tokens"].weight if self.shape.tied else weights["weight"]
        sums = [(_cross_entropy(F.linear(y, table, bias)[..., : self.shape.vocab], labels) * loss_mask).sum()]
        if self.shape.sentence:
            head = self.head["sentence"]
            sums.append(_cross_entropy(head["classifier"](torch.tanh(head["pooler"](x[:, 0]))), sentence_labels).sum())
        return torch.stack(sums)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each label, in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
