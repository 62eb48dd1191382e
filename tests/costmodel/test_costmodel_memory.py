"""Memory: against the tensors the model really saves, against measured runs, and in its parts."""

from __future__ import annotations

import csv
import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from megactl.config.schema import Model
from megactl.costmodel.memory import Layout, estimate_memory, estimate_stage, estimate_stages, layer_activations
from megactl.costmodel.parameters import padded_vocab, rank_parameters
from megactl.errors import ConfigError

SHARED = Path(__file__).resolve().parents[3] / "shared"
SEED_TABLES = SHARED / "data" / "seed-tables"
TINY = Model(num_layers=2, hidden_size=64, num_heads=4, vocab_size=250, max_positions=32)
ONE = Layout(seq_length=32, micro_batch_size=3, num_microbatches=1)


def saved_bytes(config: Model, layout: Layout, dtype_name: str) -> int:
    """Bytes of distinct storages, parameters aside, that one forward of the real model keeps for its backward."""
    torch = pytest.importorskip("torch")
    from megactl.engine.models import MODELS
    from megactl.engine.models.layers import MicroBatch, Targets
    from megactl.engine.pipeline import padding_attention_mask

    torch.manual_seed(0)
    with torch.random.fork_rng():
        model = MODELS[config.architecture](config).to(getattr(torch, dtype_name))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    ids = torch.randint(config.vocab_size, (layout.micro_batch_size, layout.seq_length))
    positions = torch.arange(layout.seq_length).expand_as(ids)
    mask, token_types, labels = None, None, None
    if config.architecture == "bert":
        mask, token_types, labels = padding_attention_mask(positions < 20), positions // 20, ids[:, 0] % 2
    micro_batch = MicroBatch(rng=torch.tensor([1, 2, 0]), position_ids=positions, attention_mask=mask, token_types=token_types)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.loss_sums(model(ids, micro_batch), Targets(ids, torch.ones(ids.shape), labels))
    return sum(storages.values())


def compiled_dropout() -> bool:
    from megactl.engine import ops

    return ops.use_compiled()


@pytest.mark.parametrize("architecture", ["gpt", "bert"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
# Not sdpa with attention dropout: on CPU that has no fused kernel.
@pytest.mark.parametrize(
    ("attention", "hidden", "inside"), [("sdpa", 0.0, 0.0), ("sdpa", 0.1, 0.0), ("unfused", 0.0, 0.0), ("unfused", 0.1, 0.1)]
)
def test_layer_keeps_exactly_what_the_model_saves(
    architecture: str, norm: str, dtype: str, attention: str, hidden: float, inside: float
) -> None:
    pytest.importorskip("torch")
    if hidden and not compiled_dropout():
        pytest.skip("the reference dropout keeps masks; the estimate is for the compiled one")
    config = replace(TINY, architecture=architecture, norm_position=norm, attention=attention, hidden_dropout=hidden)
    config = replace(config, attention_dropout=inside, ffn_size=96)
    layout = replace(ONE, precision={"float32": "fp32", "float64": "fp64"}[dtype])
    deeper = replace(config, num_layers=3)
    assert saved_bytes(deeper, layout, dtype) - saved_bytes(config, layout, dtype) == layer_activations(config, layout)


def test_bfloat16_layer_keeps_what_the_model_saves() -> None:
    """On CPU LayerNorm and log-sum-exp may use another type for their few statistics than on a GPU."""
    pytest.importorskip("torch")
    for attention, architecture in itertools.product(("sdpa", "unfused"), ("gpt", "bert")):
        config, layout = replace(TINY, attention=attention, architecture=architecture), replace(ONE, precision="bf16")
        difference = saved_bytes(replace(config, num_layers=3), layout, "bfloat16") - saved_bytes(config, layout, "bfloat16")
        assert difference == pytest.approx(layer_activations(config, layout), rel=0.02)


@pytest.mark.parametrize(
    ("architecture", "norm", "inputs"), [("gpt", "pre", 2), ("gpt", "post", 1), ("bert", "pre", 5), ("bert", "post", 4)]
)
def test_whole_model_keeps_what_the_estimate_says(architecture: str, norm: str, inputs: int) -> None:
    """`inputs`: hidden states that the final norm and the heads keep."""
    pytest.importorskip("torch")
    config = replace(TINY, architecture=architecture, norm_position=norm)
    estimate = estimate_memory(config, ONE)
    # At rest after the loss, of the head's backward only what it starts from.
    tokens = 32 * 3
    at_rest = estimate.activations + inputs * 4 * tokens * 64 + 4 * tokens * 256
    assert saved_bytes(config, ONE, "float32") == pytest.approx(at_rest, rel=0.02)


def test_published_formula_of_korthikanti() -> None:
    """34 sbh + 5 a s^2 b of the paper, less what this engine does not keep (the masks of dropout)."""
    s, b, h, a = 1024, 4, 1024, 16
    model = Model(num_layers=1, hidden_size=h, num_heads=a, vocab_size=128, hidden_dropout=0.1, attention_dropout=0.1, attention="unfused")
    for t in (1, 2, 8):
        layout = Layout(seq_length=s, micro_batch_size=b, num_microbatches=1, tensor_parallel=t, precision="bf16")
        paper = s * b * h * (10 + 24 / t) + 5 * a * s * s * b / t
        difference = -2 * s * b * h - 1 * a * s * s * b / t + 16 * s * b
        assert layer_activations(model, layout) == paper + difference
        fused = replace(model, attention="sdpa", attention_dropout=0.0)
        assert layer_activations(fused, layout) == s * b * h * (8 + 24 / t) + 4 * a * s * b / t + 16 * s * b


@pytest.mark.skipif(not SEED_TABLES.exists(), reason="the published tables are not beside the repository")
@pytest.mark.parametrize(("tp", "pp"), [(4, 2), (8, 1)])
@pytest.mark.parametrize("seq", [512, 1024, 1536, 2048])
def test_measured_peaks_of_gpt2_345m(tp: int, pp: int, seq: int) -> None:
    """Eight measured runs of another system: fp16, 16 bytes a parameter at rest, dropout masks, logits also in fp32."""
    with (SEED_TABLES / f"002_gpt2345m_tp{tp}_pp{pp}_seq{seq}.csv").open() as file:
        measured = next(int(row["peak_memory_mb"]) for row in csv.DictReader(file) if row["strategy"] == "Baseline")
    model = Model(
        num_layers=24, hidden_size=1024, num_heads=16, vocab_size=50257, hidden_dropout=0.1, attention_dropout=0.1, attention="unfused"
    )
    layout = Layout(seq_length=seq, micro_batch_size=4, num_microbatches=4, tensor_parallel=tp, pipeline_parallel=pp, precision="bf16")
    estimate = estimate_stage(model, layout, 0)
    tokens, layers = 4 * seq, 24 // pp
    # Of every dropout a byte an element, on two hidden states and on the probabilities.
    masks, softmax = 2 * tokens * 1024, 16 * seq * tokens // tp
    # A copy of the logits in fp32 and its exponentials, where this engine needs the head's gradients instead.
    loss = (2 + 4 + 4) * tokens * padded_vocab(50257, tp) // tp + 2 * 2 * tokens * 1024 if pp == 1 else 0
    peak = max(loss, estimate.transient) - max(estimate.logits, estimate.transient)
    # The embedding's dropout has a mask, too; and the scores' product has a matrix of zeros to add to, one for all layers.
    embedding, zeros = estimate.live_microbatches * tokens * 1024, 2 * 16 * seq * tokens // tp
    theirs = estimate.total + peak - 2 * estimate.parameters + estimate.live_microbatches * layers * (masks + softmax) + embedding + zeros
    assert theirs / 2**20 == pytest.approx(measured, rel=0.03)


def test_bytes_a_parameter() -> None:
    """bf16 6 + 12/d and fp32 8 + 8/d with ZeRO-1; 18 and 16 without."""
    for precision, zero, d, expected in [
        ("bf16", 0, 4, 18), ("bf16", 1, 4, 9), ("bf16", 1, 12, 7), ("fp32", 0, 2, 16), ("fp32", 1, 2, 12), ("fp64", 0, 1, 32),
    ]:  # fmt: skip
        estimate = estimate_memory(TINY, replace(ONE, precision=precision, zero=zero, data_parallel=d))
        assert estimate.model_state == pytest.approx(expected * estimate.parameters, abs=1)


def test_stages_hold_what_their_schedule_holds() -> None:
    model = replace(TINY, num_layers=8)
    layout = replace(ONE, pipeline_parallel=4, num_microbatches=6)
    alternating = estimate_stages(model, layout)
    assert [e.live_microbatches for e in alternating] == [4, 3, 2, 1]
    assert [e.parameters for e in alternating] == list(rank_parameters(model, tp=1, pp=4))
    assert [bool(e.logits) for e in alternating] == [False, False, False, True]
    gpipe = estimate_stages(model, replace(layout, schedule="gpipe"))
    assert [e.live_microbatches for e in gpipe] == [6] * 4
    assert all(g.total > e.total for g, e in zip(gpipe, alternating, strict=True))
    assert estimate_memory(model, layout) == max(alternating, key=lambda e: e.total)


def test_interleaving_holds_more() -> None:
    """L (1 + (p-1)/(p v)) layers on the first rank (Korthikanti et al. 2022, section 4.2.3), beside L under 1F1B."""
    model, pp, layers = replace(TINY, num_layers=32), 4, 32
    layout = replace(ONE, pipeline_parallel=pp, num_microbatches=16)
    one_layer = layer_activations(model, layout)
    for vpp in (1, 2, 4, 8):
        first = estimate_stage(model, replace(layout, virtual_pipeline=vpp), 0)
        stages = pp * vpp
        live = pp if vpp == 1 else stages + pp - 1
        assert first.live_microbatches == live
        assert first.activations == live * (layers // stages * one_layer)
        if vpp > 1:
            assert live * layers // stages == pytest.approx(layers * (1 + (pp - 1) / (pp * vpp)))


def test_zero_bubble_memory() -> None:
    """ZB-H1 and ZB-V hold what 1F1B's first rank holds, on every rank; ZB-H2 about twice that."""
    model, layout = replace(TINY, num_layers=32), replace(ONE, pipeline_parallel=4, num_microbatches=16)
    plain = estimate_stages(model, layout)[0]
    assert [e.live_microbatches for e in estimate_stages(model, replace(layout, schedule="zb-h1"))] == [4] * 4
    assert [e.live_microbatches for e in estimate_stages(model, replace(layout, schedule="zb-h2"))] == [7] * 4
    folded = estimate_stages(model, replace(layout, schedule="zb-v"))
    assert [e.live_microbatches for e in folded] == [8] * 4
    one_layer = layer_activations(model, layout)
    assert plain.activations == 4 * 8 * one_layer
    assert folded[1].activations == 8 * 4 * one_layer
    assert [bool(e.logits) for e in folded] == [True, False, False, False]


def test_uneven_stages() -> None:
    model, layout = replace(TINY, num_layers=8), replace(ONE, pipeline_parallel=4, num_microbatches=6)
    even, uneven = estimate_stages(model, layout), estimate_stages(model, replace(layout, split="1,3,3,1"))
    one_layer = layer_activations(model, layout)
    differences = [u.activations - e.activations for u, e in zip(uneven, even, strict=True)]
    assert differences == [-4 * one_layer, 3 * one_layer, 2 * one_layer, -one_layer]
    assert [e.parameters for e in uneven] == list(rank_parameters(model, tp=1, pp=4, split="1,3,3,1"))
    # The fullest moment of interleaved stages depends on which of them are large.
    first = estimate_stage(model, replace(layout, pipeline_parallel=2, virtual_pipeline=2, split="4,1,1,2"), 0)
    other = estimate_stage(model, replace(layout, pipeline_parallel=2, virtual_pipeline=2, split="1,1,4,2"), 0)
    assert first.parameters == other.parameters and first.activations > other.activations


def test_total_is_state_plus_the_worse_of_loss_and_layer() -> None:
    estimate = estimate_memory(TINY, ONE)
    assert estimate.total == estimate.model_state + estimate.activations + max(estimate.logits, estimate.transient)
    assert estimate.as_dict()["total"] == estimate.total
    # A logit is held once, in its own type; the head's weight gradient is summed in its buffer, whatever that is of.
    logits, hidden = 32 * 3 * 256, 32 * 3 * 64
    assert estimate.logits == 3 * 4 * hidden + 4 * logits
    assert estimate_memory(TINY, replace(ONE, precision="bf16")).logits == 3 * 2 * hidden + 2 * logits


def test_everything_grows_the_right_way() -> None:
    base = estimate_memory(TINY, ONE).total
    assert estimate_memory(TINY, replace(ONE, micro_batch_size=4)).total > base
    assert estimate_memory(TINY, replace(ONE, tensor_parallel=2)).total < base
    assert estimate_memory(TINY, replace(ONE, precision="bf16")).total < estimate_memory(TINY, replace(ONE, precision="fp64")).total
    assert estimate_memory(replace(TINY, attention="unfused"), ONE).total > base
    # With attention dropout `auto` is the unfused path.
    dropped = replace(TINY, attention_dropout=0.1)
    assert estimate_memory(dropped, ONE).total == estimate_memory(replace(dropped, attention="unfused"), ONE).total


def test_refusals_name_everything_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        estimate_memory(TINY, replace(ONE, zero=4, micro_batch_size=0, data_parallel=-1))
    assert len(error.value.problems) == 3
    with pytest.raises(ConfigError, match="precision = 'fp8'"):
        estimate_memory(TINY, replace(ONE, precision="fp8"))
    with pytest.raises(ConfigError, match="num_layers = 2"):
        estimate_memory(TINY, replace(ONE, pipeline_parallel=4))
