"""The oracle: one process, ordinary autograd, torch.optim.AdamW, in float64.

Of the engine it uses the modules of the models alone, and of those only the arithmetic of its forward: the hand-written functions
under it are replaced by torch's own, the compiled operators by their definition in plain torch, and the initial weights are
drawn here, by name. A step takes the whole global batch in one forward, so that nothing about micro-batches, their order,
their share of the loss or their dropout keys is taken from the code under test.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from megactl.config.schema import Model, Run
from megactl.engine import functional, functional_llama, ops
from megactl.engine.data import make_batch
from megactl.engine.data.batch import Batch
from megactl.engine.models import MODELS, Transformer
from megactl.engine.models.layers import MicroBatch
from parity.cases import Plan
from parity.corpus import EOD, Corpus, PairCorpus

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Trajectory:
    """What a training run did: per step the loss, its parts, the gradient norm before clipping, every gradient; the weights at the end."""

    losses: tuple[float, ...]
    parts: tuple[tuple[float, ...], ...]
    norms: tuple[float, ...]
    gradients: tuple[Arrays, ...]
    weights: Arrays
    eval_losses: tuple[float, ...]


def train_reference(run: Run, corpus: Corpus | PairCorpus, plan: Plan) -> Trajectory:
    """Train the steps of `plan`, then evaluate on the last batch without dropout. A step that overflows changes nothing."""
    with torch_arithmetic():
        return _train(run, corpus, plan)


def _train(run: Run, corpus: Corpus | PairCorpus, plan: Plan) -> Trajectory:
    model = build_model(run.model, run.training.seed)
    named = canonical_parameters(model)
    optimizer = _adamw(run, named)
    losses, parts, norms, gradients = [], [], [], []
    for iteration, start, size, rate in plan.steps():
        optimizer.zero_grad()
        means = batch_losses(model, run, corpus, iteration=iteration, start=start, size=size)
        loss = means.sum()
        loss.backward()
        gradients.append({name: p.grad.numpy().copy() for name, p in named.items()})
        norms.append(nn.utils.clip_grad_norm_(named.values(), run.optimizer.clip_grad or math.inf).item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        if iteration not in plan.overflows:
            optimizer.step()
        losses.append(loss.item())
        parts.append(tuple(means.tolist()))
    with torch.no_grad():
        last = batch_losses(model, run, corpus, iteration=iteration, start=start, size=size, dropout=False).tolist()
    weights = {n: p.detach().numpy().copy() for n, p in named.items()}
    return Trajectory(tuple(losses), tuple(parts), tuple(norms), tuple(gradients), weights, tuple(last))


def build_model(config: Model, seed: int) -> Transformer:
    """The whole model in float64 with its initial weights."""
    model = MODELS[config.architecture](config).double()
    for name, parameter in canonical_parameters(model).items():
        _initialise(name, parameter.data, config, seed)
    return model


def canonical_parameters(model: Transformer) -> dict[str, nn.Parameter]:
    """Each parameter once, by its name in the whole model."""
    return {model.canonical_name(name): parameter for name, parameter in model.named_parameters()}


def _initialise(name: str, values: Tensor, config: Model, seed: int) -> None:
    """GPT-2's rule: matrices normal, smaller where they write to a residual stream without norms; biases 0, norm weights 1."""
    if values.ndim == 1 or name.endswith(".bias"):
        values.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        return
    to_residual = config.norm_position == "pre" and name.endswith(("attention.output.weight", "mlp.down.weight"))
    std = config.init_std / math.sqrt(2 * config.num_layers) if to_residual else config.init_std
    whole = [(0, size) for size in values.shape]
    ops.normal_(values, logical_shape=values.shape, rectangle=whole, seed=seed, stream=ops.stream_of(name), std=std)


def _adamw(run: Run, parameters: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    config = run.optimizer
    matrices = [p for name, p in parameters.items() if p.ndim > 1 and not name.endswith(".bias")]
    vectors = [p for name, p in parameters.items() if p.ndim == 1 or name.endswith(".bias")]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.epsilon)


def batch_losses(
    model: Transformer, run: Run, corpus: Corpus | PairCorpus, *, iteration: int, start: int, size: int, dropout: bool = True
) -> Tensor:
    """[k]: the mean loss over the unmasked tokens of samples [start, start + size), and over their sentence labels.

    With the dropout of `iteration`.
    """
    batch = batch_of(run, corpus, start, size)
    rng = torch.tensor([run.training.seed, iteration, 0])
    output = model(batch.tokens, MicroBatch(rng, batch.position_ids, visible(batch), dropout=dropout, token_types=batch.token_types))
    logits, sentence = output if isinstance(output, tuple) else (output, None)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    # A batch may have no masked token at all: nothing to learn there, so 0 and not 0 / 0.
    means = [(losses * batch.loss_mask.flatten()).sum() / batch.loss_mask.sum().clamp(min=1)]
    if sentence is not None:
        means.append(nn.functional.cross_entropy(sentence, batch.sentence_labels))
    return torch.stack(means)


def batch_of(run: Run, corpus: Corpus | PairCorpus, start: int, size: int) -> Batch:
    """Samples [start, start + size)."""
    if isinstance(corpus, PairCorpus):
        return corpus.batch(start, size)
    options = run.data
    return make_batch(
        corpus, start, size, eod=EOD, reset_position_ids=options.reset_position_ids,
        reset_attention_mask=options.reset_attention_mask, eod_mask_loss=options.eod_mask_loss,
    )  # fmt: skip


def visible(batch: Batch) -> Tensor | None:
    """Who may look at whom: bool [b, 1, s, s], or None where the model's own rule holds."""
    if batch.padding_mask is not None:
        return not_padding(batch.padding_mask)
    return None if batch.segments is None else same_document(batch.segments)


def not_padding(padding_mask: Tensor) -> Tensor:
    """bool [b, 1, s, s] from the mask [b, s]: every query may see the keys that are tokens."""
    count, length = padding_mask.shape
    return padding_mask.repeat_interleave(length, 0).view(count, 1, length, length)


def same_document(segments: Tensor) -> Tensor:
    """bool [b, 1, s, s] from segments [b, s]: query i may see key j where j <= i and both are of one document. By the definition."""
    allowed = torch.zeros(segments.shape[0], 1, segments.shape[1], segments.shape[1], dtype=torch.bool)
    for row, numbers in enumerate(segments.tolist()):
        for query, number in enumerate(numbers):
            for key in range(query + 1):
                allowed[row, 0, query, key] = numbers[key] == number
    return allowed


@contextmanager
def torch_arithmetic() -> Iterator[None]:
    """Within it, models compute with torch's functions and autograd, and with the reference operators."""
    plain = nn.functional
    replacements = {
        "linear": lambda x, weight, bias=None, **_: plain.linear(x, weight, bias),
        "layer_norm": lambda x, weight, bias, epsilon, **_: plain.layer_norm(x, weight.shape, weight, bias, epsilon),
        "embedding": lambda ids, weight, **_: plain.embedding(ids, weight),
    }
    llama = {
        "linear_swiglu": _linear_swiglu,
        "linear_plain_gelu": lambda x, weight, approximate, **_: plain.gelu(x @ weight.t(), approximate=approximate),
        "rms_norm": lambda x, weight, epsilon, **_: _rms_norm(x, weight, epsilon),
        "add_rms_norm": lambda x, residual, weight, epsilon, **_: (_rms_norm(x + residual, weight, epsilon), x + residual),
    }
    with ExitStack() as stack:
        for name, replacement in replacements.items():
            stack.enter_context(mock.patch.object(functional, name, replacement))
        for name, replacement in llama.items():
            stack.enter_context(mock.patch.object(functional_llama, name, replacement))
        stack.enter_context(mock.patch.object(ops, "rotary_qkv", _rotary_qkv))
        stack.enter_context(mock.patch.dict("os.environ", MEGACTL_OPS="torch"))
        yield
    assert functional.linear is not replacements["linear"] and ops.dropout_add.__module__ == "megactl.engine.ops.philox"


def _linear_swiglu(x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: object) -> Tensor:
    gate, up = (nn.functional.linear(x, weight[i], None if bias is None else bias[i]) for i in (0, 1))
    return gate / (1 + (-gate).exp()) * up


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight


def _rotary_qkv(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each pair of elements as a complex number that the position's unit number multiplies."""
    turn = torch.complex(cos.double(), sin.double())[:, :, None, None]
    pairs = torch.complex(*qkv[:, :, :, :-1].chunk(2, dim=-1)) * turn
    turned = torch.cat([pairs.real, pairs.imag], dim=-1)
    return turned[:, :, :, :-1].flatten(2, 3), turned[:, :, :, -1], qkv[:, :, :, -1]
