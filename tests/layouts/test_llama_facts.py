"""Llama's shape in other systems' words: config.json, Megatron-LM's arguments; and a real folder of Hugging Face against our count."""

from __future__ import annotations

import pytest

from megactl.storage.layouts.facts import from_huggingface, from_megatron

CONFIG = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 16, "tie_word_embeddings": True, "attention_bias": False,
}  # fmt: skip
MEGATRON = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48, "padded_vocab_size": 64, "swiglu": True,
    "group_query_attention": True, "num_query_groups": 2, "normalization": "RMSNorm", "add_bias_linear": False,
    "position_embedding_type": "rope", "kv_channels": 8, "untie_embeddings_and_output_weights": True,
}  # fmt: skip
LLAMA = {
    "model.architecture": "gpt", "model.num_layers": 2, "model.hidden_size": 32, "model.num_heads": 4, "model.kv_heads": 2,
    "model.ffn_size": 48, "model.vocab_size": 64, "model.position_embedding": "rope", "model.normalization": "rmsnorm",
    "model.activation": "swiglu", "model.bias": False,
}  # fmt: skip


def test_config_json():
    assert from_huggingface(CONFIG) == ({**LLAMA, "model.max_positions": 16, "model.untie_embeddings": False}, None)
    untied, _ = from_huggingface({**CONFIG, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True})
    assert untied["model.untie_embeddings"] and untied["model.bias"]


@pytest.mark.parametrize(("change", "what"), [({"attention_bias": True}, "biases in attention or"), ({"head_dim": 16}, "shape of heads")])
def test_what_our_formulas_do_not_have(change, what):
    assert what in from_huggingface(CONFIG | change)[1]
    assert from_huggingface({**CONFIG, "head_dim": 8})[1] is None


def test_megatrons_arguments():
    settings, beyond = from_megatron(MEGATRON)
    assert beyond is None and settings == {**LLAMA, "model.untie_embeddings": True, "training.precision": "fp32"}
    # A plain GPT's arguments hold the switches as well, off, and the number of groups that belongs to them.
    off = {"swiglu": False, "group_query_attention": False, "num_query_groups": 1, "normalization": "LayerNorm", "add_bias_linear": True}
    settings, beyond = from_megatron({**MEGATRON, **off, "position_embedding_type": "learned_absolute"})
    assert beyond is None and not {"model.activation", "model.kv_heads", "model.bias", "model.position_embedding"} & set(settings)
    for change, what in (
        ({"kv_channels": 16}, "heads"),
        ({"position_embedding_type": "yarn"}, "positions"),
        ({"qk_layernorm": True}, "norms"),
    ):
        assert what in from_megatron(MEGATRON | change)[1]


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_of_hugging_face_has_as_many_elements_as_we_count(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    from megactl.commands.checkpoint_view import compare
    from megactl.storage.layouts import inspect

    settings = transformers.LlamaConfig(**{**CONFIG, "tie_word_embeddings": tied})
    transformers.LlamaForCausalLM(settings).save_pretrained(tmp_path)
    inventory = inspect(tmp_path)
    assert inventory.good and inventory.unpredictable is None
    comparison = compare(inventory, None)
    assert comparison is not None and not comparison.differs and comparison.rows[0][1] == comparison.rows[0][2] > 0
