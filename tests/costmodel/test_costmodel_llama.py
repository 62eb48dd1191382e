"""Llama's shapes: parameters as published and as built, FLOPs as torch counts them, bytes as a layer saves them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_costmodel_memory import saved_bytes

from megactl.config.load import load
from megactl.config.schema import Model
from megactl.costmodel.flops import forward_flops_per_token, model_flops, model_flops_per_token
from megactl.costmodel.memory import Layout, estimate_memory, layer_activations
from megactl.costmodel.parameters import ffn_width, parameter_parts, rank_parameters, total_parameters
from megactl.errors import ConfigError

TINY = Model(
    num_layers=2, hidden_size=64, num_heads=8, kv_heads=2, ffn_size=96, vocab_size=250, max_positions=32, position_embedding="rope",
    normalization="rmsnorm", activation="swiglu", bias=False, untie_embeddings=True,
)  # fmt: skip
# Each part alone beside what it replaces, and all of them.
PARTS = [
    {}, {"kv_heads": None}, {"kv_heads": 1}, {"position_embedding": "learned"}, {"normalization": "layernorm"}, {"activation": "gelu"},
    {"bias": True}, {"ffn_size": None}, {"rotary_percent": 0.5},
]  # fmt: skip
ONE = Layout(seq_length=32, micro_batch_size=3, num_microbatches=1)


@pytest.mark.parametrize(("preset", "total"), [("llama-1b", 1_235_814_400), ("llama-8b", 8_030_261_248)])
def test_presets_have_the_published_parameters(preset, total):
    """The numbers that Hugging Face's model pages of Llama-3.2-1B and Meta-Llama-3-8B give."""
    run = load(preset=preset, assignments=["data.mock_data=true"]).run
    parts = parameter_parts(run.model, seq_length=run.training.seq_length)
    assert sum(parts.values()) == total and parts["position_embeddings"] == 0


@pytest.mark.parametrize("preset", ["llama-1b", "llama-8b"])
def test_presets_are_their_configurations(preset):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model = load(preset=preset, assignments=["data.mock_data=true"]).run.model
    settings = transformers.LlamaConfig(
        num_hidden_layers=model.num_layers, hidden_size=model.hidden_size, num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_heads, intermediate_size=model.ffn_size, vocab_size=model.vocab_size,
        tie_word_embeddings=not model.untie_embeddings,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(settings)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == total_parameters(model)


@pytest.mark.parametrize("architecture", ["gpt", "bert"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("changes", PARTS, ids=str)
def test_counts_are_those_of_the_model_that_is_built(architecture, norm, changes):
    torch = pytest.importorskip("torch")
    from megactl.engine.models import MODELS

    config = replace(TINY, architecture=architecture, norm_position=norm, **changes)
    with torch.device("meta"):
        model = MODELS[architecture](config)
    assert sum(parameter.numel() for parameter in model.parameters()) == total_parameters(config)


def test_ranks_together_hold_the_model():
    """Norms are held by both tensor-parallel ranks; everything else is cut."""
    whole = total_parameters(replace(TINY, vocab_size=256))
    assert 2 * sum(rank_parameters(replace(TINY, vocab_size=256), tp=2, pp=2)) == whole + 5 * 64
    with pytest.raises(ConfigError, match="kv_heads = 2: must be a multiple of tensor_parallel = 4"):
        rank_parameters(TINY, tp=4, pp=1)


@pytest.mark.parametrize("architecture", ["gpt", "bert"])
@pytest.mark.parametrize("changes", PARTS, ids=str)
def test_torch_counts_the_same_flops(architecture, changes):
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from megactl.engine.models import MODELS
    from megactl.engine.models.layers import MicroBatch

    batch, seq = 2, 12
    config = replace(TINY, architecture=architecture, attention="unfused", **changes)
    model = MODELS[architecture](config)
    tokens = torch.randint(250, (batch, seq))
    types = torch.zeros(batch, seq, dtype=torch.int64) if architecture == "bert" else None
    micro_batch = MicroBatch(torch.tensor([1, 1, 0]), torch.arange(seq).expand(batch, seq), token_types=types)
    with FlopCounterMode(display=False) as counter:
        output = model(tokens, micro_batch)
        heads = output if isinstance(output, tuple) else (output,)
        sum(logits.square().sum() for logits in heads if logits is not None).backward()
    assert counter.get_total_flops() == model_flops(config, seq, batch)


def test_flops_of_llama_8b_by_hand():
    """Per layer and token: 2h(h + 2 h kv / heads + h) and 6hf; the head once; attention 4sh."""
    model = load(preset="llama-8b", assignments=["data.mock_data=true"]).run.model
    forward = forward_flops_per_token(model, 8192)
    assert forward["qkv"] + forward["attention_output"] == 32 * 2 * 4096 * (4096 + 2 * 1024 + 4096)
    assert forward["mlp"] == 32 * 6 * 4096 * 14336 and forward["head"] == 2 * 4096 * 128256
    assert forward["attention"] == 32 * 4 * 8192 * 4096
    # Six times the parameters that multiply, less the embedding's look-ups and the norms, plus attention.
    matrices = total_parameters(model) - 128256 * 4096 - 65 * 4096
    assert model_flops_per_token(model, 8192) == 6 * matrices + 3 * forward["attention"]


@pytest.mark.parametrize("attention", ["sdpa", "unfused"])
@pytest.mark.parametrize("changes", PARTS, ids=str)
def test_layer_keeps_exactly_what_the_model_saves(attention, changes):
    pytest.importorskip("torch")
    from megactl.engine import ops

    if not ops.use_compiled():
        pytest.skip("the reference operators keep more")
    config = replace(TINY, attention=attention, **changes)
    deeper = replace(config, num_layers=3)
    assert saved_bytes(deeper, ONE, "float32") - saved_bytes(config, ONE, "float32") == layer_activations(config, ONE)


def test_the_angles_are_kept_once_for_all_layers():
    tokens = 32 * 3
    plain = replace(TINY, position_embedding="learned")
    assert estimate_memory(TINY, ONE).activations - estimate_memory(plain, ONE).activations == 2 * 4 * tokens * 4


def test_memory_of_a_swiglu_layer_by_hand():
    """planner's table in units of sbh bytes at 2 bytes an element: 6 f/h for SwiGLU, 2 + 4g/a for q, k, v."""
    model = load(preset="llama-8b", assignments=["data.mock_data=true"]).run.model
    layout = Layout(seq_length=8192, micro_batch_size=1, num_microbatches=1, precision="bf16")
    sbh, tokens = 8192 * 4096, 8192
    statistics, logsumexp = 2 * 4 * tokens, 4 * 32 * tokens
    wanted = sbh * (8 + (2 + 4 * 8 / 32) + 2 + 6 * 14336 / 4096) + statistics + logsumexp
    assert layer_activations(model, layout) == wanted


@pytest.mark.parametrize(("hidden", "width"), [(4096, 10880), (2048, 5440), (768, 2048), (12, 64)])
def test_swiglu_has_two_thirds_of_the_width(hidden, width):
    """int(2/3 x 4h / 64) x 64, as Megatron-LM's --swiglu sets it."""
    assert ffn_width(Model(hidden_size=hidden, activation="swiglu")) == width
    assert ffn_width(Model(hidden_size=hidden)) == 4 * hidden
