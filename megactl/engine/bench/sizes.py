"""The shapes that operators are timed at: those of one micro-batch of a preset."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megactl.config.presets import PRESETS, preset_values
from megactl.costmodel.parameters import padded_vocab
from megactl.errors import ConfigError, Problem

SMALL = "small"
# Tokens of a micro-batch where none is asked for: what fills a GPU, and what a few CPU cores get through.
_TOKENS = {"cuda": 16384, "cpu": 4096}
_GPT2_VOCAB = 50257


@dataclass(frozen=True)
class Size:
    """One micro-batch: `batch` sequences of `seq` tokens. `ffn` is the MLP's width, `vocab` the padded vocabulary, `layers` the model's.

    kv_heads: None for as many as heads. plain: weights without biases, a second matrix in the MLP, one weight a norm, as Llama has.
    """

    name: str
    batch: int
    seq: int
    hidden: int
    heads: int
    ffn: int
    vocab: int
    layers: int
    kv_heads: int | None = None
    plain: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.batch * self.seq

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def layer_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of one transformer layer's weights and biases, for the optimizer's operators."""
        h, f = self.hidden, self.ffn
        if self.plain:
            return [(h + 2 * h * self.groups // self.heads, h), (h, h), (2, f, h), (h, f), (h,), (h,)]
        return [(3 * h, h), (3 * h,), (h, h), (h,), (f, h), (f,), (h, f), (h,), (h,), (h,), (h,), (h,)]


def size_names() -> list[str]:
    """What --size may be."""
    return [SMALL, *PRESETS]


def size_named(name: str, device: str, batch: int | None = None) -> Size:
    """The size of a preset with `batch` sequences (default: as many as make 16384 tokens on cuda, 4096 on cpu).

    "small" fits into any cache. Raises ConfigError for an unknown name.
    """
    if name == SMALL:
        size = Size(SMALL, batch=2, seq=64, hidden=256, heads=4, ffn=1024, vocab=2048, layers=1)
        return size if batch is None else replace(size, batch=batch)
    if name not in PRESETS:
        raise ConfigError([Problem(f"--size {name}", "no such size", f"use one of {', '.join(size_names())}")])
    values = preset_values(name)
    hidden, seq = values["model.hidden_size"], values["training.seq_length"]
    return Size(
        name, batch=batch or max(1, _TOKENS[device] // seq), seq=seq, hidden=hidden, heads=values["model.num_heads"],
        ffn=values.get("model.ffn_size") or 4 * hidden, vocab=padded_vocab(values.get("model.vocab_size") or _GPT2_VOCAB, 1),
        layers=values["model.num_layers"], kv_heads=values.get("model.kv_heads"), plain=values.get("model.activation") == "swiglu",
    )  # fmt: skip
