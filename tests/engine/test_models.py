"""The models themselves: initial values, sizes, stages that make up the whole, and who may look at whom."""

from __future__ import annotations

import dataclasses
import math

import pytest

torch = pytest.importorskip("torch")

from megactl.config.load import load  # noqa: E402
from megactl.config.presets import PRESETS  # noqa: E402
from megactl.config.schema import Model  # noqa: E402
from megactl.costmodel import parameters as costs  # noqa: E402
from megactl.engine import ops  # noqa: E402
from megactl.engine.models import GPT, MODELS  # noqa: E402
from megactl.engine.models.layers import CoreAttention, MicroBatch  # noqa: E402

CONFIG = Model(num_layers=4, hidden_size=32, num_heads=4, vocab_size=61, max_positions=16)
B, S = 2, 16


def built(config=CONFIG, dtype=torch.float64, **options):
    """A GPT whose parameters are drawn by their canonical names, so that stages of one model agree; biases are not zero."""
    model = GPT(config, **options).to(dtype)
    fill(model)
    return model


def fill(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            rectangle = [(0, size) for size in shape]
            ops.normal_(
                parameter.data, logical_shape=shape, rectangle=rectangle, seed=5, stream=ops.stream_of(model.canonical_name(name)), std=0.3
            )
            if "norm.weight" in name:
                parameter.add_(1.0)


def micro_batch(rows=B, length=S, step=0, **options):
    ids = torch.arange(length).expand(rows, length)
    return MicroBatch(rng=torch.tensor([11, step, 0]), **{"position_ids": ids, **options})


def some_tokens(rows=B, length=S, seed=0, vocab=CONFIG.vocab_size):
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model, tokens, batch):
    """Loss over the next tokens and every gradient by name."""
    model.zero_grad()
    logits = model(tokens, batch)
    loss = model.loss_sum(logits, tokens.roll(-1, 1), torch.ones(tokens.shape, dtype=logits.dtype))
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def initial_values(model):
    """name -> (initial, parameter), a shared parameter once for every module that holds it."""
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            yield f"{prefix}.{leaf}", module.initial[leaf], parameter


@pytest.mark.parametrize("untied", [False, True])
def test_initial_values_are_gpt2s(untied):
    """normal(0, std) for matrices, std / sqrt(2 L) for the two that write to the residual stream, 0 for biases, 1 for norms."""
    config = dataclasses.replace(CONFIG, untie_embeddings=untied, init_std=0.05)
    found = {name: (initial.std, initial.constant) for name, initial, _ in initial_values(GPT(config))}
    residual = 0.05 / math.sqrt(2 * config.num_layers)
    for name, values in found.items():
        if name.endswith(("attention.output.weight", "mlp.down.weight")):
            assert values == (pytest.approx(residual), 0.0), name
        elif "norm.weight" in name:
            assert values == (0.0, 1.0), name
        elif name.endswith(".bias"):
            assert values == (0.0, 0.0), name
        else:
            assert values == (0.05, 0.0), name
    assert len(found) == 4 + 1 + 12 * config.num_layers


def test_initial_values_have_their_statistics():
    """As drawn by name: mean 0, the right deviation, normal tails; and no two weights alike."""
    config = dataclasses.replace(CONFIG, hidden_size=128, num_layers=2, vocab_size=500)
    seen = []
    for name, initial, parameter in initial_values(GPT(config)):
        if initial.std == 0.0 or parameter.numel() < 10_000 or name.startswith("head"):
            continue
        drawn = torch.empty(parameter.shape, dtype=torch.float64)
        rectangle = [(0, size) for size in drawn.shape]
        ops.normal_(drawn, logical_shape=drawn.shape, rectangle=rectangle, seed=1, stream=ops.stream_of(name), std=initial.std)
        count = drawn.numel()
        # Four standard errors: of a mean, of a deviation, of the share beyond two deviations (4.55 %).
        assert abs(drawn.mean()) < 4 * initial.std / count**0.5
        assert abs(drawn.std() / initial.std - 1) < 4 / (2 * count) ** 0.5
        beyond = (drawn.abs() > 2 * initial.std).double().mean().item()
        assert abs(beyond - 0.0455) < 4 * (0.0455 / count) ** 0.5
        seen.append(drawn.flatten()[:100] / initial.std)
    assert len(seen) == 1 + 4 * config.num_layers
    assert torch.corrcoef(torch.stack(seen)).fill_diagonal_(0).abs().max() < 0.5


def test_every_initial_value_names_a_parameter():
    """A parameter without one would keep whatever was in memory."""
    for module in GPT(CONFIG).modules():
        assert {name for name, _ in module.named_parameters(recurse=False)} == set(getattr(module, "initial", {}))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_parameters_the_cost_model_counts(preset):
    run = load(preset=preset).run
    config = dataclasses.replace(run.model, vocab_size=run.model.vocab_size or 257, max_positions=run.training.seq_length)
    for untied in (False, True):
        config = dataclasses.replace(config, untie_embeddings=untied)
        with torch.device("meta"):
            model = MODELS[config.architecture](config)
        assert sum(parameter.numel() for parameter in model.parameters()) == costs.total_parameters(config)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_stages_have_the_parameters_the_cost_model_counts(untied, stages):
    config = dataclasses.replace(CONFIG, untie_embeddings=untied, ffn_size=80)
    rows = costs.padded_vocab(config.vocab_size, 1)
    for stage, layers in enumerate(costs.split_layers(config.num_layers, stages)):
        part = GPT(config, layers=layers, first=stage == 0, last=stage == stages - 1, vocab_rows=rows)
        counted = sum(costs.stage_parts(config, tp=1, num_stages=stages, stage=stage).values())
        assert sum(parameter.numel() for parameter in part.parameters()) == counted


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("split", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1, 2], [3]], [[0, 1, 2, 3], []]])
def test_stages_make_up_the_whole_model(untied, split):
    """Logits, loss and gradients, with dropout on: the numbers of a layer's dropout belong to the layer, not to the stage."""
    config = dataclasses.replace(CONFIG, untie_embeddings=untied, hidden_dropout=0.2, attention_dropout=0.1)
    whole, tokens, batch = built(config), some_tokens(), micro_batch()
    loss, right = gradients(whole, tokens, batch)
    stages = [built(config, layers=layers, first=i == 0, last=i == len(split) - 1) for i, layers in enumerate(split)]
    x, edges = tokens, []
    for stage in stages:
        if x.is_floating_point():
            # A stage boundary: the next stage's input is a leaf of its own graph.
            edges.append((x, x.detach().requires_grad_()))
            x = edges[-1][1]
        x = stage(x, batch)
    assert torch.equal(x, whole(tokens, batch))
    found_loss = stages[-1].loss_sum(x, tokens.roll(-1, 1), torch.ones(tokens.shape, dtype=x.dtype))
    close(found_loss, loss)
    found_loss.backward()
    for sent, received in reversed(edges):
        sent.backward(received.grad)
    found = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            name = stage.canonical_name(name)
            # A tied weight is on both ends; its gradient is the sum.
            found[name] = found.get(name, 0) + parameter.grad
    assert found.keys() == right.keys()
    for name, gradient in right.items():
        close(found[name], gradient)


def test_names_are_those_of_the_whole_model():
    whole = {name for name, _ in built().named_parameters()}
    stages = [GPT(CONFIG, layers=[0, 1], last=False), GPT(CONFIG, layers=[2, 3], first=False)]
    named = [stage.canonical_name(name) for stage in stages for name, _ in stage.named_parameters()]
    assert set(named) == whole and sorted(named).count("embedding.tokens.weight") == 2
    assert [len(stage.units()) for stage in stages] == [3, 4]


@pytest.mark.parametrize("attention", ["sdpa", "unfused"])
def test_attention_is_the_published_formula(attention):
    """softmax(Q K^T / sqrt(d)) V (Vaswani et al. 2017), position by position over what stands before it."""
    core = CoreAttention(num_heads=2, head_dim=5, dropout=0.0, implementation=attention, site=0)
    q, k, v = torch.randn(3, B, 2, 7, 5, dtype=torch.float64)
    found = core(q, k, v, micro_batch(length=7))
    for i in range(7):
        scores = torch.einsum("bnd,bnsd->bns", q[:, :, i], k[:, :, : i + 1]) / math.sqrt(5)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        close(found[:, :, i], torch.einsum("bns,bnsd->bnd", weights, v[:, :, : i + 1]))


@pytest.mark.parametrize("attention", ["sdpa", "unfused"])
def test_the_future_does_not_change_the_past(attention):
    model = built(dataclasses.replace(CONFIG, attention=attention))
    tokens, changed = some_tokens(), some_tokens()
    changed[:, 9] = (changed[:, 9] + 1) % CONFIG.vocab_size
    before, after = model(tokens, micro_batch()), model(changed, micro_batch())
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(-1).all(), "and every later position sees it"


def documents_mask(segments):
    """True where a position may look: back, and within its document."""
    s = segments.shape[1]
    return (segments.unsqueeze(2) == segments.unsqueeze(1)).unsqueeze(1) & torch.ones(s, s, dtype=torch.bool).tril()


@pytest.mark.parametrize("attention", ["sdpa", "unfused"])
def test_documents_apart_are_as_if_alone(attention):
    """With the documents' mask and positions that start anew, each document has the logits it has by itself."""
    model = built(dataclasses.replace(CONFIG, attention=attention))
    tokens, cut = some_tokens(), 6
    segments = (torch.arange(S) >= cut).long().expand(B, S)
    positions = torch.cat([torch.arange(cut), torch.arange(S - cut)]).expand(B, S)
    packed = model(tokens, micro_batch(position_ids=positions, attention_mask=documents_mask(segments)))
    close(packed[:, :cut], model(tokens[:, :cut], micro_batch(length=cut)))
    close(packed[:, cut:], model(tokens[:, cut:], micro_batch(length=S - cut)))
    joined = model(tokens, micro_batch(position_ids=positions))
    assert (packed[:, cut:] - joined[:, cut:]).abs().max() > 1e-3, "without the mask the second document sees the first"


@pytest.mark.parametrize("masked", [False, True])
def test_sdpa_equals_unfused(masked):
    tokens, segments = some_tokens(), (torch.arange(S) >= 5).long().expand(B, S)
    batch = micro_batch(attention_mask=documents_mask(segments) if masked else None)
    found = [gradients(built(dataclasses.replace(CONFIG, attention=name)), tokens, batch) for name in ("sdpa", "unfused", "auto")]
    for loss, grads in found[1:]:
        close(loss, found[0][0])
        for name, gradient in grads.items():
            close(gradient, found[0][1][name])


def test_dropout_is_off_in_evaluation_and_repeatable_in_training():
    plain, tokens = built(), some_tokens()
    model = built(dataclasses.replace(CONFIG, hidden_dropout=0.3, attention_dropout=0.2))
    assert torch.equal(model(tokens, micro_batch(dropout=False)), plain(tokens, micro_batch()))
    first = model(tokens, micro_batch(step=1))
    assert (first - plain(tokens, micro_batch())).abs().max() > 1e-2
    torch.manual_seed(99)
    assert torch.equal(model(tokens, micro_batch(step=1)), first), "not drawn from torch's generator"
    assert not torch.equal(model(tokens, micro_batch(step=2)), first)


@pytest.mark.parametrize("setting", ["hidden_dropout", "attention_dropout"])
def test_dropout_depends_on_the_sample_and_not_on_its_micro_batch(setting):
    """Row 1 of a micro-batch of two is the same as a micro-batch of its own that starts at sample 1."""
    model, tokens = built(dataclasses.replace(CONFIG, **{setting: 0.3})), some_tokens()
    both = model(tokens, micro_batch())
    alone = model(tokens[1:], MicroBatch(rng=torch.tensor([11, 0, 1]), position_ids=torch.arange(S).expand(1, S)))
    close(alone, both[1:])


def test_every_dropout_has_its_own_site():
    """Two dropouts with one site would drop the same elements."""
    sites = [module.site for module in GPT(dataclasses.replace(CONFIG, num_layers=9)).modules() if hasattr(module, "site")]
    assert len(sites) == 1 + 3 * 9 and len(set(sites)) == len(sites)


def test_gradients_of_two_micro_batches_add_up_in_main_grad():
    """The first overwrites (the buffer held NaN), the second adds; a tied weight gets both its gradients in both."""
    model, one, two = built(), some_tokens(seed=1), some_tokens(seed=2)
    right = {name: g + gradients(model, two, micro_batch())[1][name] for name, g in gradients(model, one, micro_batch())[1].items()}
    model.zero_grad(set_to_none=True)
    for parameter in model.parameters():
        parameter.main_grad = torch.full_like(parameter, torch.nan, requires_grad=False)
    for tokens, accumulate in ((one, False), (two, True)):
        logits = model(tokens, micro_batch(accumulate=accumulate))
        model.loss_sum(logits, tokens.roll(-1, 1), torch.ones(tokens.shape, dtype=torch.float64)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        close(parameter.main_grad, right[name])
