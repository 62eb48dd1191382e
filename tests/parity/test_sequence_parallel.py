"""Sequence parallelism equals one process in float64 to 1e-9, wherever the cut between ranks falls; what it keeps and what it sends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megactl.config.schema import Run
from megactl.costmodel.memory import Layout, layer_activations
from megactl.engine import collectives, pipeline
from megactl.engine.training_step import TrainingStep
from parity.cases import Case, with_settings
from parity.comparison import deviations, differing_bits
from parity.corpus import SEQ_LENGTH, Corpus, PairCorpus
from parity.harness import Parity
from parity.jobs import source
from parity.pool import Pools, Worker

TOLERANCE = 1e-9

# b 1, 2 and 3: the cut between ranks falls inside a sequence, between two, and on both.
FEW = [
    Case(tp=2, micro_batch=3, dropout=0.1, documents="reset", norm="post", sp=True),
    Case(tp=4, micro_batch=1, dropout=0.1, tied=False, attention="unfused", sp=True),
    Case(tp=2, pp=2, micro_batches=3, dropout=0.1, documents="eod", sp=True),
    Case(tp=2, dp=2, zero=1, bucket=1, micro_batch=3, dropout=0.1, sp=True),
    Case(tp=2, dp=2, zero=0, bucket=40_000_000, sp=True),
    Case(tp=2, ramp=True, overflow=True, gelu="erf", clip=0.0, sp=True),
    Case(tp=2, pp=2, dp=2, zero=1, dropout=0.1, documents="reset", sp=True),
    Case(model="bert", tp=2, micro_batch=1, dropout=0.1, sp=True),
    Case(model="bert", tp=4, micro_batch=3, norm="post", dropout=0.1, sp=True),
    Case(model="bert", tp=2, pp=2, dropout=0.1, micro_batches=3, micro_batch=3, sp=True),
    Case(model="bert", tp=2, dp=2, zero=1, norm="post", tied=False, sentence=False, bucket=1, sp=True),
]
MORE = [
    *(Case(tp=tp, micro_batch=b, dropout=0.1, documents="reset", sp=sp) for tp in (2, 4) for b in (1, 2, 3) for sp in (True, False)),
    *(Case(model="bert", tp=tp, micro_batch=b, dropout=0.1, sp=sp) for tp in (2, 4) for b in (1, 2, 3) for sp in (True, False)),
    Case(tp=2, pp=2, schedule="gpipe", tied=False, micro_batch=1, sp=True),
    Case(tp=2, dp=2, zero=1, bucket=1, overlap=False, documents="reset", sp=True),
    Case(tp=2, dp=2, zero=1, bucket=40_000_000, micro_batch=3, sp=True),
    Case(tp=8, micro_batch=1, dropout=0.1, sp=True),
    Case(model="bert", tp=2, pp=2, norm="post", dropout=0.1, micro_batches=3, sp=True),
    Case(model="bert", tp=2, dp=2, zero=1, norm="post", dropout=0.1, micro_batch=3, sp=True),
    Case(model="bert", tp=4, dp=2, zero=0, padding=False, micro_batch=3, sp=True),
    Case(model="bert", tp=8, micro_batch=3, dropout=0.1, sp=True),
]
LLAMA = {"positions": "rope", "normalization": "rmsnorm", "activation": "swiglu", "kv_heads": 4, "bias": False}
WITH_OTHERS = [
    Case(tp=2, dp=2, zero=2, micro_batch=3, dropout=0.1, recompute="full", recompute_layers=2, sp=True),
    Case(tp=2, dp=2, zero=3, threshold=100, tile=2, recompute="selective", attention="unfused", dropout=0.1, sp=True),
    Case(tp=2, micro_batch=3, tied=False, dropout=0.1, **LLAMA, sp=True),
    Case(tp=2, cp=2, dropout=0.1, micro_batch=3, sp=True),
    Case(tp=2, cp=2, model="bert", dropout=0.1, micro_batch=3, sp=True),
    Case(tp=2, pp=2, schedule="zb-h1", micro_batches=3, dropout=0.1, micro_batch=3, sp=True),
    Case(model="bert", tp=2, pp=2, vpp=2, zero=3, tile=2, recompute="full", micro_batch=3, dropout=0.1, sp=True),
]
MORE_OTHERS = [
    Case(tp=2, cp=2, cp_method="all-to-all", pp=2, dropout=0.1, micro_batch=3, documents="reset", sp=True),
    Case(tp=2, cp=2, dp=2, zero=2, model="bert", dropout=0.1, micro_batch=3, sp=True),
    Case(tp=2, cp=2, dp=2, zero=3, tile=2, dropout=0.1, micro_batch=1, **LLAMA, sp=True),
    Case(tp=4, dp=2, zero=3, micro_batch=3, recompute="full", **LLAMA, sp=True),
    Case(tp=2, pp=2, schedule="zb-v", micro_batches=3, micro_batch=1, **(LLAMA | {"bias": True}), sp=True),
    Case(model="bert", tp=2, dp=2, zero=3, split_layers=True, tile=2, micro_batch=3, recompute="full", dropout=0.1, sp=True),
    Case(model="bert", tp=4, dp=2, zero=2, norm="post", micro_batch=3, tied=False, sp=True),
    Case(tp=2, pp=2, dp=2, zero=3, schedule="zb-v", micro_batches=3, dropout=0.1, tile=2, sp=True),
    Case(tp=2, pp=2, dp=2, zero=2, schedule="zb-h2", micro_batches=4, dropout=0.1, bucket=1, sp=True),
    Case(tp=2, zero=3, tile=2, recompute="full", offload="activations", norm="post", dropout=0.1, sp=True),
    Case(tp=4, zero=3, tile=2, schedule="zb-h1", pp=2, micro_batches=3, recompute="full", recompute_method="block", sp=True),
    Case(tp=2, zero=3, tile=4, dropout=0.1, micro_batch=3, sp=True),
]
SCALED = Case(tp=2, pp=2, dp=2, zero=1, scale=2.0**40, window=1, overflow=True, steps=5, documents="eod", sp=True)


def named(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", [*FEW, *WITH_OTHERS, SCALED], ids=named)
def test_sequence_parallel_equals_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)


@pytest.mark.nightly
@pytest.mark.parametrize("case", [*MORE, *MORE_OTHERS], ids=named)
def test_more_of_sequence_parallel_equals_one_process(parity: Parity, case: Case):
    assert not parity.deviations(case, TOLERANCE)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 0.05), ("fp16", 0.006)])
def test_smaller_types_are_near_the_reference(parity: Parity, precision: str, tolerance: float):
    model = "gpt" if precision == "fp16" else "bert"
    case = Case(tp=2, micro_batch=3, model=model, precision=precision, scale=2.0**11 if precision == "fp16" else None, sp=True)
    assert not deviations(parity.engine(case), parity.reference(case), tolerance, scales=case.scales())


REPEATED = [
    Case(tp=2, dp=2, zero=1, bucket=1, dropout=0.1, micro_batch=3, sp=True),
    Case(tp=2, pp=2, dp=2, zero=1, precision="bf16", dropout=0.1, micro_batches=3, sp=True),
    Case(tp=4, model="bert", dropout=0.1, micro_batch=3, sp=True),
]


@pytest.mark.parametrize("case", REPEATED, ids=named)
def test_twice_is_the_same_bit_for_bit_with_or_without_overlap(parity: Parity, case: Case):
    once = parity.engine(case)
    assert differing_bits(once, parity.engine(case)) == []
    assert differing_bits(once, parity.engine(with_settings(case, overlap=False))) == []


def test_whole_parameters_stay_equal_on_all_ranks(parity: Parity):
    """Bit for bit: what the ranks hold whole is reduced once, not by each in its own order."""
    for case in (REPEATED[0], REPEATED[2]):
        results = parity.engine(case)
        for name in ("layers.0.attention_norm.weight", "layers.1.mlp.down.bias", "embedding.positions.weight"):
            assert len({result.weights[name].values.tobytes() for result in results}) == 1, name


def one_step(worker: Worker, run: Run, corpus: Corpus | PairCorpus) -> None:
    """The first step of a run, of one micro-batch a replica."""
    engine = TrainingStep(run, worker.mesh(run.parallel))
    size = run.training.micro_batch_size * engine.mesh.dp.size
    engine.step(1, partial(source(run, corpus, engine.mesh), 0), global_batch_size=size, learning_rate=0.0)


def saved_bytes(worker: Worker, run: Run, corpus: Corpus | PairCorpus) -> int:
    """Bytes of distinct storages that a step's forward keeps for its backward, weights aside."""
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        one_step(worker, run, corpus)
    return sum(storages.values())


def sent(worker: Worker, run: Run, corpus: Corpus | PairCorpus) -> Counter[tuple[str, int]]:
    """How often a step calls which collective of the tensor-parallel group, and with how many bytes of the whole tensor."""
    group, found = worker.mesh(run.parallel).tp.group, Counter()

    def counting(kind: str, original: Callable) -> Callable:
        def called(tensor: torch.Tensor, *arguments: object, **options: object) -> object:
            # The whole tensor is what is gathered into, what is scattered from, what is reduced.
            whole = arguments[0] if kind == "reduce-scatter" else tensor
            if options["group"] is group:
                found[kind, whole.nbytes] += 1
            return original(tensor, *arguments, **options)

        return called

    names = {"_all_gather": "all-gather", "_reduce_scatter": "reduce-scatter"}
    with ExitStack() as stack:
        for name, kind in names.items():
            stack.enter_context(mock.patch.object(collectives, name, counting(kind, getattr(collectives, name))))
        stack.enter_context(mock.patch.object(dist, "all_reduce", counting("all-reduce", dist.all_reduce)))
        one_step(worker, run, corpus)
    return found


def of_one_layer(pools: Pools, parity: Parity, case: Case, job: Callable) -> list:
    """What a third layer adds to what `job` counts on each rank; the job's first result must support subtraction."""
    run = case.run()
    deeper = replace(run, model=replace(run.model, num_layers=run.model.num_layers + 1))
    results = [pools.run(case.world_size, job, each, parity.corpus(case)) for each in (deeper, run)]
    return [more - less for more, less in zip(*results, strict=True)]


@pytest.mark.parametrize(
    "tp, micro_batch, model, norm, attention, dropout",
    [
        (2, 3, "gpt", "pre", "sdpa", 0.0),
        (4, 1, "bert", "post", "sdpa", 0.0),
        (4, 3, "gpt", "post", "unfused", 0.0),
        (2, 3, "bert", "pre", "unfused", 0.1),
        (2, 2, "gpt", "pre", "unfused", 0.1),
    ],
)
def test_a_layer_keeps_a_share_of_everything(
    pools: Pools, parity: Parity, tp: int, micro_batch: int, model: str, norm: str, attention: str, dropout: float
):
    """In 16 bits Korthikanti's 34 sbh / t + 5 a s^2 b / t, without the masks of dropout, which are drawn again: 32 sbh / t + 4 a s^2 b / t.

    Of the 32, 8 are not divided by t without sequence parallelism.
    """
    case = Case(model=model, tp=tp, norm=norm, attention=attention, dropout=dropout, micro_batches=1, micro_batch=micro_batch, sp=True)
    config, element = case.run().model, 8
    h, f, heads, tokens = config.hidden_size, config.ffn_size, config.num_heads, micro_batch * SEQ_LENGTH
    # Inputs of both norms, of qkv and of the first MLP matrix, and both norms' mean and 1 / deviation, of this rank's tokens.
    between = 4 * h + 2 * 2
    # Of all tokens, this rank's heads and columns: q, k, v, the input of attention's output matrix, GELU's input and output.
    inside = 4 * h + 2 * f
    scores = heads * SEQ_LENGTH * (2 if dropout else 1) if attention == "unfused" else heads
    # BERT's mask of padding, which each call of the fused kernel turns into numbers; whole, since every rank attends to all tokens.
    mask = element * tokens if model == "bert" and attention == "sdpa" else 0
    expected = element * tokens * (between + inside + scores) // tp + mask
    assert of_one_layer(pools, parity, case, saved_bytes) == [expected] * tp
    shape = {"seq_length": SEQ_LENGTH, "micro_batch_size": micro_batch, "num_microbatches": 1, "tensor_parallel": tp}
    assert expected == layer_activations(config, Layout(**shape, precision="fp64", sequence_parallel=True)), "what --dry-run predicts"
    whole = of_one_layer(pools, parity, with_settings(case, sp=False), saved_bytes)
    assert whole == [expected + element * tokens * between * (tp - 1) // tp] * tp


@pytest.mark.parametrize("model", ["gpt", "bert"])
def test_a_layer_sends_what_all_reduces_do_and_gathers_its_inputs_again(pools: Pools, parity: Parity, model: str):
    case = Case(model=model, tp=2, micro_batches=1, micro_batch=3, dropout=0.1, sp=True)
    hidden = 8 * 3 * SEQ_LENGTH * 32
    # An all-reduce of n bytes sends 2 n (t - 1) / t from each rank, the other two half of that.
    assert of_one_layer(pools, parity, with_settings(case, sp=False), sent) == [Counter({("all-reduce", hidden): 4})] * 2
    layers = of_one_layer(pools, parity, with_settings(case, bucket=40_000_000), sent)
    for layer in layers:
        assert layer["all-gather", hidden] == 2 + 2 + 2 and layer["reduce-scatter", hidden] == 2 + 2
        assert {kind for kind, size in layer if size == hidden} == {"all-gather", "reduce-scatter"}
    # And once a step the sum of what is whole: of a layer two norms of 2 h and two biases of h.
    (partial_sum,) = (size for kind, size in layers[0] if kind == "all-reduce")
    assert partial_sum >= 8 * 6 * 32


def test_the_ends_send_what_all_reduces_do(pools: Pools, parity: Parity):
    """The embedding's all-reduce and that of the head's input gradient; in scattered form, and the head's input is gathered again."""
    case = Case(tp=2, micro_batches=1, micro_batch=3, sp=True, bucket=40_000_000)
    hidden = 8 * 3 * SEQ_LENGTH * 32
    for sp, expected in ((False, {"all-reduce": 2}), (True, {"reduce-scatter": 1 + 1, "all-gather": 1 + 2})):
        variant = with_settings(case, sp=sp)
        whole = pools.run(2, sent, variant.run(), parity.corpus(variant))
        for all_of_it, layer in zip(whole, of_one_layer(pools, parity, variant, sent), strict=True):
            ends = {kind: count - 2 * layer[kind, size] for (kind, size), count in all_of_it.items() if size == hidden}
            assert ends == expected


def test_stages_exchange_shares(pools: Pools, parity: Parity):
    """With no scatter-gather to take credit for it."""
    for sp, share in ((False, 1), (True, 2)):
        case = Case(tp=2, pp=2, micro_batches=1, micro_batch=3, scatter=False, sp=sp)
        assert pools.run(4, exchanged, case.run(), parity.corpus(case)) == [{8 * 3 * SEQ_LENGTH * 32 // share}] * 4


def exchanged(worker: Worker, run: Run, corpus: Corpus | PairCorpus) -> set[int]:
    """Sizes in bytes of what a step sends to other stages."""
    found: set[int] = set()

    def counting(sends: list, *arguments: object) -> object:
        found.update(tensor.nbytes for tensor, _ in sends)
        return collectives.exchange(sends, *arguments)

    with mock.patch.object(pipeline, "exchange", counting):
        one_step(worker, run, corpus)
    return found
