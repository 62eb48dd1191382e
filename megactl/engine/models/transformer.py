"""What GPT and BERT share: the block, and a stack of blocks between an embedding and a head. One device, no distribution.

A `Transformer` may hold only some of the layers (`layers`), without the embedding (`first=False`) or the head (`last=False`), so
that a pipeline stage is the same class; layers keep their number within the whole model in their names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megactl.config.schema import Model
from megactl.engine.models.layers import Attention, Dropout, MicroBatch, Norm, Targets, VocabHead, make_mlp, make_norm
from megactl.engine.models.rotary import RotaryAngles

# Dropout sites: 0 is the embedding's; layer i has SITES_PER_LAYER of them from SITES_PER_LAYER * (i + 1) on.
SITES_PER_LAYER = 4


class Block(nn.Module):
    """Attention, then the MLP, each on a residual branch.

    pre:  x + attention(norm(x)), then x + mlp(norm(x))      (Radford et al. 2019)
    post: norm(x + attention(x)), then norm(x + mlp(x))      (Vaswani et al. 2017, Devlin et al. 2019)
    """

    def __init__(self, config: Model, index: int, *, causal: bool = True) -> None:
        super().__init__()
        std = config.init_std
        self.pre_norm = config.norm_position == "pre"
        # Only without a norm on the residual stream does its variance grow with depth.
        output_std = std / math.sqrt(2 * config.num_layers) if self.pre_norm else std
        site = SITES_PER_LAYER * (index + 1)
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, std=std, output_std=output_std, site=site, causal=causal)
        self.attention_dropout = Dropout(config.hidden_dropout, site + 1)
        self.mlp_norm = make_norm(config)
        self.mlp = make_mlp(config, std=std, output_std=output_std)
        self.mlp_dropout = Dropout(config.hidden_dropout, site + 2)

    def forward(self, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """x [b, s, h] to [b, s, h]."""
        return self.feed_forward(*self.attend(x, micro_batch), micro_batch)

    def attend(self, x: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """First half: attention's branch, and the residual it is to be added to, each [b, s, h]."""
        return self.attention(self.attention_norm(x, micro_batch) if self.pre_norm else x, micro_batch), x

    def feed_forward(self, branch: Tensor, x: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Second half: it begins with the addition, so that this and the norm behind it are one pass wherever a layer is cut in two."""
        if self.pre_norm:
            y, x = add_norm(self.attention_dropout, self.mlp_norm, branch, x, micro_batch)
            # Neither dropout nor an addition reads its inputs in backward; the norm after them, below, does.
            return self.mlp_dropout(self.mlp(y, micro_batch, unread=micro_batch.unread), x, micro_batch)
        x, _ = add_norm(self.attention_dropout, self.attention_norm, branch, x, micro_batch)
        return add_norm(self.mlp_dropout, self.mlp_norm, self.mlp(x, micro_batch), x, micro_batch)[0]

    def halves(self) -> dict[str, list[nn.Module]]:
        """The methods that run half a layer each, and the modules they read."""
        attention, rest = [self.attention], [self.attention_dropout, self.mlp_norm, self.mlp, self.mlp_dropout]
        (attention if self.pre_norm else rest).insert(0, self.attention_norm)
        return {"attend": attention, "feed_forward": rest}


def add_norm(dropout: Dropout, norm: Norm, branch: Tensor, x: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """(norm(sum), sum) for sum = x + dropout(branch), all [b, s, h]: without dropout in one pass over memory."""
    if dropout.drops(micro_batch):
        x = dropout(branch, x, micro_batch)
        return norm(x, micro_batch), x
    return norm.add(branch, x, micro_batch)


# (layers, x [b, s, h], micro_batch) to the last one's [b, s, h].
RunLayers = Callable[[Sequence[nn.Module], Tensor, MicroBatch], Tensor]


def one_after_the_other(layers: Sequence[nn.Module], x: Tensor, micro_batch: MicroBatch) -> Tensor:
    """The plain way to run layers: x [b, s, h] through each."""
    for layer in layers:
        x = layer(x, micro_batch)
    return x


class Transformer(nn.Module):
    """A model or a stage of one. `vocab_rows` is the padded vocabulary (default: no padding).

    A model class says what stands at either end (`make_embedding`, `make_head`), whether attention is causal, and its losses.
    """

    causal = True
    # Name within the head of the weight that may be the embedding's.
    tied_name = "head.weight"

    def __init__(
        self, config: Model, *, layers: Sequence[int] | None = None, first: bool = True, last: bool = True, vocab_rows: int | None = None
    ) -> None:
        super().__init__()
        rows = vocab_rows or config.vocab_size
        self.config = config
        self.embedding = self.make_embedding(rows) if first else None
        indices = range(config.num_layers) if layers is None else layers
        self.layers = nn.ModuleDict({str(i): Block(config, i, causal=self.causal) for i in indices})
        # A seam: what keeps less for backward than autograd does runs the same layers in a way of its own.
        self.run_layers: RunLayers = one_after_the_other
        has_norm = last and config.norm_position == "pre"
        self.final_norm = make_norm(config) if has_norm else None
        self.angles = RotaryAngles(config) if config.position_embedding == "rope" else None
        self.head = self.make_head(rows) if last else None

    def make_embedding(self, rows: int) -> nn.Module:
        """From ids to hidden states; the table of the vocabulary is its `tokens`."""
        raise NotImplementedError

    def make_head(self, rows: int) -> nn.Module:
        """From hidden states to logits."""
        raise NotImplementedError

    def make_vocab_head(self, rows: int, *, bias: bool = False) -> VocabHead:
        """A head with the embedding's weight where tied and on this stage, else with a weight of its own."""
        config = self.config
        if self.embedding is not None and not config.untie_embeddings:
            self.embedding.tokens.add_to_head = True
            weight = self.embedding.tokens.weight
        else:
            weight = nn.Parameter(torch.empty(rows, config.hidden_size))
        return VocabHead(config.vocab_size, weight, config.init_std, bias=bias)

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of what is trained on, on every stage alike: the order of `loss_sums`."""
        raise NotImplementedError

    def canonical_name(self, name: str) -> str:
        """Name of a parameter in the whole model: a tied head is the embedding's weight, also where it is a copy on the last stage."""
        return "embedding.tokens.weight" if name == self.tied_name and not self.config.untie_embeddings else name

    def units(self) -> list[nn.Module]:
        """The parts whose gradients become complete together, in forward order."""
        parts = [self.embedding, *self.layers.values(), self.final_norm, self.head]
        return [part for part in parts if part is not None]

    def forward(self, x: Tensor, micro_batch: MicroBatch) -> Tensor | tuple[Tensor, Tensor | None]:
        """Tokens [b, s] (first stage) or hidden states [b, s, h] to what the head gives (last stage) or hidden states."""
        micro_batch = self.positioned(micro_batch)
        if self.embedding is not None:
            x = self.embedding(x, micro_batch)
        x = self.run_layers(list(self.layers.values()), x, micro_batch)
        if self.final_norm is not None:
            x = self.final_norm(x, micro_batch)
        return x if self.head is None else self.head(x, micro_batch)

    def positioned(self, micro_batch: MicroBatch) -> MicroBatch:
        """The micro-batch with what all layers need to know of its positions: the angles of rotary embedding, where the model has it."""
        return micro_batch if self.angles is None else dataclasses.replace(micro_batch, rotary=self.angles(micro_batch.position_ids))

    def loss_sums(self, output: Tensor | tuple[Tensor, Tensor | None], targets: Targets) -> Tensor:
        """[k], for each of `losses` the sum over what `loss_counts` counts; `output` is the last stage's."""
        raise NotImplementedError

    def loss_counts(self, targets: Targets) -> Tensor:
        """[k], for each of `losses` how many terms its sum has; needs no forward, so that it may be asked before one."""
        raise NotImplementedError
