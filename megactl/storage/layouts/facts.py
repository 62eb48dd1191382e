"""Facts that other systems keep in their checkpoints: argument namespaces and config.json, turned into megactl's names for settings."""

from __future__ import annotations

from collections.abc import Mapping as Dictionary
from typing import Any

from megactl.storage.foreign.nodes import Mapping, Object

# Megatron-LM's argument -> megactl's setting.
_MEGATRON = {
    "num_layers": "model.num_layers",
    "hidden_size": "model.hidden_size",
    "num_attention_heads": "model.num_heads",
    "ffn_hidden_size": "model.ffn_size",
    "padded_vocab_size": "model.vocab_size",
    "max_position_embeddings": "model.max_positions",
    "seq_length": "training.seq_length",
}
# What our formulas do not have: argument -> (values that are fine, what it is).
_BEYOND: dict[str, tuple[tuple[Any, ...], str]] = {
    "normalization": (("LayerNorm", "RMSNorm"), "another norm"),
    "num_experts": ((), "experts"),
    "multi_latent_attention": ((False,), "latent attention"),
    "position_embedding_type": (("learned_absolute", "rope"), "other positions than learned or rotary ones"),
    "add_qkv_bias": ((False,), "biases of qkv alone"),
    "qk_layernorm": ((False,), "norms of queries and keys"),
    "embed_layernorm": ((False,), "a norm behind the embedding"),
}
# Megatron-LM's argument and its value -> megactl's setting and its value; others are the settings' defaults.
_VARIANTS = {
    ("swiglu", True): ("model.activation", "swiglu"),
    ("normalization", "RMSNorm"): ("model.normalization", "rmsnorm"),
    ("position_embedding_type", "rope"): ("model.position_embedding", "rope"),
    ("add_bias_linear", False): ("model.bias", False),
}
_DEGREES = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "virtual_pipeline_model_parallel_size": "vpp",
    "context_parallel_size": "cp",
    "expert_model_parallel_size": "ep",
    "data_parallel_size": "dp",
}


def mapping(value: Any) -> dict[str, Any]:
    """The string keys of a dictionary or the attributes of an object in a pickle; nothing of anything else."""
    if isinstance(value, Mapping):
        return value.strings()
    return value.attributes() if isinstance(value, Object) else {}


def whole(value: Any) -> int | None:
    """A whole number that fits 62 bits, else None."""
    return value if type(value) is int and -(1 << 62) < value < 1 << 62 else None


def arguments(tree: Any) -> dict[str, Any]:
    """Megatron-LM's `args` in the value of a checkpoint file."""
    return mapping(mapping(tree).get("args"))


def degrees(args: Dictionary[str, Any]) -> dict[str, int]:
    """Parallel degrees in Megatron-LM's arguments. Where cp or vpp is 1 or unset it is left out."""
    found = {short: whole(args.get(name)) for name, short in _DEGREES.items()}
    return {name: value for name, value in found.items() if value is not None and (value > 1 or name in ("tp", "pp", "dp"))}


def from_megatron(args: Dictionary[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """(megactl's settings, why they do not describe the model) from Megatron-LM's arguments; (None, None) where they are not there."""
    settings: dict[str, Any] = {name: whole(args.get(theirs)) for theirs, name in _MEGATRON.items()}
    if any(settings[name] is None for name in ("model.num_layers", "model.hidden_size", "model.vocab_size")):
        return None, None
    beyond = [what for name, (fine, what) in _BEYOND.items() if name in args and args[name] not in (*fine, None)]
    settings.update(target for (name, value), target in _VARIANTS.items() if args.get(name) == value)
    if args.get("group_query_attention") is True:
        settings["model.kv_heads"] = whole(args.get("num_query_groups"))
    beyond += ["another shape of heads"] if _odd_heads(whole(args.get("kv_channels")), settings) else []
    # Every run has the options of all models; the tokenizer is what tells them apart.
    bert = isinstance(args.get("tokenizer_type"), str) and args["tokenizer_type"].startswith("Bert")
    settings["model.architecture"] = "bert" if bert else "gpt"
    settings["model.untie_embeddings"] = args.get("untie_embeddings_and_output_weights") is True
    settings["training.precision"] = "bf16" if args.get("bf16") is True else "fp16" if args.get("fp16") is True else "fp32"
    return {name: value for name, value in settings.items() if value is not None}, ", ".join(beyond) or None


def from_huggingface(config: Any) -> tuple[dict[str, Any] | None, str | None]:
    """The same from Hugging Face's config.json, for GPT-2, BERT and Llama; another model's is not described by our formulas."""
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        return None, None
    kind = config["model_type"]
    if kind not in ("gpt2", "bert", "llama"):
        return {}, f"model_type {kind[:40]}"
    names = {
        "gpt2": {
            "n_layer": "num_layers", "n_embd": "hidden_size", "n_head": "num_heads", "n_inner": "ffn_size", "n_positions": "max_positions",
        },
        "bert": {
            "num_hidden_layers": "num_layers", "hidden_size": "hidden_size", "num_attention_heads": "num_heads",
            "intermediate_size": "ffn_size", "max_position_embeddings": "max_positions",
        },
        "llama": {
            "num_hidden_layers": "num_layers", "hidden_size": "hidden_size", "num_attention_heads": "num_heads",
            "num_key_value_heads": "kv_heads", "intermediate_size": "ffn_size", "max_position_embeddings": "max_positions",
        },
    }[kind]  # fmt: skip
    found = {f"model.{ours}": whole(config.get(theirs)) for theirs, ours in {**names, "vocab_size": "vocab_size"}.items()}
    if any(found.get(f"model.{name}") is None for name in ("num_layers", "hidden_size", "vocab_size")):
        return None, None
    found["model.architecture"] = "bert" if kind == "bert" else "gpt"
    if kind == "bert":
        found["model.norm_position"] = "post"
    beyond = _take_llama(config, found) if kind == "llama" else None
    return {name: value for name, value in found.items() if value is not None}, beyond


def _take_llama(config: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Add what is not a number in Llama's config.json; returns what of it our formulas do not have."""
    biases = [config.get(name) is True for name in ("attention_bias", "mlp_bias")]
    found |= {
        "model.position_embedding": "rope", "model.normalization": "rmsnorm", "model.activation": "swiglu", "model.bias": all(biases),
        "model.untie_embeddings": config.get("tie_word_embeddings") is not True,
    }  # fmt: skip
    beyond = ["biases in attention or the MLP alone"] if any(biases) and not all(biases) else []
    beyond += ["another shape of heads"] if _odd_heads(whole(config.get("head_dim")), found) else []
    return ", ".join(beyond) or None


def _odd_heads(width: int | None, settings: Dictionary[str, Any]) -> bool:
    """Whether heads of `width` do not add up to the hidden size."""
    heads = settings.get("model.num_heads")
    return width is not None and heads is not None and width * heads != settings["model.hidden_size"]
