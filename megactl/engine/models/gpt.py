"""GPT: learned or rotary positions, causal blocks, a tied or untied head. One device, no distribution.

Initialisation follows GPT-2: normal(0, std), and std / sqrt(2 L) for the two projections that write to the residual
stream (Radford et al. 2019, section 2.3). With norm_position post the model is GPT-1's (Radford et al. 2018): no final norm.
"""

from __future__ import annotations

from torch import Tensor, nn

from megactl.config.schema import Model
from megactl.engine.models.layers import Dropout, MicroBatch, Targets, VocabEmbedding, VocabHead, WholeEmbedding
from megactl.engine.models.transformer import Transformer


class Embedding(nn.Module):
    """Token plus position vectors (none where positions are rotary), then dropout."""

    def __init__(self, config: Model, rows: int) -> None:
        super().__init__()
        self.tokens = VocabEmbedding(config.vocab_size, rows, config.hidden_size, config.init_std)
        learned = config.position_embedding == "learned"
        self.positions = WholeEmbedding(config.max_positions, config.hidden_size, config.init_std) if learned else None
        self.dropout = Dropout(config.hidden_dropout, site=0)

    def forward(self, tokens: Tensor, micro_batch: MicroBatch) -> Tensor:
        """tokens [b, s] to [b, s, h]."""
        x = self.tokens(tokens, micro_batch)
        if self.positions is not None:
            x = x + self.positions(micro_batch.position_ids, micro_batch)
        return self.dropout(x, None, micro_batch)


class GPT(Transformer):
    """The decoder: predicts the next token at each position. Its head gives logits [b, s, rows]."""

    def make_embedding(self, rows: int) -> Embedding:
        """Tokens and positions."""
        return Embedding(self.config, rows)

    def make_head(self, rows: int) -> VocabHead:
        """Logits over the vocabulary."""
        return self.make_vocab_head(rows)

    @property
    def losses(self) -> tuple[str, ...]:
        """The cross entropy of the next token."""
        return ("lm_loss",)

    def loss_sum(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Sum over tokens of mask * cross entropy, 0-d."""
        return self.head.loss_sum(logits, labels, mask)

    def loss_sums(self, output: Tensor, targets: Targets) -> Tensor:
        """[1]: the sum over tokens."""
        return self.loss_sum(output, targets.labels, targets.mask).unsqueeze(0)

    def loss_counts(self, targets: Targets) -> Tensor:
        """[1]: tokens that count."""
        return targets.mask.sum().unsqueeze(0)
