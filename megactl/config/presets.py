"""Named architectures. A preset sets the model's shape and the sequence length; everything else keeps its default.

Sources: gpt-345m is GPT-2 medium; gpt-1.3b is GPT-3 XL's width and depth with 16 heads; gpt-1.7b to gpt-1t are Table 1 of
Narayanan et al., SC21, arXiv:2104.04473; gpt-52b and gpt-181b are the shapes of BigScience's GPT experiments. bert-base and
bert-large are the published models (Devlin et al. 2019, arXiv:1810.04805; dropout apart, which presets leave alone); bert-345m is
Megatron-LM's BERT of the second one's size. llama-1b is Llama 3.2 1B, with its scaling of RoPE; llama-8b is Llama 3 8B, before Llama 3.1
scaled it (--rope-scaling-factor 8); both with the sequence length of their pre-training (Grattafiori et al. 2024, arXiv:2407.21783, and
the config.json of meta-llama/Llama-3.2-1B and meta-llama/Meta-Llama-3-8B).
"""

from __future__ import annotations

from typing import Any

from megactl.config.names import nearest
from megactl.errors import Problem

_GPT2_VOCAB, _SC21_VOCAB, _BERT_VOCAB, _LLAMA3_VOCAB = 50257, 51200, 30522, 128256

# name: (layers, hidden, heads, sequence length, vocabulary; None: the tokenizer's)
_SHAPES: dict[str, tuple[int, int, int, int, int | None]] = {
    "gpt-tiny": (4, 128, 4, 128, None),
    "gpt-345m": (24, 1024, 16, 1024, _GPT2_VOCAB),
    "gpt-1.3b": (24, 2048, 16, 2048, _GPT2_VOCAB),
    "gpt-1.7b": (24, 2304, 24, 2048, _SC21_VOCAB),
    "gpt-3.6b": (30, 3072, 32, 2048, _SC21_VOCAB),
    "gpt-7.5b": (36, 4096, 32, 2048, _SC21_VOCAB),
    "gpt-18b": (40, 6144, 48, 2048, _SC21_VOCAB),
    "gpt-39b": (48, 8192, 64, 2048, _SC21_VOCAB),
    "gpt-52b": (64, 8192, 32, 1024, _GPT2_VOCAB),
    "gpt-76b": (60, 10240, 80, 2048, _SC21_VOCAB),
    "gpt-145b": (80, 12288, 96, 2048, _SC21_VOCAB),
    "gpt-181b": (64, 15360, 32, 1024, _GPT2_VOCAB),
    "gpt-310b": (96, 16384, 128, 2048, _SC21_VOCAB),
    "gpt-530b": (105, 20480, 128, 2048, _SC21_VOCAB),
    "gpt-1t": (128, 25600, 160, 2048, _SC21_VOCAB),
    "llama-1b": (16, 2048, 32, 8192, _LLAMA3_VOCAB),
    "llama-8b": (32, 4096, 32, 8192, _LLAMA3_VOCAB),
    "bert-tiny": (4, 128, 4, 128, None),
    "bert-base": (12, 768, 12, 512, _BERT_VOCAB),
    "bert-large": (24, 1024, 16, 512, _BERT_VOCAB),
    "bert-345m": (24, 1024, 16, 512, _BERT_VOCAB),
}

_PUBLISHED_BERT = {"model.norm_position": "post", "model.gelu": "erf", "model.layernorm_epsilon": 1e-12}
_LLAMA3 = {
    "model.architecture": "gpt",
    "model.kv_heads": 8,
    "model.position_embedding": "rope",
    "model.rope_base": 500000.0,
    "model.normalization": "rmsnorm",
    "model.activation": "swiglu",
    "model.bias": False,
}
_MORE: dict[str, dict[str, Any]] = {
    "llama-1b": {**_LLAMA3, "model.ffn_size": 8192, "model.rope_scaling_factor": 32.0},
    "llama-8b": {**_LLAMA3, "model.ffn_size": 14336, "model.untie_embeddings": True},
    "bert-base": _PUBLISHED_BERT,
    "bert-large": _PUBLISHED_BERT,
}

PRESETS: tuple[str, ...] = tuple(_SHAPES)


def preset_values(name: str) -> dict[str, Any]:
    """The dotted settings that preset `name` sets. Raises KeyError for an unknown name; `preset_problem` words that for users."""
    layers, hidden, heads, seq_length, vocab = _SHAPES[name]
    values = {
        "model.architecture": name.partition("-")[0],
        "model.num_layers": layers,
        "model.hidden_size": hidden,
        "model.num_heads": heads,
        "training.seq_length": seq_length,
        **_MORE.get(name, {}),
    }
    return values if vocab is None else {**values, "model.vocab_size": vocab}


def preset_problem(name: str, where: str) -> Problem | None:
    """The mistake in a preset's name, with the nearest name, or None for a preset that exists."""
    if name in _SHAPES:
        return None
    close = nearest(name, PRESETS)
    return Problem(where, "no such preset", f"did you mean {close}?" if close else f"use one of {', '.join(PRESETS)}")
