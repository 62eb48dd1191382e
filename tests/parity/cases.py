"""The matrix: layouts x model x data x batch x schedule, in full and as a covering array."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from megactl.config.schema import Data, Memory, Model, Optimizer, Parallel, Run, Training
from megactl.schedules import num_chunks
from parity.corpus import SEQ_LENGTH, VOCAB_SIZE

MICRO_BATCH = 2
# A larger rate after the first step, then a smaller one: a rate that is read a step late shows.
RATES = (0.003, 0.01, 0.005)


@dataclass(frozen=True)
class Plan:
    """The steps of a run: for each its learning rate and global batch (samples); the iterations (from 1) whose gradients are not finite."""

    rates: tuple[float, ...]
    batches: tuple[int, ...]
    overflows: frozenset[int] = frozenset()

    def steps(self) -> Iterator[tuple[int, int, int, float]]:
        """(iteration, samples consumed before it, global batch, learning rate) of each step."""
        consumed = itertools.accumulate(self.batches, initial=0)
        for iteration, (start, batch, rate) in enumerate(zip(consumed, self.batches, self.rates, strict=False), start=1):
            yield iteration, start, batch, rate


@dataclass(frozen=True)
class Case:
    """One run. `bucket` is in parameters: 2000 makes several buckets a rank; `clip` 0 turns clipping off.

    `ramp`: the batch grows from one micro-batch a replica to one more than `micro_batches`. `overflow`: the second step's
    gradients are not finite. `documents` are GPT's ("positions" start again while documents see each other); `sentence` (the
    sentence head) and `padding` are BERT's. `scale`: the dynamic loss scale at the start, which doubles after `window` good steps and
    falls at the first overflow after that; None for no scaling.
    `steps`: how many, with the rates in turn. `threshold`, `prefetch`, `split_layers`, `tile`: of ZeRO 3. `vpp`: stages a rank, of one
    layer or more; `split`: the layers of each stage, or what counts as one; `scatter`: scatter-gather. `layers`: None for as many as
    show everything in the layout. `positions` to `bias`: what Llama-shaped models have otherwise. `micro_batch`: sequences in one.
    `sp`: sequence parallelism.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    tied: bool = True
    dropout: float = 0.0
    zero: int = 0
    micro_batches: int = 2
    schedule: str = "1f1b"
    documents: str = "plain"
    overlap: bool = True
    bucket: int = 2000
    ramp: bool = False
    overflow: bool = False
    clip: float = 0.5
    gelu: str = "tanh"
    attention: str = "auto"
    precision: str = "fp64"
    seed: int = 4321
    model: str = "gpt"
    norm: str = "pre"
    sentence: bool = True
    padding: bool = True
    scale: float | None = None
    window: int = 1000
    steps: int = len(RATES)
    threshold: int = 0
    prefetch: int = 1
    split_layers: bool = False
    tile: int = 1
    vpp: int = 1
    scatter: bool = True
    split: str | None = None
    recompute: str = "none"
    recompute_method: str = "uniform"
    recompute_layers: int = 1
    partition: bool = False
    offload: str | None = None
    layers: int | None = None
    positions: str = "learned"
    normalization: str = "layernorm"
    activation: str = "gelu"
    kv_heads: int | None = None
    bias: bool = True
    cp: int = 1
    cp_method: str = "ring"
    micro_batch: int = MICRO_BATCH
    sp: bool = False

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.tp * self.pp * self.dp * self.cp

    @property
    def name(self) -> str:
        """What differs from the defaults, for the test's id."""
        odd = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)[3:] if getattr(self, f.name) != f.default]
        return "-".join([f"tp{self.tp}pp{self.pp}dp{self.dp}", *odd])

    def plan(self) -> Plan:
        """The steps to do."""
        counts = (1, self.micro_batches, self.micro_batches + 1) if self.ramp else (self.micro_batches,) * self.steps
        rates = tuple(itertools.islice(itertools.cycle(RATES), self.steps))
        return Plan(rates, tuple(self.micro_batch * self.dp * count for count in counts), frozenset({2} if self.overflow else ()))

    def run(self) -> Run:
        """The resolved configuration."""
        return Run(
            model=self._model(),
            parallel=Parallel(
                tensor_parallel=self.tp, pipeline_parallel=self.pp, data_parallel=self.dp, schedule=self.schedule, zero=self.zero,
                bucket_size=self.bucket, overlap_grad_reduce=self.overlap, persistence_threshold=self._threshold(),
                zero_prefetch=self.prefetch, split_layers=self.split_layers, tile=self.tile, virtual_pipeline=self.vpp,
                scatter_gather=self.scatter, pipeline_split=self.split,
                context_parallel=self.cp, context_method=self.cp_method, sequence_parallel=self.sp,
            ),
            training=Training(
                micro_batch_size=self.micro_batch, global_batch_size=self.micro_batch * self.micro_batches * self.dp, seq_length=SEQ_LENGTH,
                precision=self.precision, device="cpu", seed=self.seed, **self._loss_scale(),
            ),
            memory=Memory(
                recompute=self.recompute, recompute_method=self.recompute_method, recompute_layers=self.recompute_layers,
                partition_activations=self.partition, offload=self.offload,
            ),
            # In fp32 a large epsilon: where a gradient is zero but for rounding (the key's bias), a small one divides noise by noise.
            optimizer=Optimizer(clip_grad=self.clip, weight_decay=0.1, epsilon=1e-8 if self.precision == "fp64" else 1e-4),
            data=Data(mock_data=True) if self.model == "bert" else Data(
                mock_data=True, eod_mask_loss=self.documents != "plain", reset_position_ids=self.documents in ("reset", "positions"),
                reset_attention_mask=self.documents == "reset",
            ),
        )  # fmt: skip

    def _threshold(self) -> int:
        # The models here are so small that the usual threshold would leave nothing to share.
        return self.threshold if self.zero == 3 or self.threshold else Parallel().persistence_threshold

    def _loss_scale(self) -> dict[str, float]:
        if self.scale is None:
            return {}
        return {"initial_loss_scale": self.scale, "min_loss_scale": 1.0, "loss_scale_window": self.window, "loss_scale_hysteresis": 1}

    def scales(self) -> tuple[float, ...]:
        """The loss scale of each step, by the rule in words: halved after an overflow, doubled after `window` steps without one."""
        found, good = [self.scale or 1.0], 0
        for iteration, *_ in self.plan().steps():
            overflow, good = iteration in self.plan().overflows, good + 1
            moves = self.scale is not None and (overflow or good == self.window)
            found.append(found[-1] * (0.5 if overflow else 2.0) if moves else found[-1])
            good = 0 if overflow or moves else good
        return tuple(found[:-1])

    def _model(self) -> Model:
        # Without a pipeline two layers show all that four would, in half the reductions; a stage of two pipeline ranks has two as well.
        layers = max({1: 2, 2: 4, 4: 4, 8: 8}[self.pp], self.pp * num_chunks(self.schedule, self.vpp))
        # A larger deviation than usual: at width 32 the usual one leaves attention and residual branches close to nothing.
        return Model(
            num_layers=self.layers or layers, hidden_size=32, num_heads=8, ffn_size=64, vocab_size=VOCAB_SIZE, max_positions=SEQ_LENGTH,
            untie_embeddings=not self.tied, hidden_dropout=self.dropout, attention_dropout=self.dropout, init_std=0.2,
            gelu=self.gelu, attention=self.attention, architecture=self.model, norm_position=self.norm,
            sentence_head=self.sentence if self.model == "bert" else None, position_embedding=self.positions,
            normalization=self.normalization, activation=self.activation, kv_heads=self.kv_heads, bias=self.bias,
        )  # fmt: skip


def layouts(world_size: int) -> list[tuple[int, int, int]]:
    """Every (tp, pp, dp) of powers of two with this product."""
    powers = [2**i for i in range(world_size.bit_length())]
    return [(tp, pp, dp) for tp, pp, dp in itertools.product(powers, repeat=3) if tp * pp * dp == world_size]


def main_factors(pp: int, dp: int, model: str = "gpt") -> dict[str, list]:
    """What is crossed in full. Factors without meaning for the layout have one value."""
    fewer_same_more = sorted({1, pp, pp + 1} | ({pp - 1} if pp > 2 else set())) if pp > 1 else [1, 3]
    return {
        "tied": [True, False],
        "dropout": [0.0, 0.1],
        "zero": [0, 1] if dp > 1 else [0],
        "micro_batches": fewer_same_more,
        "schedule": ["1f1b", "gpipe"] if pp > 1 else ["1f1b"],
        **({"norm": ["pre", "post"], "padding": [True, False]} if model == "bert" else {}),
    }


def other_factors(dp: int, model: str = "gpt") -> dict[str, list]:
    """What is mixed in. One bucket size is far above the model: one bucket; bucket 1 closes one after each unit."""
    own = {"sentence": [True, False]} if model == "bert" else {"documents": ["eod", "reset", "plain"], "norm": ["pre", "post"]}
    return {
        **own,
        "overlap": [True, False] if dp > 1 else [True],
        "bucket": [2000, 1, 40_000_000] if dp > 1 else [2000],
        "clip": [0.5, 0.0],
        "gelu": ["tanh", "erf"],
        "attention": ["auto", "unfused"],
    }


def full(world_size: int, model: str = "gpt") -> Iterator[Case]:
    """Every layout x every combination of the main factors; the others take values by chance (the same ones in every run)."""
    for tp, pp, dp in layouts(world_size):
        main, other, generator = main_factors(pp, dp, model), other_factors(dp, model), random.Random(tp * 64 + pp * 8 + dp)
        for values in itertools.product(*main.values()):
            mixed = {name: generator.choice(choices) for name, choices in other.items()}
            yield Case(tp=tp, pp=pp, dp=dp, model=model, **dict(zip(main, values, strict=True)), **mixed)


def pairwise(world_size: int, model: str = "gpt") -> Iterator[Case]:
    """Every layout x every pair of values of two factors, in few cases."""
    return (case for layout in layouts(world_size) for case in of_layout(layout, pairwise_rows, model))


def each_value(world_size: int, model: str = "gpt") -> Iterator[Case]:
    """Every layout x every value of every factor, in as few cases as the longest factor has values."""
    return (case for layout in layouts(world_size) for case in of_layout(layout, each_value_rows, model))


def of_layout(layout: tuple[int, int, int], rows: Callable[..., list[dict]], model: str = "gpt") -> Iterator[Case]:
    """The cases of one layout that `rows` picks."""
    tp, pp, dp = layout
    for row in rows(main_factors(pp, dp, model) | other_factors(dp, model), seed=tp * 64 + pp * 8 + dp):
        yield Case(tp=tp, pp=pp, dp=dp, model=model, **row)


def each_value_rows(factors: Mapping[str, Sequence], *, seed: int) -> list[dict]:
    """Rows in which each value of each factor occurs, in an order that differs between seeds."""
    generator = random.Random(seed)
    mixed = {name: generator.sample(choices, len(choices)) for name, choices in factors.items()}
    return [{name: choices[i % len(choices)] for name, choices in mixed.items()} for i in range(max(map(len, mixed.values())))]


def pairwise_rows(factors: Mapping[str, Sequence], *, seed: int) -> list[dict]:
    """Rows in which each pair of values of two factors occurs (greedy, after Cohen et al. 1997, AETG); the same rows for one seed."""
    generator = random.Random(seed)
    missing = all_pairs(factors)
    rows = []
    while missing:
        # Each candidate starts from a pair that is still missing, so every row makes progress.
        ordered = sorted(missing, key=lambda pair: sorted(map(repr, pair)))
        candidates = [_candidate(factors, generator.choice(ordered), generator) for _ in range(30)]
        best = max(candidates, key=lambda row: len(pairs_of(row) & missing))
        missing -= pairs_of(best)
        rows.append(best)
    return rows


def _candidate(factors: Mapping[str, Sequence], pair: frozenset, generator: random.Random) -> dict:
    return {name: generator.choice(choices) for name, choices in factors.items()} | dict(pair)


def all_pairs(factors: Mapping[str, Sequence]) -> set[frozenset]:
    """Each pair of (factor, value) of two different factors."""
    two = itertools.combinations(factors.items(), 2)
    return {frozenset(((a, x), (b, y))) for (a, xs), (b, ys) in two for x, y in itertools.product(xs, ys)}


def pairs_of(row: Mapping[str, object]) -> set[frozenset]:
    """The pairs a row holds."""
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


def with_settings(case: Case, **settings: object) -> Case:
    """The case with other settings."""
    return Case(**(asdict(case) | settings))
