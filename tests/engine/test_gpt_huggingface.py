"""The model is GPT-2: with the same weights it gives what Hugging Face's GPT2LMHeadModel gives: logits, loss and every gradient."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch.nn import functional as F  # noqa: E402

from megactl.config.schema import Model  # noqa: E402
from megactl.engine.models import GPT  # noqa: E402
from megactl.engine.models.layers import MicroBatch  # noqa: E402

LAYERS, HIDDEN, HEADS, VOCAB, POSITIONS, BATCH = 3, 48, 4, 97, 24, 2
GELU = {"tanh": "gelu_new", "erf": "gelu"}
# (theirs, ours) within a block. c_attn, c_proj and c_fc are Conv1D: [in, out], so the transpose of a linear's weight.
BLOCK = {
    "ln_1": "attention_norm",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.output",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
TOP = {
    "transformer.wte.weight": "embedding.tokens.weight",
    "transformer.wpe.weight": "embedding.positions.weight",
    "transformer.ln_f.weight": "final_norm.weight",
    "transformer.ln_f.bias": "final_norm.bias",
}


def names(untied):
    """Every parameter's name there -> its name here."""
    found = dict(TOP)
    for layer in range(LAYERS):
        for theirs, ours in BLOCK.items():
            for leaf in ("weight", "bias"):
                found[f"transformer.h.{layer}.{theirs}.{leaf}"] = f"layers.{layer}.{ours}.{leaf}"
    return found | ({"lm_head.weight": "head.weight"} if untied else {})


def ours_from_theirs(name, tensor):
    """A tensor of theirs (weight or gradient) in our shape and order."""
    if tensor.ndim == 2 and ("attn.c" in name or "mlp.c" in name):
        tensor = tensor.t()
    if "c_attn" in name:
        # Theirs: q of all heads, k of all heads, v of all heads. Ours: q, k, v of head 0, then of head 1, ...
        parts = tensor.reshape(3, HEADS, HIDDEN // HEADS, *tensor.shape[1:])
        tensor = parts.transpose(0, 1).reshape(tensor.shape)
    return tensor


def reference_model(gelu, untied, attention, dtype):
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=POSITIONS, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, activation_function=GELU[gelu],
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=not untied, attn_implementation=attention,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).to(dtype)
    # Their biases start at 0 and their norms at 1, where a wrong mapping would not show; larger weights make attention uneven.
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype), alpha=0.15)
    return model


def our_model(theirs, gelu, untied, attention, dtype, rows=None):
    config = Model(
        num_layers=LAYERS, hidden_size=HIDDEN, num_heads=HEADS, vocab_size=VOCAB, max_positions=POSITIONS, gelu=gelu,
        untie_embeddings=untied, attention=attention,
    )  # fmt: skip
    model = GPT(config, vocab_rows=rows).to(dtype)
    parameters, source = dict(model.named_parameters()), dict(theirs.named_parameters())
    mapped = names(untied)
    assert set(source) == set(mapped) and set(parameters) == set(mapped.values()), "every parameter has its partner"
    with torch.no_grad():
        for name, own in mapped.items():
            tensor = ours_from_theirs(name, source[name])
            parameters[own].fill_(100.0)
            parameters[own][: tensor.shape[0]].copy_(tensor)
    return model


def run_ours(model, tokens, labels, dtype):
    s = tokens.shape[1]
    micro_batch = MicroBatch(rng=torch.zeros(3, dtype=torch.int64), position_ids=torch.arange(s).expand(tokens.shape))
    logits = model(tokens, micro_batch)
    mask = torch.ones(labels.shape, dtype=dtype)
    return logits, model.loss_sum(logits, labels, mask) / mask.sum()


def compare(gelu="tanh", untied=False, attention="auto", their_attention="eager", dtype=torch.float64, rows=None, limit=1e-12):
    theirs = reference_model(gelu, untied, their_attention, dtype)
    ours = our_model(theirs, gelu, untied, attention, dtype, rows)
    stream = torch.randint(VOCAB, (BATCH, POSITIONS + 1), generator=torch.Generator().manual_seed(3))
    tokens, labels = stream[:, :-1], stream[:, 1:]
    their_logits = theirs(tokens).logits
    # Their own loss is always made in fp32, so it is made here from their logits.
    their_loss = F.cross_entropy(their_logits.flatten(0, 1), labels.flatten())
    logits, loss = run_ours(ours, tokens, labels, dtype)
    their_loss.backward()
    loss.backward()

    def close(found, right, what, norm=None):
        error = (found - right).norm() / (right.norm() if norm is None else norm)
        assert error <= limit, f"{what}: relative error {error:.1e}"

    close(logits[..., :VOCAB], their_logits, "logits")
    close(loss, their_loss, "loss")
    # The key bias's gradient is zero but for rounding: errors are measured against the whole gradient's size per element as well.
    all_norm = torch.cat([p.grad.flatten() for p in theirs.parameters()]).norm()
    count = sum(p.numel() for p in theirs.parameters())
    for name, own in names(untied).items():
        right = ours_from_theirs(name, theirs.get_parameter(name).grad)
        found = ours.get_parameter(own).grad
        floor = all_norm * (right.numel() / count) ** 0.5
        close(found[: right.shape[0]], right, f"gradient of {own}", max(right.norm(), floor))
        assert not found[right.shape[0] :].any(), "padding rows have no gradient"
    return theirs, ours, tokens, labels, loss


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_float64(gelu, untied):
    compare(gelu, untied)


@pytest.mark.parametrize("attention", ["sdpa", "unfused"])
@pytest.mark.parametrize("their_attention", ["eager", "sdpa"])
def test_every_attention(attention, their_attention):
    compare(attention=attention, their_attention=their_attention)


@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_float32(gelu):
    theirs, _, tokens, _, _ = compare(gelu, dtype=torch.float32, limit=2e-6)
    # And their own loss, which shifts the labels by itself.
    ours = our_model(theirs, gelu, False, "auto", torch.float32)
    _, loss = run_ours(ours, tokens[:, :-1], tokens[:, 1:], torch.float32)
    torch.testing.assert_close(loss, theirs(tokens, labels=tokens).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("untied", [False, True])
def test_a_padded_vocabulary_changes_nothing(untied):
    """The padding rows hold 100 here, so that their logits would win if they were read."""
    compare(untied=untied, rows=128)


def test_the_comparison_sees_a_wrong_order_of_qkv(monkeypatch):
    """The proof can fail: with their order of rows the logits differ."""
    right = ours_from_theirs
    monkeypatch.setattr(f"{__name__}.ours_from_theirs", lambda name, t: right(name.replace("c_attn", "c_proj"), t))
    with pytest.raises(AssertionError, match="logits: relative error"):
        compare()


def test_the_comparison_sees_the_other_gelu(monkeypatch):
    monkeypatch.setitem(GELU, "tanh", "gelu")
    with pytest.raises(AssertionError, match="logits: relative error"):
        compare("tanh")
