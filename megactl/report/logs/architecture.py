"""The model of a run as megactl knows models, from the run's arguments: what exact FLOPs can be counted for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megactl.config.schema import Model
from megactl.report.logs.layout import switch, text, whole

# The tokenizers whose vocabulary is fixed by their published files.
_VOCABULARIES = {"GPT2BPETokenizer": 50257, "gpt2": 50257}

_SHAPE = {
    "num_layers": ("num_layers", "n_layer"),
    "hidden_size": ("hidden_size", "n_embd"),
    "num_heads": ("num_attention_heads", "num_heads", "n_head"),
}

# Parts whose FLOPs are not those of a plain GPT or BERT.
_OTHER_KINDS = {"swiglu": "a gated MLP", "group_query_attention": "grouped queries", "multi_latent_attention": "latent attention"}


@dataclass(frozen=True)
class Architecture:
    """`model`, or the reason why it is not known in `problem`."""

    model: Model | None
    problem: str | None = None


def architecture_of(arguments: Mapping[str, str], seq_length: int | None) -> Architecture:
    """The model that `arguments` describe. A shape that is not stated is a problem, never a guess."""
    shape = {name: whole(arguments, *names) for name, names in _SHAPE.items()}
    tokenizer = text(arguments, "tokenizer_type", "tokenizer_name") or ""
    # FLOPs and sizes count the vocabulary that is there, not the rows that pad it.
    vocab = whole(arguments, "vocab_size") or _VOCABULARIES.get(tokenizer) or whole(arguments, "padded_vocab_size")
    unknown = [name for name, value in {**shape, "vocab_size": vocab, "seq_length": seq_length}.items() if not value]
    if unknown:
        return Architecture(None, f"not stated in the log: {', '.join(unknown)}")
    other = [label for name, label in _OTHER_KINDS.items() if switch(arguments, name)]
    other += ["experts"] if (whole(arguments, "num_experts") or 0) > 1 else []
    other += ["another shape of heads"] if _odd_heads(arguments, shape["hidden_size"], shape["num_heads"]) else []
    if other:
        return Architecture(None, f"exact FLOPs are counted for plain GPT and BERT alone, and this model has {', '.join(other)}")
    model = Model(
        architecture="bert" if _is_bert(arguments) else "gpt",
        **shape,
        ffn_size=whole(arguments, "ffn_hidden_size", "n_inner", "ffn_size"),
        vocab_size=vocab,
        max_positions=whole(arguments, "max_position_embeddings", "n_positions", "max_positions"),
        untie_embeddings=bool(switch(arguments, "untie_embeddings_and_output_weights", "untie_embeddings")),
    )
    return Architecture(model)


def _is_bert(arguments: Mapping[str, str]) -> bool:
    tokenizer = text(arguments, "tokenizer_type") or ""
    named = text(arguments, "architecture", "model_type", "model") or ""
    return tokenizer.startswith("Bert") or named.lower() == "bert"


def _odd_heads(arguments: Mapping[str, str], hidden: int, heads: int) -> bool:
    width = whole(arguments, "kv_channels")
    return width is not None and width * heads != hidden
