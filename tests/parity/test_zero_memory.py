"""What ZeRO leaves on a rank, counted: bytes between steps, weights gathered at a time, elements sent."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch

from megactl.config.schema import Run
from megactl.engine import gather, sharded_gradients, zero
from megactl.engine.training_step import TrainingStep
from megactl.engine.transient import TransientBuffer
from parity.cases import Case, with_settings
from parity.corpus import Corpus
from parity.jobs import source
from parity.pool import Pools, Worker

# Wide enough that scalars, keys and alignment are less than the tolerance.
HIDDEN, FFN = 128, 256
# Of a layer: qkv, attention's output, the two of the MLP. Either half has 4 h^2.
LAYER, QKV = 8 * HIDDEN * HIDDEN, 3 * HIDDEN * HIDDEN


def wide(case: Case) -> Run:
    """The case's run with wider layers."""
    run = case.run()
    return replace(run, model=replace(run.model, hidden_size=HIDDEN, ffn_size=FFN, num_layers=4))


def stepper(worker: Worker, run: Run) -> tuple[TrainingStep, Callable[[int], object]]:
    """An engine, and a function that does a step of it."""
    mesh = worker.mesh(run.parallel)
    batches = partial(source(run, Corpus(64), mesh), 0)
    engine = TrainingStep(run, mesh)
    return engine, partial(engine.step, batches=batches, global_batch_size=run.training.global_batch_size, learning_rate=0.01)


def storage_bytes() -> int:
    """Bytes of all storages that live tensors refer to, each once."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def resident(worker: Worker, run: Run) -> tuple[int, int, int]:
    """(bytes that a run keeps between steps, elements of its flat buffers, of the buckets that stay whole)."""
    worker.mesh(run.parallel)
    before = storage_bytes()
    engine, step = stepper(worker, run)
    for iteration in (1, 2):
        step(iteration)
    engine.evaluate(partial(source(run, Corpus(64), engine.mesh), 0), 1, run.training.micro_batch_size * engine.mesh.dp.size)
    flat = engine.parts[0].flat
    return storage_bytes() - before, flat.total, sum(bucket.numel for bucket in flat.buckets if not bucket.sharded)


# Bytes a parameter over d replicas: weight, gradient, optimizer.
FORMULAS = {
    ("bf16", 0): lambda d: 18.0,
    ("bf16", 1): lambda d: 6 + 12 / d,
    ("bf16", 2): lambda d: 2 + 16 / d,
    ("bf16", 3): lambda d: 18 / d,
    ("fp32", 1): lambda d: 8 + 8 / d,
    ("fp32", 2): lambda d: 4 + 12 / d,
    ("fp32", 3): lambda d: 16 / d,
}


@pytest.mark.parametrize(("precision", "stage", "dp"), [*((*key, 2) for key in FORMULAS), ("bf16", 2, 4), ("bf16", 3, 4)])
def test_bytes_between_steps_are_those_of_the_formula(pools: Pools, precision: str, stage: int, dp: int):
    case = Case(dp=dp, zero=stage, precision=precision, tied=False, prefetch=2 if stage == 3 else 1)
    for found, elements, _ in pools.run(dp, resident, wide(case)):
        assert found == pytest.approx(FORMULAS[precision, stage](dp) * elements, rel=0.002)


def test_what_stays_whole_costs_its_weights(pools: Pools):
    case = Case(dp=2, zero=3, precision="bf16", threshold=HIDDEN * HIDDEN + 1)
    for found, elements, whole in pools.run(2, resident, wide(case)):
        assert 0 < whole < elements / 4
        # Its own slice is part of the whole.
        assert found == pytest.approx(18 / 2 * elements + 2 * whole / 2, rel=0.002)


class Gathered:
    """Counts what is gathered of the layers' matrices, in elements: now, and at most."""

    def __init__(self, engine: TrainingStep) -> None:
        part = engine.parts[0]
        self.layers = {
            id(part.flat.weight_buffers[placement.bucket])
            for placement in part.flat.placements
            if placement.spec.name.startswith("layers.") and placement.bucket in part.flat.weight_buffers
        }
        self.now = self.most = 0

    def allocate(self, original: Callable, buffer: TransientBuffer) -> None:
        fresh = not buffer.nbytes
        original(buffer)
        if fresh and id(buffer) in self.layers:
            self.now += buffer.whole.numel()
            self.most = max(self.most, self.now)

    def release(self, original: Callable, buffer: TransientBuffer) -> None:
        if buffer.nbytes and id(buffer) in self.layers:
            self.now -= buffer.whole.numel()
        original(buffer)

    def watch(self) -> ExitStack:
        """While it is open, everything is counted."""
        stack = ExitStack()
        for name in ("allocate", "release"):
            original, seen = getattr(TransientBuffer, name), getattr(self, name)
            stack.enter_context(mock.patch.object(TransientBuffer, name, lambda buffer, o=original, s=seen: s(o, buffer)))
        return stack


def gathered(worker: Worker, run: Run) -> tuple[int, int]:
    """Elements of layers that are gathered (at most, after a step and an evaluation)."""
    engine, step = stepper(worker, run)
    counts = Gathered(engine)
    with counts.watch():
        step(1)
        after = counts.now
        engine.evaluate(partial(source(run, Corpus(64), engine.mesh), 0), 1, run.training.micro_batch_size * engine.mesh.dp.size)
    return counts.most, after + counts.now


GROUPS = {"recompute": "full", "recompute_layers": 3}
# Only matrices are divided: norms and biases are below the threshold.
ONE_UNIT = Case(dp=2, zero=3, threshold=5 * HIDDEN, prefetch=0, micro_batches=3)


@pytest.mark.parametrize(("prefetch", "settings"), [(0, {}), (1, {}), (2, {}), (0, GROUPS), (2, GROUPS), (1, {"recompute": "full"})])
def test_no_more_than_the_units_ahead_are_gathered(pools: Pools, prefetch: int, settings: dict):
    case = with_settings(ONE_UNIT, prefetch=prefetch, **settings)
    for most, after in pools.run(2, gathered, wide(case)):
        assert most == (prefetch + 1) * LAYER and after == 0


@pytest.mark.parametrize("settings", [{"recompute": "full"}, {"norm": "post"}], ids=str)
def test_half_layers_halve_what_is_gathered(pools: Pools, settings: dict):
    for most, after in pools.run(2, gathered, wide(with_settings(ONE_UNIT, split_layers=True, **settings))):
        assert most == LAYER // 2 and after == 0


@pytest.mark.parametrize(("tile", "settings"), [(2, {}), (4, {"recompute": "full"}), (4, {"split_layers": True}), (2, {"prefetch": 1})])
def test_tiles_divide_what_is_gathered(pools: Pools, tile: int, settings: dict):
    case = with_settings(ONE_UNIT, tile=tile, **settings)
    for most, after in pools.run(2, gathered, wide(case)):
        # The largest tile is one of qkv; with two at a time, two of them.
        assert most == QKV // tile * (case.prefetch + 1) and after == 0


def sent(worker: Worker, run: Run) -> tuple[int, int, int, int, int]:
    """Elements (gathered, reduced) in a step, then of (all weights, tables of embeddings, the last unit) of the part."""
    engine, step = stepper(worker, run)
    flat, counts = engine.parts[0].flat, {"all_gather": 0, "reduce_scatter": 0}

    def counting(name: str, original: Callable) -> Callable:
        def called(output, tensor, group, **options):
            counts[name] += max(output.numel(), tensor.numel())
            return original(output, tensor, group, **options)

        return called

    with ExitStack() as stack:
        for module, name in ((gather, "all_gather"), (zero, "all_gather"), (sharded_gradients, "reduce_scatter")):
            stack.enter_context(mock.patch.object(module, name, counting(name, getattr(module, name))))
        step(1)
    last = max(reader for bucket in flat.buckets for reader, _ in bucket.readers)
    tables = sum(bucket.numel for bucket in flat.buckets if not any(in_backward for _, in_backward in bucket.readers))
    head = sum(bucket.numel for bucket in flat.buckets if bucket.is_read(last, backward=True))
    return counts["all_gather"], counts["reduce_scatter"], flat.total, tables, head


@pytest.mark.parametrize("count", [1, 3])
def test_what_travels(pools: Pools, count: int):
    case = Case(dp=2, micro_batches=count, tied=False, zero=3)
    for gathers, reduces, total, tables, head in pools.run(2, sent, wide(case)):
        # Twice a micro-batch, but for tables, which backward does not read, and the head, whose backward follows its forward.
        assert gathers == count * (2 * total - tables - head) and 0 < tables + head < total / 4
        assert reduces == count * total
    for gathers, reduces, total, *_ in pools.run(2, sent, wide(with_settings(case, zero=2))):
        assert gathers == total and reduces == count * total
