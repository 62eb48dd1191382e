"""Text from a trained model: weights from a checkpoint of any layout, a cache of keys and values, and the choice of a token.

The model's files know nothing of the cache: `CachedAttention` stands in for each layer's `CoreAttention` while sampling, in the
same way in which tensor parallelism puts its own modules in place of the plain ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from megactl.config.coerce import CoercionError, coerce
from megactl.config.schema import Model
from megactl.config.settings import all_settings
from megactl.engine import checkpoint
from megactl.engine.checkpoint import Header, Piece
from megactl.engine.models import GPT, MODELS
from megactl.engine.models.layers import CoreAttention, MicroBatch, fused_attention
from megactl.errors import CheckpointError, ConfigError, Problem, RunError
from megactl.storage import manifest as manifests

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# Samples drawn side by side: beyond this the cache grows while a decoding step hardly gets faster.
_BATCH = 16


@dataclass(frozen=True)
class Options:
    """How tokens are chosen. temperature 0 takes the most likely one; top_k and top_p None leave all tokens in.

    vocabulary: ids below it may be chosen. eod: the token that ends a sample, or None. Sample i is drawn from (seed, i).
    """

    max_tokens: int
    vocabulary: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    eod: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """New tokens without the prompt and without the end-of-document token; finish is "eod" or "length"."""

    tokens: list[int]
    finish: str


class ForeignModelError(CheckpointError):
    """The checkpoint is good, and of a model that continues no text."""


def choose_device(name: str) -> torch.device:
    """The device of "auto" (a GPU where one works), "cpu" or "cuda". Raises ConfigError where there is no such device."""
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        rule = f"torch {torch.__version__} sees no GPU"
        raise ConfigError([Problem("--device cuda", rule, "check CUDA_VISIBLE_DEVICES and nvidia-smi, or use --device cpu")])
    return torch.device("cuda" if cuda and name != "cpu" else "cpu")


def load_model(path: Path, device: torch.device, precision: str | None = None) -> tuple[GPT, Header, str]:
    """The plain model of the checkpoint folder `path`, its header, and the precision used (default: the run's).

    Each weight is read straight into its parameter, from any layout, with its checksum; vocabulary rows are not padded.
    Raises CheckpointError for a damaged checkpoint, ForeignModelError for one of a model that is not sampled from, ConfigError where
    the run's precision is none to sample in.
    """
    manifest = manifests.read(path)
    config = model_config(path, manifest.header)
    if config.architecture != "gpt":
        rule = f"holds a {config.architecture.upper()}, which fills gaps in a text and does not continue it"
        raise ForeignModelError(f"{path} {rule}", "sample from a checkpoint of --model gpt")
    precision = precision or manifest.header.precision
    if precision not in DTYPES:
        rule = f"the run's precision; sampling computes in {', '.join(DTYPES)}"
        raise ConfigError([Problem(f"precision {precision}", rule, "set --precision bf16")])
    with torch.device("meta"):
        model = MODELS[config.architecture](config)
    parameters = _materialise(model, device, DTYPES[precision])
    requests = [_request(manifest, name, parameter.detach()) for name, parameter in parameters.items()]
    header = checkpoint.load(path, requests)
    for request, parameter in zip(requests, parameters.values(), strict=True):
        if request.tensor.dtype != parameter.dtype:
            parameter.data.copy_(request.tensor)
    return model.eval(), header, precision


def model_config(path: Path, header: Header) -> Model:
    """The architecture a checkpoint was made with. Raises CheckpointError for settings this version does not know or that are open."""
    values, rule = {}, None
    for key, value in header.model.items():
        setting = all_settings().get(f"model.{key}")
        if setting is None:
            rule = "is no setting of this version"
        elif value is None and setting.optional:
            continue
        else:
            try:
                values[key] = coerce(setting, value, typed=True)
            except CoercionError as error:
                rule = error.rule
        if rule is not None:
            raise CheckpointError(f"{path}: model.{key} = {value!r} {rule}", "use the megactl that wrote the checkpoint")
    config = Model(**values)
    missing = [key for key in ("vocab_size", "max_positions") if getattr(config, key) is None]
    if missing:
        raise CheckpointError(f"{path}: its header does not say {' and '.join(missing)}", "use a checkpoint that `megactl train` saved")
    return config


def _materialise(model: GPT, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Give a model made on the meta device memory; returns its parameters by canonical name."""
    made: dict[int, nn.Parameter] = {}
    named = {model.canonical_name(name): parameter for name, parameter in model.named_parameters()}
    # Module by module and by identity, because Module.to_empty would part a tied head from the embedding.
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device), requires_grad=False)
            setattr(module, leaf, made[id(parameter)])
    return {name: made[id(parameter)] for name, parameter in named.items()}


def _request(manifest: manifests.Manifest, name: str, tensor: Tensor) -> Piece:
    """The whole weight, into `tensor`; or into a tensor of the stored type where no master copy allows another."""
    stored = manifest.tensors.get((name, "weight"), [])
    has_master = (name, "master") in manifest.tensors or manifest.header.precision in ("fp32", "fp64")
    if stored and not has_master:
        # Of the type asked for already, this is `tensor` itself.
        dtype = getattr(torch, stored[0].dtype)
        tensor = tensor if tensor.dtype == dtype else torch.empty(tensor.shape, dtype=dtype)
    shape = tuple(tensor.shape)
    return Piece(name, "weight", shape, tuple((0, size) for size in shape), None, tensor)


class CachedAttention(nn.Module):
    """A `CoreAttention` that remembers keys and values: its input is the next s positions, which see themselves and all before."""

    def __init__(self, core: CoreAttention, batch: int, positions: int, like: Tensor, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.scale, self.length = core.scale, 0
        shape = (batch, kv_heads, positions, head_dim)
        self.keys, self.values = (torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, micro_batch: MicroBatch) -> Tensor:
        """q [b, n, s, d] and k, v [b, g, s, d] of the next s positions to [b, n, s, d]. Keys are kept as they come, turned already."""
        start, stop = self.length, self.length + q.shape[-2]
        # is_causal lines the first query up with the first key, which holds only while the cache is empty.
        assert start == 0 or stop == start + 1, "several positions at once only from the start"
        self.keys[:, :, start:stop], self.values[:, :, start:stop], self.length = k, v, stop
        keys, values = self.keys[:, :, :stop], self.values[:, :, :stop]
        return fused_attention(q, keys, values, mask=None, dropout=0.0, causal=start == 0 and stop > 1, scale=self.scale)


class Decoder:
    """The next token's logits, position after position; the caches live as long as `decoding` holds the model."""

    def __init__(self, model: GPT, caches: list[CachedAttention], positions: int) -> None:
        self.model, self.caches, self.positions, self.length = model, caches, positions, 0

    @property
    def full(self) -> bool:
        """Whether another position would not fit."""
        return self.length == self.positions

    def reset(self) -> None:
        """Forget every position."""
        self.length = 0
        for cache in self.caches:
            cache.length = 0

    def advance(self, tokens: Tensor) -> Tensor:
        """Append tokens [b, s] (s > 1 only after a reset); logits [b, vocabulary] of the token that follows the last."""
        b, s = tokens.shape
        ids = torch.arange(self.length, self.length + s, device=tokens.device).expand(b, s)
        micro_batch = self.model.positioned(MicroBatch(rng=ids.new_zeros(3), position_ids=ids, dropout=False))
        self.length += s
        x = self.model.embedding(tokens, micro_batch)
        for layer in self.model.layers.values():
            x = layer(x, micro_batch)
        # Only the last position is wanted: the logits of a whole prompt would be the largest tensor by far.
        x = self.model.final_norm(x[:, -1:], micro_batch)
        return self.model.head(x, micro_batch)[:, 0]


@contextmanager
def decoding(model: GPT, batch: int, positions: int) -> Iterator[Decoder]:
    """`model` (whole, on one device) with caches for `batch` sequences of `positions` tokens; as it was afterwards."""
    attentions = [layer.attention for layer in model.layers.values()]
    plain = [attention.core for attention in attentions]
    caches = [CachedAttention(a.core, batch, positions, a.qkv.weight, a.kv_heads, a.head_dim) for a in attentions]
    try:
        for attention, cache in zip(attentions, caches, strict=True):
            attention.core = cache
        yield Decoder(model, caches, positions)
    finally:
        for attention, core in zip(attentions, plain, strict=True):
            attention.core = core


def choose(logits: Tensor, uniform: Tensor, options: Options) -> Tensor:
    """One token [b] a row of logits [b, vocabulary], by numbers `uniform` [b] (float64, in [0, 1)); greedy where temperature is 0.

    temperature, then the top_k most likely, then the fewest of those that hold top_p of their probability (Holtzman et al. 2019,
    arXiv:1904.09751).
    """
    logits = logits[:, : options.vocabulary].double()
    if options.temperature == 0.0:
        return logits.argmax(-1)
    values, ids = logits.topk(min(options.top_k or options.vocabulary, options.vocabulary))
    # The largest is taken off first: divided by a tiny temperature it would overflow.
    cumulative = torch.softmax((values - values[:, :1]) / options.temperature, -1).cumsum(-1)
    total = cumulative[:, -1:]
    if options.top_p is not None:
        kept = torch.searchsorted(cumulative, options.top_p * total).clamp_(max=values.shape[-1] - 1)
        total = cumulative.gather(-1, kept)
    # right=True: the first token whose share ends beyond the number, so that a token of probability 0 is never taken.
    rank = torch.searchsorted(cumulative, uniform.unsqueeze(-1) * total, right=True).clamp_(max=values.shape[-1] - 1)
    return ids.gather(-1, rank).squeeze(-1)


@torch.inference_mode()
def sample(
    model: GPT, prompt: Sequence[int], options: Options, count: int = 1, progress: Callable[[int], None] | None = None
) -> list[Sample]:
    """`count` continuations of `prompt` (at least one token, at most max_positions). `progress` gets the tokens made so far.

    Where the text outgrows the positions, its older half is forgotten: the newer half is read again from position 0 on.
    Raises RunError where the model's output is not finite.
    """
    assert 0 < len(prompt) <= model.config.max_positions, "the caller checks the length of the prompt"
    samples: list[Sample] = []
    for first in range(0, count, _BATCH):
        batch = range(first, min(first + _BATCH, count))
        # One generator a sample: its numbers do not depend on how many samples there are.
        uniform = np.stack([np.random.default_rng([options.seed, index]).random(options.max_tokens) for index in batch])
        samples += _sample_batch(model, prompt, options, torch.from_numpy(uniform), progress)
    return samples


def _sample_batch(
    model: GPT, prompt: Sequence[int], options: Options, uniform: Tensor, progress: Callable[[int], None] | None
) -> list[Sample]:
    """Continuations of one prompt, a row of `uniform` [b, max_tokens] each."""
    rows, device = uniform.shape[0], model.embedding.tokens.weight.device
    uniform = uniform.to(device)
    history = torch.tensor(prompt, device=device).expand(rows, -1)
    ended: list[int | None] = [None] * rows
    limit = model.config.max_positions
    with decoding(model, rows, min(limit, len(prompt) + options.max_tokens)) as decoder:
        logits = decoder.advance(history)
        for step in range(options.max_tokens):
            _require_finite(logits, step)
            token = choose(logits, uniform[:, step], options)
            history = torch.cat([history, token.unsqueeze(-1)], -1)
            for row, value in enumerate(token.tolist()):
                if ended[row] is None and value == options.eod:
                    ended[row] = step
            if progress is not None:
                progress(step + 1)
            if None not in ended or step + 1 == options.max_tokens:
                break
            if decoder.full:
                decoder.reset()
                logits = decoder.advance(history[:, -max(1, limit // 2) :])
            else:
                logits = decoder.advance(token.unsqueeze(-1))
    made = history[:, len(prompt) :].tolist()
    return [
        Sample(tokens if end is None else tokens[:end], "length" if end is None else "eod") for tokens, end in zip(made, ended, strict=True)
    ]


def _require_finite(logits: Tensor, step: int) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise RunError(f"the model's output is not finite at new token {step}", "the run has diverged: use an earlier checkpoint")
