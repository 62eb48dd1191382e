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

_WORDS = {
    "activation": ("activation", "hidden_act"),
    "normalization": ("normalization",),
    "position_embedding": ("position_embedding_type", "position_embedding"),
}

# Parts whose FLOPs are not those of any model that is known here.
_OTHER_KINDS = {"multi_latent_attention": "latent attention"}


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
    grouped = switch(arguments, "group_query_attention")
    # Megatron-LM prints its default of 1 where the switch is off.
    kv_heads = None if grouped is False else whole(arguments, "num_query_groups", "num_key_value_heads", "kv_heads")
    other += ["an unknown number of query groups"] if grouped and not kv_heads else []
    if other:
        return Architecture(None, f"exact FLOPs are counted for GPT, BERT and Llama's shapes alone, and this model has {', '.join(other)}")
    model = Model(
        architecture="bert" if _is_bert(arguments) else "gpt",
        **shape,
        ffn_size=whole(arguments, "ffn_hidden_size", "n_inner", "ffn_size"),
        vocab_size=vocab,
        max_positions=whole(arguments, "max_position_embeddings", "n_positions", "max_positions"),
        untie_embeddings=bool(switch(arguments, "untie_embeddings_and_output_weights", "untie_embeddings")),
        kv_heads=kv_heads if kv_heads != shape["num_heads"] else None,
        **_variants(arguments),
    )
    return Architecture(model)


def _variants(arguments: Mapping[str, str]) -> dict[str, str | bool]:
    """What Llama's shapes have otherwise, in megactl's words."""
    stated = {name: (text(arguments, *names) or "").lower() for name, names in _WORDS.items()}
    gated = switch(arguments, "swiglu") or stated["activation"] in ("swiglu", "silu")
    return {
        "activation": "swiglu" if gated else "gelu",
        "normalization": "rmsnorm" if stated["normalization"] == "rmsnorm" else "layernorm",
        "position_embedding": "rope" if stated["position_embedding"] == "rope" else "learned",
        "bias": switch(arguments, "add_bias_linear", "bias") is not False,
    }


def _is_bert(arguments: Mapping[str, str]) -> bool:
    tokenizer = text(arguments, "tokenizer_type") or ""
    named = text(arguments, "architecture", "model_type", "model") or ""
    return tokenizer.startswith("Bert") or named.lower() == "bert"


def _odd_heads(arguments: Mapping[str, str], hidden: int, heads: int) -> bool:
    width = whole(arguments, "kv_channels")
    return width is not None and width * heads != hidden
