"""FLOPs against closed forms, published figures and torch's own counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megactl.config.schema import Model
from megactl.costmodel.flops import (
    forward_flops_per_token,
    hardware_flops,
    model_flops,
    model_flops_per_token,
    published_selective_flops,
    sc21_flops,
    seed_tflops,
    utilization,
)
from megactl.errors import ConfigError

GPT2 = Model(num_layers=12, hidden_size=768, num_heads=12, vocab_size=50304)
sizes = st.integers(1, 64)


@given(layers=sizes, hidden=sizes, vocab=sizes, seq=sizes, batch=sizes)
def test_equal_to_the_closed_forms_of_sc21(layers: int, hidden: int, vocab: int, seq: int, batch: int) -> None:
    model = Model(num_layers=layers, hidden_size=hidden, num_heads=1, vocab_size=vocab)
    assert model_flops(model, seq, batch) == pytest.approx(sc21_flops(model, seq, batch, recompute=False), rel=1e-12)
    assert hardware_flops(model, seq, batch, recompute="full") == pytest.approx(sc21_flops(model, seq, batch, recompute=True), rel=1e-12)
    assert hardware_flops(model, seq, batch) == model_flops(model, seq, batch)


def test_published_flops_per_token_of_gpt2() -> None:
    # 854.7M is the structural count that careful peers print for GPT-2 small with 50304 tokens at length 1024.
    assert model_flops_per_token(GPT2, 1024) / 1e6 == pytest.approx(854.7, abs=0.1)


def test_causal_halves_attention_only() -> None:
    full, causal = (forward_flops_per_token(GPT2, 1024, causal=causal) for causal in (False, True))
    assert causal["attention"] * 2 == full["attention"] == 4 * 1024 * 768 * 12
    assert {k: v for k, v in full.items() if k != "attention"} == {k: v for k, v in causal.items() if k != "attention"}


def test_tying_the_head_changes_no_flops_and_ffn_does() -> None:
    assert model_flops(replace(GPT2, untie_embeddings=True), 128, 2) == model_flops(GPT2, 128, 2)
    narrow = replace(GPT2, ffn_size=768)
    assert model_flops(GPT2, 128, 2) - model_flops(narrow, 128, 2) == 6 * 2 * 128 * 12 * 2 * 768 * 3 * 768


def test_recomputation() -> None:
    forward = forward_flops_per_token(GPT2, 512)
    extra = {kind: hardware_flops(GPT2, 512, 1, recompute=kind) - model_flops(GPT2, 512, 1) for kind in ("none", "selective", "full")}
    assert extra == {"none": 0, "selective": 512 * forward["attention"], "full": 512 * (sum(forward.values()) - forward["head"])}
    with pytest.raises(ConfigError, match=r"recompute = 'some'.*none, selective, full"):
        hardware_flops(GPT2, 512, 1, recompute="some")


@pytest.mark.parametrize("ffn", [None, 48])
def test_torch_counts_the_same(ffn: int | None) -> None:
    """A GPT composed of plain torch operations, unfused attention over the whole square, counted in forward and backward."""
    torch = pytest.importorskip("torch")
    from torch.nn import functional
    from torch.utils.flop_counter import FlopCounterMode

    config = Model(num_layers=2, hidden_size=16, num_heads=2, ffn_size=ffn, vocab_size=50)
    h, f, heads, batch, seq = 16, ffn or 64, 2, 3, 10
    weights = [torch.randn(*shape, requires_grad=True) for _ in range(2) for shape in ((3 * h, h), (h, h), (f, h), (h, f))]
    table = torch.randn(50, h, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        x = functional.embedding(torch.randint(50, (batch, seq)), table)
        for layer in range(2):
            qkv, out, up, down = weights[4 * layer : 4 * layer + 4]
            q, k, v = ((x @ qkv.t()).view(batch, seq, 3, heads, -1).permute(2, 0, 3, 1, 4)).unbind(0)
            y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
            x = x + y.transpose(1, 2).reshape(batch, seq, h) @ out.t()
            x = x + functional.gelu(x @ up.t()) @ down.t()
        functional.cross_entropy((x @ table.t()).flatten(0, 1), torch.randint(50, (batch * seq,))).backward()
    assert counter.get_total_flops() == model_flops(config, seq, batch)


@pytest.mark.parametrize("sentence_head", [True, False])
def test_torch_counts_the_same_for_bert(sentence_head: bool) -> None:
    """An encoder composed of plain torch operations, forward and backward; attention over the whole square in either convention."""
    torch = pytest.importorskip("torch")
    from torch.nn import functional
    from torch.utils.flop_counter import FlopCounterMode

    h, f, heads, batch, seq = 16, 64, 2, 3, 10
    config = Model(architecture="bert", num_layers=2, hidden_size=h, num_heads=heads, vocab_size=50, sentence_head=sentence_head)
    weights = [torch.randn(*shape, requires_grad=True) for _ in range(2) for shape in ((3 * h, h), (h, h), (f, h), (h, f))]
    table, dense, pooler, classes = (torch.randn(rows, h, requires_grad=True) for rows in (50, h, h, 2))
    with FlopCounterMode(display=False) as counter:
        x = functional.embedding(torch.randint(50, (batch, seq)), table)
        for layer in range(2):
            qkv, out, up, down = weights[4 * layer : 4 * layer + 4]
            q, k, v = ((x @ qkv.t()).view(batch, seq, 3, heads, -1).permute(2, 0, 3, 1, 4)).unbind(0)
            y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
            x = x + y.transpose(1, 2).reshape(batch, seq, h) @ out.t()
            x = x + functional.gelu(x @ up.t()) @ down.t()
        logits = functional.gelu(x @ dense.t()) @ table.t()
        loss = functional.cross_entropy(logits.flatten(0, 1), torch.randint(50, (batch * seq,)))
        if sentence_head:
            loss = loss + functional.cross_entropy(torch.tanh(x[:, 0] @ pooler.t()) @ classes.t(), torch.randint(2, (batch,)))
        loss.backward()
    assert counter.get_total_flops() == model_flops(config, seq, batch) == model_flops(config, seq, batch, causal=True)
    assert model_flops_per_token(config, seq) == counter.get_total_flops() / (batch * seq)
    speed = utilization(config, seq_length=seq, global_batch=batch, seconds=1.0, gpus=1, recompute="full")
    assert speed.mfu_tflops == speed.causal_mfu_tflops < speed.hfu_tflops


def test_seed_rule_of_thumb() -> None:
    assert seed_tflops(billions=52, seconds=127, gpus=64, global_batch=1024) == pytest.approx(53.7, abs=0.05)
    assert seed_tflops(billions=52, seconds=127, gpus=64, global_batch=1024, factor=3) == pytest.approx(40.2, abs=0.1)


def test_sc21_table_1_is_hardware_utilisation() -> None:
    """530B: 163 TFLOP/s by the paper, 52 % of an A100; the time is chosen to give that."""
    model = Model(num_layers=105, hidden_size=20480, num_heads=128, vocab_size=51200)
    seconds = sc21_flops(model, 2048, 2520, recompute=True) / (163e12 * 2520)
    speed = utilization(model, seq_length=2048, global_batch=2520, seconds=seconds, gpus=2520, peak_tflops=312, recompute="full")
    assert speed.hfu_tflops == pytest.approx(163) and speed.hfu == pytest.approx(0.522, abs=1e-3)
    assert speed.mfu < speed.hfu and speed.causal_mfu < speed.mfu
    assert speed.mfu_tflops * 4 / 3 == pytest.approx(163, rel=0.01)
    assert set(speed.as_dict()) >= {"hfu_tflops", "mfu_tflops", "causal_mfu_tflops", "hfu", "mfu"}


def test_unknown_peak_gives_no_share() -> None:
    speed = utilization(GPT2, seq_length=8, global_batch=1, seconds=1.0, gpus=1)
    assert speed.mfu is None and speed.hfu is None and speed.causal_mfu is None and speed.mfu_tflops > 0
    with pytest.raises(ConfigError, match="seconds = 0"):
        utilization(GPT2, seq_length=8, global_batch=1, seconds=0, gpus=1)


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "mfu", "hfu"),
    [(48, 6144, 64, 41.5, 43.7), (96, 12288, 96, 51.4, 52.8), (105, 20480, 128, 56.0, 57.0), (128, 25600, 160, 56.3, 57.0)],
)
def test_published_pairs_of_mfu_and_hfu_with_selective_recomputation(layers: int, hidden: int, heads: int, mfu: float, hfu: float) -> None:
    """Korthikanti et al. 2022, table 5: the ratio of each pair lies within the rounding of both; the structural count does not reach it."""
    model = Model(num_layers=layers, hidden_size=hidden, num_heads=heads, vocab_size=51200)
    ratio = published_selective_flops(model, 2048, 1) / model_flops(model, 2048, 1)
    assert (hfu - 0.05) / (mfu + 0.05) <= ratio <= (hfu + 0.05) / (mfu - 0.05)
    assert hardware_flops(model, 2048, 1, recompute="selective") / model_flops(model, 2048, 1) < (hfu - 0.05) / (mfu + 0.05)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize(("architecture", "sentence_head"), [("gpt", None), ("bert", True), ("bert", False)])
def test_torch_counts_the_same_for_the_models_that_train(architecture: str, untied: bool, sentence_head: bool | None) -> None:
    """Forward and backward of megactl's own models, with attention written out, so that torch's counter sees every product."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from megactl.engine.models import MODELS
    from megactl.engine.models.layers import MicroBatch

    batch, seq = 2, 12
    config = Model(
        architecture=architecture, num_layers=2, hidden_size=16, num_heads=2, vocab_size=128, max_positions=seq, untie_embeddings=untied,
        sentence_head=sentence_head, attention="unfused",
    )  # fmt: skip
    model = MODELS[architecture](config)
    tokens = torch.randint(128, (batch, seq))
    types = torch.zeros(batch, seq, dtype=torch.int64) if architecture == "bert" else None
    micro_batch = MicroBatch(torch.tensor([1, 1, 0]), torch.arange(seq).expand(batch, seq), token_types=types)
    with FlopCounterMode(display=False) as counter:
        output = model(tokens, micro_batch)
        heads = output if isinstance(output, tuple) else (output,)
        sum(logits.square().sum() for logits in heads if logits is not None).backward()
    assert counter.get_total_flops() == model_flops(config, seq, batch)
