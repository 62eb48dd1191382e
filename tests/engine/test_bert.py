"""What BERT is beside GPT: sight in both directions, padding that changes nothing, token types, two losses, stages of one whole."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from megactl.config.schema import Model, Parallel, Run, Training  # noqa: E402
from megactl.engine import functional, ops  # noqa: E402
from megactl.engine.attention import preferred_attention  # noqa: E402
from megactl.engine.data.batch import Batch  # noqa: E402
from megactl.engine.mesh import Mesh  # noqa: E402
from megactl.engine.models import BERT  # noqa: E402
from megactl.engine.models.layers import MicroBatch, Targets  # noqa: E402
from megactl.engine.pipeline import attention_mask, padding_attention_mask  # noqa: E402
from megactl.engine.state import check_fits  # noqa: E402
from megactl.engine.training_step import TrainingStep  # noqa: E402
from megactl.errors import CheckpointError  # noqa: E402

CONFIG = Model(architecture="bert", num_layers=4, hidden_size=32, num_heads=4, vocab_size=61, max_positions=16, sentence_head=True)
B, S = 3, 16
LENGTHS = torch.tensor([16, 9, 5])


@pytest.fixture(params=["pre", "post"])
def config(request):
    return dataclasses.replace(CONFIG, norm_position=request.param)


def built(config, dtype=torch.float64, **options):
    """A BERT whose parameters are drawn by their canonical names, so that stages of one model agree; biases are not zero."""
    model = BERT(config, **options).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            stream = ops.stream_of(model.canonical_name(name))
            ops.normal_(parameter.data, logical_shape=shape, rectangle=[(0, n) for n in shape], seed=5, stream=stream, std=0.3)
            if "norm.weight" in name:
                parameter.add_(1.0)
    return model


def inputs(rows=B, seed=0, padding=True, **options):
    """Tokens, the micro-batch and the targets."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(CONFIG.vocab_size, (rows, S), generator=generator) for _ in range(2))
    padding_mask = torch.arange(S) < LENGTHS[:rows, None] if padding else torch.ones(rows, S, dtype=torch.bool)
    mask = (torch.rand(rows, S, generator=generator) < 0.3) & padding_mask
    types = (torch.arange(S) >= LENGTHS[:rows, None] // 2).long()
    batch = MicroBatch(
        rng=torch.tensor([11, 0, 0]), position_ids=torch.arange(S).expand(rows, S), token_types=types,
        attention_mask=padding_attention_mask(padding_mask) if padding else None, **options,
    )  # fmt: skip
    return tokens, batch, Targets(labels, mask.double(), torch.arange(rows) % 2)


def gradients(model, tokens, batch, targets):
    model.zero_grad()
    sums = model.loss_sums(model(tokens, batch), targets)
    sums.sum().backward()
    return sums.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_every_token_sees_every_other(config):
    """Unlike a decoder: one changed token, the first or the last, changes the logits everywhere."""
    model, (tokens, batch, _) = built(config), inputs(padding=False)
    before = model(tokens, batch)[0]
    for place in (0, 9, S - 1):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % config.vocab_size
        assert ((model(changed, batch)[0] - before).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("attention", ["sdpa", "unfused"])
def test_padding_changes_nothing(config, attention):
    """Whatever stands at padding, and as if the sequence ended before it: logits of both heads."""
    model, (tokens, batch, _) = built(dataclasses.replace(config, attention=attention)), inputs()
    logits, sentence = model(tokens, batch)
    other = torch.where(torch.arange(S) < LENGTHS[:, None], tokens, (tokens + 7) % config.vocab_size)
    changed, changed_sentence = model(other, batch)
    close(changed_sentence, sentence)
    for row, length in enumerate(LENGTHS.tolist()):
        close(changed[row, :length], logits[row, :length])
        alone = MicroBatch(batch.rng, batch.position_ids[:1, :length], None, token_types=batch.token_types[row : row + 1, :length])
        short, short_sentence = model(tokens[row : row + 1, :length], alone)
        close(short[0], logits[row, :length])
        close(short_sentence[0], sentence[row])


def test_an_all_true_mask_is_no_mask(config):
    model, (tokens, batch, targets) = built(config), inputs(padding=False)
    whole = padding_attention_mask(torch.ones(B, S, dtype=torch.bool))
    (sums, right), (masked, found) = (
        gradients(model, tokens, dataclasses.replace(batch, attention_mask=mask), targets) for mask in (None, whole)
    )
    close(masked, sums)
    for name, gradient in right.items():
        close(found[name], gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "unfused"])
def test_a_sequence_of_padding_alone_is_finite(config, attention, dtype):
    """And leaves the others alone."""
    model, (tokens, batch, targets) = built(dataclasses.replace(config, attention=attention), dtype), inputs()
    mask = (targets.mask * torch.tensor([1, 1, 0])[:, None]).to(torch.promote_types(dtype, torch.float32))
    targets = dataclasses.replace(targets, mask=mask)
    nothing = torch.arange(S) < torch.tensor([16, 9, 0])[:, None]
    hollow = dataclasses.replace(batch, attention_mask=padding_attention_mask(nothing))
    sums, found = gradients(model, tokens, hollow, targets)
    assert sums.isfinite().all() and all(gradient.isfinite().all() for gradient in found.values())
    assert torch.equal(model(tokens, hollow)[0][:2], model(tokens, batch)[0][:2])


def test_masks_are_made_from_batches():
    """Padding for encoders, documents for decoders, neither otherwise."""
    ids = torch.zeros(2, 4, dtype=torch.int64)
    plain = Batch(ids, ids, ids.float(), ids, None)
    assert attention_mask(plain) is None
    real = torch.tensor([[True, True, False, False], [False, False, False, False]])
    found = attention_mask(plain._replace(padding_mask=real))
    assert found.shape == (2, 1, 1, 4) and found[:, 0, 0].tolist() == [[True, True, False, False], [True] * 4]
    assert attention_mask(plain._replace(segments=ids)).shape == (2, 1, 4, 4)


def test_token_types_are_two_vectors(config):
    model, (tokens, batch, _) = built(config), inputs()
    flipped = dataclasses.replace(batch, token_types=1 - batch.token_types)
    before = model(tokens, flipped)
    with torch.no_grad():
        weight = model.embedding.token_types.weight
        weight.copy_(weight.flip(0))
    for one, other in zip(model(tokens, batch), before, strict=True):
        close(one, other)
    assert not torch.allclose(model(tokens, flipped)[0], before[0])


def test_small_tables_add_up_like_large_ones():
    """The gradient of a table with few rows is a product with the one-hot matrix of its ids."""
    ids, grad = torch.randint(2, (3, 5)), torch.randn(3, 5, 4, dtype=torch.float64)
    small, large = (torch.randn(rows, 4, dtype=torch.float64, requires_grad=True) for rows in (2, 99))
    for weight in (small, large):
        functional.embedding(ids, weight).backward(grad)
    close(small.grad, large.grad[:2])
    right = torch.stack([grad[ids == row].sum(0) for row in range(2)])
    close(small.grad, right)


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("split", [[[0, 1], [2, 3]], [[0], [1, 2], [3]], [[0, 1, 2, 3], []]])
def test_stages_make_up_the_whole_model(config, untied, split):
    """Both losses and all gradients, with dropout on."""
    config = dataclasses.replace(config, untie_embeddings=untied, hidden_dropout=0.2, attention_dropout=0.1)
    whole, (tokens, batch, targets) = built(config), inputs()
    sums, right = gradients(whole, tokens, batch, targets)
    stages = [built(config, layers=layers, first=i == 0, last=i == len(split) - 1) for i, layers in enumerate(split)]
    x, edges = tokens, []
    for stage in stages:
        if x.is_floating_point():
            edges.append((x, x.detach().requires_grad_()))
            x = edges[-1][1]
        x = stage(x, batch)
        assert stage.losses == ("lm_loss", "sentence_loss")
    found_sums = stages[-1].loss_sums(x, targets)
    close(found_sums, sums)
    found_sums.sum().backward()
    for sent, received in reversed(edges):
        sent.backward(received.grad)
    found = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            found[stage.canonical_name(name)] = found.get(stage.canonical_name(name), 0) + parameter.grad
    assert found.keys() == right.keys()
    for name, gradient in right.items():
        close(found[name], gradient)


def test_losses_by_their_definition(config):
    """Sums of cross entropies over masked tokens and over sequences, and how many terms each has."""
    model, (tokens, batch, targets) = built(config), inputs()
    logits, sentence = model(tokens, batch)
    log_p, log_s = logits.log_softmax(-1), sentence.log_softmax(-1)
    lm = -sum(log_p[i, j, targets.labels[i, j]] * targets.mask[i, j] for i in range(B) for j in range(S))
    order = -sum(log_s[i, targets.sentence_labels[i]] for i in range(B))
    close(model.loss_sums((logits, sentence), targets), torch.stack([lm, order]))
    assert model.loss_counts(targets).tolist() == [targets.mask.sum().item(), B]


def test_without_a_sentence_head_there_is_one_loss(config):
    model, (tokens, batch, targets) = built(dataclasses.replace(config, sentence_head=False)), inputs()
    logits, sentence = model(tokens, batch)
    assert sentence is None and model.losses == ("lm_loss",) and not any("sentence" in name for name, _ in model.named_parameters())
    whole = built(config)
    assert torch.equal(model.loss_sums((logits, None), targets), whole.loss_sums(whole(tokens, batch), targets)[:1])
    assert model.loss_counts(targets).tolist() == [targets.mask.sum().item()]


def test_initial_values(config):
    """Normal everywhere; smaller where the residual stream has no norm of its own (GPT-2's rule, as Megatron's BERT)."""
    residual = CONFIG.init_std / math.sqrt(2 * config.num_layers) if config.norm_position == "pre" else CONFIG.init_std
    seen = {}
    for prefix, module in BERT(config).named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            seen[f"{prefix}.{leaf}"] = (module.initial[leaf].std, module.initial[leaf].constant)
        assert {name for name, _ in module.named_parameters(recurse=False)} == set(getattr(module, "initial", {}))
    for name, values in seen.items():
        if name.endswith(("attention.output.weight", "mlp.down.weight")):
            assert values == (residual, 0.0), name
        else:
            is_norm, is_bias = name.endswith("norm.weight"), name.endswith("bias")
            assert values == ((0.0, float(is_norm)) if is_norm or is_bias else (CONFIG.init_std, 0.0)), name


def test_gradients_of_two_micro_batches_add_up_in_main_grad(config):
    """The first overwrites (the buffer held NaN), the second adds."""
    model, (one, batch, targets), (two, _, _) = built(config), inputs(), inputs(seed=2)
    firsts = gradients(model, one, batch, targets)[1]
    right = {name: firsts[name] + gradient for name, gradient in gradients(model, two, batch, targets)[1].items()}
    model.zero_grad(set_to_none=True)
    for parameter in model.parameters():
        parameter.main_grad = torch.full_like(parameter, torch.nan, requires_grad=False)
    for tokens, accumulate in ((one, False), (two, True)):
        model.loss_sums(model(tokens, dataclasses.replace(batch, accumulate=accumulate)), targets).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        close(parameter.main_grad, right[name])


def batch_of(seed, size=2):
    tokens, micro_batch, targets = inputs(size, seed)
    padding_mask = torch.arange(S) < LENGTHS[:size, None]
    return Batch(
        tokens, targets.labels, targets.mask.float(), micro_batch.position_ids, None, micro_batch.token_types, padding_mask,
        targets.sentence_labels,
    )  # fmt: skip


def training_step(config, **training):
    run = Run(
        model=config, parallel=Parallel(data_parallel=1, zero=0),
        training=Training(micro_batch_size=2, global_batch_size=6, seq_length=S, precision="fp64", device="cpu", **training),
    )  # fmt: skip
    return TrainingStep(run, Mesh(torch.device("cpu")))


def test_a_step_reports_both_means_and_learns(config):
    """Means over the global batch, however many masked tokens a micro-batch has; and a batch seen again and again is learnt."""
    engine = training_step(config)
    batches = [batch_of(seed) for seed in range(3)]
    before = engine.evaluate(batches.__getitem__, 3, 6)
    outcomes = [engine.step(i + 1, batches.__getitem__, global_batch_size=6, learning_rate=0.01) for i in range(40)]
    first = outcomes[0]
    close(first.parts, before)
    close(first.loss, first.parts.sum())
    packed = [first.loss, first.grad_norm, first.skipped, first.stop, first.loss_scale, *first.parts]
    assert torch.equal(first.packed(), torch.stack(packed))
    assert (outcomes[-1].parts < torch.tensor([0.5, 0.2])).all() and engine.losses == ("lm_loss", "sentence_loss")


def test_a_step_without_masked_tokens_trains_the_sentence_loss_alone(config):
    engine = training_step(config)
    batches = [batch_of(seed)._replace(loss_mask=torch.zeros(2, S)) for seed in range(3)]
    outcome = engine.step(1, batches.__getitem__, global_batch_size=6, learning_rate=0.01)
    assert outcome.parts[0] == 0.0 and outcome.parts[1] > 0.0 and torch.isfinite(outcome.grad_norm) and not outcome.skipped
    found = engine.gradients()
    assert not found["head.decoder.bias"][1].any() and found["head.sentence.pooler.weight"][1].any()


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"norm_position": "post"}, "--norm-position pre (the checkpoint has post)", "use --norm-position post"),
        ({"sentence_head": False}, "--sentence-head True (the checkpoint has False)", "use --no-sentence-head"),
        ({"architecture": "gpt", "sentence_head": None}, "--model bert (the checkpoint has gpt)", "use --model gpt, or"),
    ],
)
def test_a_checkpoint_of_another_model_is_named(changes, message, hint):
    header = SimpleNamespace(model=dataclasses.asdict(dataclasses.replace(CONFIG, **changes)), state={"adam_step": 1.0})
    with pytest.raises(CheckpointError) as error:
        check_fits(Path("step-1"), header, Run(model=CONFIG), optimizer=True)
    assert error.value.message == f"step-1 is of another model: {message}" and error.value.hint.startswith(hint)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["auto", "sdpa", "unfused"])
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 2e-5), ("bf16", 0.03)])
def test_cuda_equals_the_cpu(config, precision, limit, attention):
    """Losses and gradients of one step, with padding, against float64 on the CPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    batches = [batch_of(seed) for seed in range(3)]
    found = []
    config = dataclasses.replace(config, attention=attention, init_std=0.1)
    for device, kind in (("cpu", "fp64"), ("cuda", precision)):
        run = Run(
            model=config, parallel=Parallel(data_parallel=1, zero=0),
            training=Training(micro_batch_size=2, global_batch_size=6, seq_length=S, precision=kind, device=device),
        )  # fmt: skip
        engine = TrainingStep(run, Mesh(torch.device(device)))
        with preferred_attention(masked=True):
            outcome = engine.step(1, batches.__getitem__, global_batch_size=6, learning_rate=0.0)
        found.append((outcome.parts.cpu(), {name: tensor.double().cpu() for name, (_, tensor) in engine.gradients().items()}))
    (right_parts, right), (parts, gradients_found) = found
    torch.testing.assert_close(parts, right_parts, rtol=limit, atol=0)
    rms = torch.cat([tensor.flatten() for tensor in right.values()]).square().mean().sqrt()
    for name, tensor in right.items():
        floor = max(tensor.norm(), rms * tensor.numel() ** 0.5)
        assert (gradients_found[name] - tensor).norm() <= 3 * limit * floor, name


@pytest.mark.gpu
def test_cuda_repeats_bit_for_bit(config):
    """Also the gradient of two token types, which half of all tokens add to. (Fused attention kernels add up in any order.)"""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    run = Run(
        model=dataclasses.replace(config, attention="unfused", hidden_dropout=0.1), parallel=Parallel(data_parallel=1, zero=0),
        training=Training(micro_batch_size=2, global_batch_size=6, seq_length=S, precision="bf16", device="cuda"),
    )  # fmt: skip
    found = []
    for _ in range(2):
        engine = TrainingStep(run, Mesh(torch.device("cuda")))
        for iteration in range(1, 4):
            engine.step(iteration, [batch_of(seed) for seed in range(3)].__getitem__, global_batch_size=6, learning_rate=0.01)
        found.append(engine.parts[0].flat.params.clone())
    assert torch.equal(*found) and found[0].isfinite().all()
