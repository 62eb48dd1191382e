"""Our Llama-shaped GPT against Hugging Face's Llama: the same weights give the same logits, loss and gradients, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megactl.config.schema import Model
from megactl.engine.models import GPT
from megactl.engine.models.layers import MicroBatch
from megactl.engine.models.rotary import rotary_frequencies

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

LAYERS, HIDDEN, HEADS, KV_HEADS, FFN, VOCAB, POSITIONS, BATCH = 3, 64, 8, 2, 96, 101, 24, 2
# Original positions so few that the tiny model has wavelengths of all three kinds: kept, stretched, and between.
SCALED = {"rope_scaling_factor": 32.0, "rope_original_positions": 128}


def config(**changes) -> Model:
    shape = {
        "num_layers": LAYERS, "hidden_size": HIDDEN, "num_heads": HEADS, "kv_heads": KV_HEADS, "ffn_size": FFN, "vocab_size": VOCAB,
        "max_positions": POSITIONS, "position_embedding": "rope", "rope_base": 500000.0, "normalization": "rmsnorm",
        "activation": "swiglu", "bias": False, "layernorm_epsilon": 1e-5,
    }  # fmt: skip
    return Model(**{**shape, **changes})


def their_model(ours: Model, dtype: torch.dtype):
    """LlamaForCausalLM of the same shape, with drawn weights."""
    rope = {"rope_theta": ours.rope_base, "rope_type": "default"}
    if ours.rope_scaling_factor != 1:
        rope |= {
            "rope_type": "llama3", "factor": ours.rope_scaling_factor, "low_freq_factor": ours.rope_low_frequency,
            "high_freq_factor": ours.rope_high_frequency, "original_max_position_embeddings": ours.rope_original_positions,
        }  # fmt: skip
    settings = transformers.LlamaConfig(
        num_hidden_layers=ours.num_layers, hidden_size=ours.hidden_size, num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.key_value_heads, intermediate_size=ours.mlp_width, vocab_size=ours.vocab_size,
        max_position_embeddings=ours.max_positions, rms_norm_eps=ours.layernorm_epsilon, tie_word_embeddings=not ours.untie_embeddings,
        attention_bias=ours.bias, mlp_bias=ours.bias, hidden_act="silu", attn_implementation="sdpa", rope_parameters=rope,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(11)
    model = transformers.LlamaForCausalLM(settings).to(dtype).eval()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            # Theirs rounds to float32 on the way, whatever the type of the model is; the formula is the same. (So does their eager
            # attention, which is why it is not asked for.)
            module.forward = lambda x, norm=module: F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2 + (parameter.ndim == 1))
    return model


def ours_from_theirs(theirs: dict[str, torch.Tensor], ours: Model) -> dict[str, torch.Tensor]:
    """Their tensors (weights or gradients) by our names: nothing is permuted within a head, gate and up are stacked."""
    kv, d = ours.key_value_heads, ours.hidden_size // ours.num_heads
    found = {"embedding.tokens.weight": theirs["model.embed_tokens.weight"], "final_norm.weight": theirs["model.norm.weight"]}
    if ours.untie_embeddings:
        found["head.weight"] = theirs["lm_head.weight"]
    for i in range(ours.num_layers):
        their, our = f"model.layers.{i}", f"layers.{i}"
        found[f"{our}.attention_norm.weight"] = theirs[f"{their}.input_layernorm.weight"]
        found[f"{our}.mlp_norm.weight"] = theirs[f"{their}.post_attention_layernorm.weight"]
        for kind in ("weight", "bias") if ours.bias else ("weight",):
            q, k, v = (theirs[f"{their}.self_attn.{name}_proj.{kind}"] for name in "qkv")
            groups = [part.reshape(kv, -1, d, *part.shape[1:]) for part in (q, k, v)]
            found[f"{our}.attention.qkv.{kind}"] = torch.cat(groups, dim=1).flatten(0, 2)
            found[f"{our}.attention.output.{kind}"] = theirs[f"{their}.self_attn.o_proj.{kind}"]
            gate_up = [theirs[f"{their}.mlp.{name}_proj.{kind}"] for name in ("gate", "up")]
            found[f"{our}.mlp.gate_up.{kind}"] = torch.stack(gate_up)
            found[f"{our}.mlp.down.{kind}"] = theirs[f"{their}.mlp.down_proj.{kind}"]
    return found


def compare(ours: Model, dtype: torch.dtype = torch.float64, limit: float = 1e-12, position_ids: torch.Tensor | None = None) -> None:
    theirs = their_model(ours, dtype)
    model = GPT(ours).to(dtype)
    weights = ours_from_theirs(dict(theirs.named_parameters()) | {"lm_head.weight": theirs.lm_head.weight}, ours)
    named = {model.canonical_name(name): parameter for name, parameter in model.named_parameters()}
    assert set(named) == set(weights), "every parameter has its partner"
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])
    stream = torch.randint(VOCAB, (BATCH, POSITIONS + 1), generator=torch.Generator().manual_seed(3))
    tokens, labels = stream[:, :-1], stream[:, 1:]
    if position_ids is None:
        position_ids = torch.arange(POSITIONS).expand(BATCH, -1)
    # Their mask, given whole, or they would cut the attention where positions start again.
    causal = torch.full((POSITIONS, POSITIONS), torch.finfo(dtype).min, dtype=dtype).triu(1).expand(BATCH, 1, -1, -1)
    their_logits = theirs(tokens, position_ids=position_ids, attention_mask=causal).logits
    F.cross_entropy(their_logits.flatten(0, 1), labels.flatten()).backward()
    logits = model(tokens, MicroBatch(rng=torch.zeros(3, dtype=torch.int64), position_ids=position_ids))
    loss = model.loss_sum(logits, labels, torch.ones(labels.shape, dtype=dtype)) / labels.numel()
    close(logits, their_logits, "logits", limit)
    loss.backward()
    gradients = ours_from_theirs({name: p.grad for name, p in theirs.named_parameters()}, ours)
    everything = torch.cat([p.grad.flatten() for p in theirs.parameters()])
    for name, parameter in named.items():
        floor = float(everything.norm()) * (parameter.numel() / everything.numel()) ** 0.5
        close(parameter.grad, gradients[name], f"gradient of {name}", limit, floor)


def close(found: torch.Tensor, right: torch.Tensor, what: str, limit: float, floor: float = 0.0) -> None:
    error = float((found - right).detach().norm() / max(float(right.detach().norm()), floor))
    assert error <= limit, f"{what}: relative error {error:.1e}"


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("scaling", [{}, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("attention", ["sdpa", "unfused"])
def test_float64(untied, scaling, attention):
    compare(config(untie_embeddings=untied, attention=attention, **scaling))


@pytest.mark.parametrize(
    "changes", [{"kv_heads": 8}, {"kv_heads": 1}, {"kv_heads": None}, {"bias": True}, {"bias": True, "kv_heads": 4}], ids=str
)
def test_other_groups_and_biases(changes):
    compare(config(**changes))


def test_float32():
    compare(config(**SCALED), torch.float32, 5e-6)


@pytest.mark.parametrize("attention", ["sdpa", "unfused"])
def test_positions_that_start_again(attention):
    """--reset-position-ids: the angles follow the ids, not the place in the sequence."""
    ids = torch.stack([torch.cat([torch.arange(9), torch.arange(POSITIONS - 9)]), torch.arange(POSITIONS) * 3])
    compare(config(attention=attention, **SCALED), position_ids=ids)


@pytest.mark.parametrize(("factor", "base", "width"), [(1.0, 10000.0, 64), (8.0, 500000.0, 128), (32.0, 500000.0, 64)])
def test_frequencies_are_theirs_to_the_last_bit(factor, base, width):
    ours = config(num_layers=1, hidden_size=width * 2, num_heads=2, kv_heads=1, rope_base=base, rope_scaling_factor=factor)
    theirs = their_model(ours, torch.float32).model.rotary_emb
    assert torch.equal(rotary_frequencies(ours), theirs.inv_freq)
    assert (rotary_frequencies(ours)[-1] < rotary_frequencies(config(hidden_size=width * 8, rope_base=base))[-1]) == (factor > 1)


def test_the_comparison_sees_another_order_of_rows(monkeypatch):
    """The proof can fail: with the keys of two groups exchanged the logits differ."""
    right = ours_from_theirs

    def wrong(theirs, ours):
        found = right(theirs, ours)
        d = ours.hidden_size // ours.num_heads
        rows = found["layers.0.attention.qkv.weight"].view(ours.key_value_heads, -1, d, ours.hidden_size).clone()
        rows[:, 4] = rows[:, 4].flip(0)
        return found | {"layers.0.attention.qkv.weight": rows.view(-1, ours.hidden_size)}

    monkeypatch.setattr(f"{__name__}.ours_from_theirs", wrong)
    with pytest.raises(AssertionError, match="logits: relative error"):
        compare(config())
