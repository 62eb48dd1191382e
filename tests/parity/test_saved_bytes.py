"""What a stage really keeps for backward, counted tensor by tensor, against the formulas of costmodel, under every kind of recomputation.

The storages that autograd saves are counted in a model of six layers and in one of three; the difference is that of three layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch

from megactl.config.memory import offload_targets
from megactl.config.schema import Memory, Model, Parallel, Run, Training
from megactl.costmodel.memory import Layout, layer_activations
from megactl.costmodel.recompute import Recompute, kept_layers
from megactl.engine import ops
from megactl.engine.models.layers import MicroBatch, Targets
from megactl.engine.parallelize import build_part
from megactl.engine.pipeline import padding_attention_mask
from parity.pool import Pools, Worker

B, S, H = 2, 64, 256
FEW, MANY = 3, 6


@dataclass(frozen=True)
class Counted:
    """Bytes of distinct storages on the device: those that forward saved, those that backward saved (in second forwards); on the host."""

    forward: int
    backward: int
    host: int


class Counter:
    """Counts storages that autograd saves, parameters aside. It holds them, so that no address is used twice."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.kept: list[torch.Tensor] = []
        self.storages: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.storages[storage.data_ptr()] = storage.nbytes()
            self.kept.append(tensor)
        return tensor

    def total(self) -> int:
        found, self.storages = sum(self.storages.values()), {}
        return found


def count(worker: Worker, run: Run, layers: int) -> Counted:
    """Of one micro-batch through a model of `layers` layers."""
    run = replace(run, model=replace(run.model, num_layers=layers))
    part = build_part(run, worker.mesh(run.parallel), 0, 1)
    model, counter = part.model, Counter(part.model)
    ids = torch.arange(B * S).view(B, S) % 100
    positions = torch.arange(S).expand_as(ids)
    encodes = run.model.architecture == "bert"
    micro_batch = MicroBatch(
        torch.tensor([1, 2, 0]), positions, padding_attention_mask(positions < S - 4) if encodes else None,
        token_types=positions // 40 if encodes else None,
    )  # fmt: skip
    targets = Targets(ids, torch.ones(ids.shape, dtype=torch.promote_types(part.flat.params.dtype, torch.float32)), ids[:, 0] % 2)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
        loss = model.loss_sums(model(ids, micro_batch), targets)
        forward = counter.total()
        with part.backward():
            loss.sum().backward()
    saved = getattr(model.run_layers, "saved", None)
    host = 0 if saved is None or saved.store is None else sum(row.nbytes for slot in saved.store._free for row in slot.rows)
    return Counted(forward, counter.total(), host)


def run_of(memory: Memory, *, precision: str = "fp32", tp: int = 1, sp: bool = False, **model: object) -> Run:
    architecture = {"num_layers": FEW, "hidden_size": H, "num_heads": 4, "ffn_size": 3 * H, "vocab_size": 100, "max_positions": S}
    return Run(
        model=Model(**(architecture | {"sentence_head": True if model.get("architecture") == "bert" else None} | model)),
        parallel=Parallel(tensor_parallel=tp, data_parallel=1, zero=0, sequence_parallel=sp),
        training=Training(micro_batch_size=B, global_batch_size=B, seq_length=S, precision=precision, device="cpu"),
        memory=memory,
    )


def layout_of(run: Run) -> Layout:
    memory = run.memory
    return Layout(
        seq_length=S, micro_batch_size=B, num_microbatches=1, tensor_parallel=run.parallel.tensor_parallel,
        precision=run.training.precision, sequence_parallel=run.parallel.sequence_parallel, recompute=memory.recompute,
    )  # fmt: skip


def expected(run: Run) -> Counted:
    """What the formulas say of MANY - FEW layers."""
    memory, layout = run.memory, layout_of(run)
    shares = run.parallel.tensor_parallel
    plan = Recompute(
        memory.recompute, memory.recompute_method, memory.recompute_layers,
        shares=shares if memory.partition_activations else 1, on_host="activations" in offload_targets(memory.offload),
    )  # fmt: skip
    layer, element = layer_activations(run.model, layout), {"bf16": 2, "fp32": 4, "fp64": 8}[run.training.precision]
    layer_input = element * B * S * H // (shares if run.parallel.sequence_parallel else 1)
    many, few = (kept_layers(plan, layers, layer=layer, layer_input=layer_input) for layers in (MANY, FEW))
    again = 0 if memory.recompute != "full" else (0 if memory.recompute_method == "block" else MANY - FEW) * layer
    return Counted(many.device - few.device, again, many.host - few.host)


ATTENTION = {
    "fused": {"attention": "sdpa", "hidden_dropout": 0.1},
    "unfused": {"attention": "unfused"},
    "unfused, dropout": {"attention": "unfused", "attention_dropout": 0.1, "hidden_dropout": 0.1},
}
MODELS = {"gpt": {}, "bert": {"architecture": "bert"}, "post-norm bert": {"architecture": "bert", "norm_position": "post"}}
FULL = {
    "full": Memory(recompute="full"),
    "full, groups of 2": Memory(recompute="full", recompute_layers=2),
    "full, first 2": Memory(recompute="full", recompute_method="block", recompute_layers=2),
    "full, on the host": Memory(recompute="full", offload="activations"),
}
MEMORY = {"none": Memory(), "selective": Memory(recompute="selective"), **FULL}


def check(pools: Pools, run: Run) -> None:
    if run.model.hidden_dropout and not ops.use_compiled():
        pytest.skip("the reference dropout keeps masks; the formulas are for the compiled one")
    few, many = (pools.run(run.parallel.tensor_parallel, count, run, layers) for layers in (FEW, MANY))
    formula = expected(run)
    # In 16 bits a CPU keeps some statistics in another type than a GPU.
    tolerance = 0.01 if run.training.precision == "bf16" else 0.0
    for one, other in zip(few, many, strict=True):
        assert other.forward - one.forward == pytest.approx(formula.forward, rel=tolerance)
        assert other.host - one.host == formula.host
        if run.memory.recompute == "full":
            # Selective's second forward keeps the tensors of one layer at a time.
            assert other.backward - one.backward == pytest.approx(formula.backward, rel=tolerance)


EVERY = [
    pytest.param(*names, precision, marks=[pytest.mark.nightly] if precision == "fp64" else [])
    for names, precision in product(product(MODELS, ATTENTION), ("bf16", "fp64"))
]


@pytest.mark.parametrize(("model", "attention", "precision"), EVERY)
def test_a_layer_keeps_what_the_formula_says(pools: Pools, model: str, attention: str, precision: str):
    for memory in MEMORY.values():
        check(pools, run_of(memory, precision=precision, **MODELS[model], **ATTENTION[attention]))


@pytest.mark.parametrize("model", MODELS)
def test_tensor_parallel_ranks_keep_what_the_formula_says(pools: Pools, model: str):
    shared = Memory(recompute="full", partition_activations=True)
    for memory in (*MEMORY.values(), shared, replace(shared, recompute_layers=2, offload="activations")):
        check(pools, run_of(memory, tp=2, **MODELS[model], **ATTENTION["unfused, dropout"]))


@pytest.mark.parametrize("model", MODELS)
def test_sequence_parallel_ranks_keep_what_the_formula_says(pools: Pools, model: str):
    for memory in MEMORY.values():
        for attention in ("fused", "unfused, dropout"):
            check(pools, run_of(memory, tp=2, sp=True, **MODELS[model], **ATTENTION[attention]))
