"""The models are the published ones: BERT, Megatron's BERT and the first GPT, as Hugging Face computes them: outputs, loss, every gradient.

Against stored results everywhere (`bert_golden.py` made them), and against the library itself where it is installed.
"""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")

import bert_golden as golden  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from megactl.config.schema import Model  # noqa: E402
from megactl.engine.models import MODELS  # noqa: E402
from megactl.engine.models.layers import MicroBatch, Targets  # noqa: E402
from megactl.engine.pipeline import padding_attention_mask  # noqa: E402

LIMIT = 1e-12
HEAD_DIM = golden.HIDDEN // golden.HEADS
SIZES = dict(
    num_layers=golden.LAYERS, hidden_size=golden.HIDDEN, num_heads=golden.HEADS, ffn_size=golden.FFN, vocab_size=golden.VOCAB,
    max_positions=golden.POSITIONS,
)  # fmt: skip
CONFIGS = {
    "bert": Model(**SIZES, architecture="bert", norm_position="post", gelu="erf", layernorm_epsilon=1e-12),
    "megatron-bert": Model(**SIZES, architecture="bert", norm_position="pre", gelu="tanh", layernorm_epsilon=1e-12),
    "openai-gpt": Model(**SIZES | {"ffn_size": None}, architecture="gpt", norm_position="post", gelu="tanh", layernorm_epsilon=1e-5),
}

# ours -> theirs; a qkv of ours is three of theirs.
BERT_TOP = {
    "embedding.tokens.weight": "bert.embeddings.word_embeddings.weight",
    "embedding.positions.weight": "bert.embeddings.position_embeddings.weight",
    "embedding.token_types.weight": "bert.embeddings.token_type_embeddings.weight",
    "embedding.norm": "bert.embeddings.LayerNorm",
    "final_norm": "bert.encoder.ln",
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head.decoder.bias": "cls.predictions.bias",
    "head.sentence.pooler": "bert.pooler.dense",
    "head.sentence.classifier": "cls.seq_relationship",
}
BERT_BLOCK = {"attention.output": "attention.output.dense", "mlp.up": "intermediate.dense", "mlp.down": "output.dense"}
NORMS = {
    "bert": {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"},
    "megatron-bert": {"attention_norm": "attention.ln", "mlp_norm": "ln"},
}
GPT_BLOCK = {
    "attention.output": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
}


def their_tensor(kind, name, found, prefix):
    """Our parameter `name`, from their parameters or gradients (`prefix`), in our shape and order."""
    if kind == "openai-gpt":
        return gpt_tensor(name, found, prefix)
    stem, _, leaf = name.rpartition(".")
    if name in BERT_TOP:
        return found[f"{prefix}.{BERT_TOP[name]}"]
    if stem in BERT_TOP:
        return found[f"{prefix}.{BERT_TOP[stem]}.{leaf}"]
    _, layer, part = stem.split(".", 2)
    base = f"{prefix}.bert.encoder.layer.{layer}"
    if part == "attention.qkv":
        return by_head(torch.stack([found[f"{base}.attention.self.{which}.{leaf}"] for which in ("query", "key", "value")]))
    return found[f"{base}.{(BERT_BLOCK | NORMS[kind])[part]}.{leaf}"]


def gpt_tensor(name, found, prefix):
    top = {"embedding.tokens.weight": "tokens_embed.weight", "embedding.positions.weight": "positions_embed.weight"}
    if name in top:
        return found[f"{prefix}.transformer.{top[name]}"]
    _, layer, rest = name.split(".", 2)
    part, _, leaf = rest.rpartition(".")
    tensor = found[f"{prefix}.transformer.h.{layer}.{'attn.c_attn' if part == 'attention.qkv' else GPT_BLOCK[part]}.{leaf}"]
    tensor = tensor.t() if tensor.ndim == 2 else tensor
    return by_head(tensor.reshape(3, golden.HIDDEN, *tensor.shape[1:])) if part == "attention.qkv" else tensor


def by_head(parts):
    """Theirs: q, k, v of all heads each, [3, h, ...]. Ours: q, k, v of head 0, then of head 1, ..."""
    return parts.reshape(3, golden.HEADS, HEAD_DIM, *parts.shape[2:]).transpose(0, 1).reshape(-1, *parts.shape[2:])


def ours(kind, found, attention="auto", rows=None, **changes):
    """Our model with their weights. Rows of padding hold 100, so that their logits would win if they were read."""
    config = dataclasses.replace(CONFIGS[kind], attention=attention, **changes)
    model = MODELS[config.architecture](config, vocab_rows=rows).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = their_tensor(kind, name, found, "weight")
            parameter.fill_(100.0)
            parameter[: tensor.shape[0]].copy_(tensor)
    return model


def run(model, found):
    """Our outputs and loss, from the sums the engine would take."""
    tokens = found["tokens"]
    mask = padding_attention_mask(found["padding_mask"]) if "padding_mask" in found else None
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    output = model(tokens, MicroBatch(torch.zeros(3, dtype=torch.int64), positions, mask, token_types=found.get("token_types")))
    targets = Targets(found["labels"], found["loss_mask"], found.get("sentence_labels"))
    loss = (model.loss_sums(output, targets) / model.loss_counts(targets)).sum()
    return (output if isinstance(output, tuple) else (output, None)), loss


def compare(kind, found, **options):
    model = ours(kind, found, **options)
    (logits, sentence), loss = run(model, found)
    loss.backward()

    def close(mine, right, what, norm=None):
        error = (mine - right).norm() / (right.norm() if norm is None else norm)
        assert error <= LIMIT, f"{what}: relative error {error:.1e}"

    close(logits[..., : golden.VOCAB], found["logits"], "logits")
    if sentence is not None:
        close(sentence, found["sentence_logits"], "sentence logits")
    close(loss, found["loss"], "loss")
    gradients = [tensor for name, tensor in found.items() if name.startswith("grad.")]
    rms = torch.cat([tensor.flatten() for tensor in gradients]).square().mean().sqrt()
    for name, parameter in model.named_parameters():
        right = their_tensor(kind, name, found, "grad")
        # The key bias's gradient is zero but for rounding: errors are measured against the whole gradient's size per element as well.
        close(parameter.grad[: right.shape[0]], right, f"gradient of {name}", max(right.norm(), rms * right.numel() ** 0.5))
        assert not parameter.grad[right.shape[0] :].any(), "padding rows have no gradient"
    theirs = sum(tensor.numel() for name, tensor in found.items() if name.startswith("weight."))
    assert sum(their_tensor(kind, name, found, "weight").numel() for name, _ in model.named_parameters()) == theirs


@pytest.fixture(params=golden.KINDS)
def kind(request):
    return request.param


@pytest.fixture
def stored(kind):
    return load_file(golden.path_of(kind))


@pytest.mark.parametrize("attention", ["auto", "sdpa", "unfused"])
def test_stored_results(kind, stored, attention):
    compare(kind, stored, attention=attention)


def test_a_padded_vocabulary_changes_nothing(kind, stored):
    compare(kind, stored, rows=64)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_library_itself(kind, attention):
    pytest.importorskip("transformers")
    if attention == "sdpa" and kind != "bert":
        pytest.skip("the library has eager attention alone for this model")
    compare(kind, golden.make(kind, attention))


FAULTS = {
    "padding": (lambda found: found | {"padding_mask": torch.ones_like(found["padding_mask"])}, {}, "logits"),
    "token types": (lambda found: found | {"token_types": torch.zeros_like(found["token_types"])}, {}, "logits"),
    "norm position": (dict, {"layernorm_epsilon": 0.1}, "logits"),
    "gelu": (dict, {"gelu": "other"}, "logits"),
    "sentence labels": (lambda found: found | {"sentence_labels": 1 - found["sentence_labels"]}, {}, "loss"),
    "masked tokens": (lambda found: found | {"loss_mask": torch.ones_like(found["loss_mask"])}, {}, "loss"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("which", ["bert", "megatron-bert"])
def test_the_comparison_sees(which, fault):
    change, changes, seen = FAULTS[fault]
    found = load_file(golden.path_of(which))
    if "gelu" in changes:
        changes = {"gelu": {"tanh": "erf", "erf": "tanh"}[CONFIGS[which].gelu]}
    with pytest.raises(AssertionError, match=f"{seen}: relative error"):
        compare(which, change(found), **changes)
