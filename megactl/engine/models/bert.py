"""BERT: token types, attention in both directions, a masked-language-model head and a sentence head (Devlin et al. 2019).

norm_position post is the published model: LayerNorm after the sum of the embeddings and after each residual. pre is
Megatron-LM's (Shoeybi et al. 2019, section 5.3): LayerNorm before each branch, a final one, none in the embedding.

The language-model head is a dense layer, GELU and LayerNorm, then the tied decoder with a bias of its own for each token. The
sentence head reads the first position: a pooler (dense, tanh) and two classes. What the two classes mean is the data's affair.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megactl.config.schema import Model
from megactl.engine.models.layers import (
    GELU,
    IGNORED_LABEL,
    Dropout,
    FirstToken,
    Linear,
    MicroBatch,
    Targets,
    VocabEmbedding,
    VocabHead,
    WholeEmbedding,
    make_norm,
)
from megactl.engine.models.transformer import Transformer

TOKEN_TYPES = 2
SENTENCE_CLASSES = 2


class Embedding(nn.Module):
    """Token plus position (learned ones) plus token-type vectors, a norm where norms stand behind, then dropout."""

    def __init__(self, config: Model, rows: int) -> None:
        super().__init__()
        hidden, std = config.hidden_size, config.init_std
        self.tokens = VocabEmbedding(config.vocab_size, rows, hidden, std)
        self.positions = WholeEmbedding(config.max_positions, hidden, std) if config.position_embedding == "learned" else None
        self.token_types = WholeEmbedding(TOKEN_TYPES, hidden, std)
        self.norm = make_norm(config) if config.norm_position == "post" else None
        self.dropout = Dropout(config.hidden_dropout, site=0)

    def forward(self, tokens: Tensor, micro_batch: MicroBatch) -> Tensor:
        """tokens [b, s] to [b, s, h]."""
        x = self.tokens(tokens, micro_batch)
        if self.positions is not None:
            x = x + self.positions(micro_batch.position_ids, micro_batch)
        x = x + self.token_types(micro_batch.token_types, micro_batch)
        if self.norm is not None:
            x = self.norm(x, micro_batch)
        return self.dropout(x, None, micro_batch)


class SentenceHead(nn.Module):
    """The first position's vector to two classes."""

    # Its weights see one vector a sequence, on every rank that has the head, however tokens are divided.
    of_sequences = True

    def __init__(self, config: Model) -> None:
        super().__init__()
        hidden, std = config.hidden_size, config.init_std
        self.first = FirstToken()
        self.pooler = Linear(hidden, hidden, split=None, std=std)
        self.classifier = Linear(hidden, SENTENCE_CLASSES, split=None, std=std)

    def forward(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """x [b, s, h] to [b, 2]."""
        return self.classifier(torch.tanh(self.pooler(self.first(x, micro_batch), micro_batch)), micro_batch)


class PretrainingHead(nn.Module):
    """Both heads as one unit: its gradients are complete when the hidden states have theirs from both."""

    def __init__(self, config: Model, decoder: VocabHead) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.approximate = GELU[config.gelu]
        # Whole on every tensor-parallel rank: a cut by outputs would have to be gathered again for the norm.
        self.dense = Linear(hidden, hidden, split=None, std=config.init_std)
        self.norm = make_norm(config)
        self.decoder = decoder
        self.sentence = SentenceHead(config) if config.sentence_head is not False else None

    def forward(self, x: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """x [b, s, h] to logits [b, s, rows] and sentence logits [b, 2]."""
        y = self.dense.gelu(x, micro_batch, self.approximate)
        logits = self.decoder(self.norm(y, micro_batch), micro_batch)
        return logits, None if self.sentence is None else self.sentence(x, micro_batch)


class BERT(Transformer):
    """The encoder: predicts the masked tokens, and with a sentence head how the two segments belong together."""

    causal = False
    tied_name = "head.decoder.weight"

    def make_embedding(self, rows: int) -> Embedding:
        """Tokens, positions and token types."""
        return Embedding(self.config, rows)

    def make_head(self, rows: int) -> PretrainingHead:
        """Logits over the vocabulary, and of the sentence classes."""
        return PretrainingHead(self.config, self.make_vocab_head(rows, bias=True))

    @property
    def losses(self) -> tuple[str, ...]:
        """The cross entropy of the masked tokens, and that of the sentence classes."""
        return ("lm_loss", "sentence_loss") if self.config.sentence_head is not False else ("lm_loss",)

    def loss_sums(self, output: tuple[Tensor, Tensor | None], targets: Targets) -> Tensor:
        """[k]: the sum over masked tokens, and over sequences."""
        logits, sentence = output
        sums = [self.head.decoder.loss_sum(logits, targets.labels, targets.mask)]
        if sentence is not None:
            logits, labels = sentence.to(sums[0].dtype), targets.sentence_labels
            sums.append(nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum"))
        return torch.stack(sums)

    def loss_counts(self, targets: Targets) -> Tensor:
        """[k]: masked tokens, and sequences."""
        counts = [targets.mask.sum()]
        if len(self.losses) > 1:
            counts.append((targets.sentence_labels != IGNORED_LABEL).sum().to(counts[0].dtype))
        return torch.stack(counts)
