"""A training step asks the device for nothing: no number is read, no shape depends on one, nothing but the random keys comes from the host.

On a CPU nothing waits, so the operators themselves are watched; `tests/engine/test_cuda_graph.py` lets CUDA say the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megactl.engine import training_step
from megactl.engine.data import BatchLoader
from megactl.engine.training_step import TrainingStep
from parity.cases import Case, with_settings
from parity.corpus import EOD, Corpus
from parity.pool import Pools, Worker

# Each hands a value to the host, or makes a tensor whose size depends on one.
WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_static", "equal", "masked_select", "unique", "_unique2",
    "unique_consecutive", "unique_dim", "bincount", "repeat_interleave", "allclose", "bucketize", "histc",
}  # fmt: skip
# The same from Python; tolist and numpy never reach the dispatcher.
METHODS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")
# torch.tensor and its kind: on a GPU a copy from the host.
FROM_HOST = "lift_fresh"


class Watch(TorchDispatchMode):
    """Counts the operators that would wait for a GPU, and those that bring numbers from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        self.seen += 1
        if name in WAITING or name == FROM_HOST or (name in ("index", "index_put", "index_put_") and self._by_mask(args)):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _by_mask(args: tuple) -> bool:
        return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])


@contextmanager
def watched() -> Iterator[Watch]:
    watch = Watch()

    def counting(name: str):
        original = getattr(torch.Tensor, name)

        def called(self, *arguments, **options):
            watch.found[name] += 1
            return original(self, *arguments, **options)

        return called

    with ExitStack() as stack:
        for name in METHODS:
            stack.enter_context(mock.patch.object(torch.Tensor, name, counting(name)))
        stack.enter_context(watch)
        yield watch


def step_under_watch(worker: Worker, case: Case, fault: str | None) -> tuple[dict[str, int], int]:
    """What the second step of a run did; the first may build its schedule. `fault` reads a number in the middle."""
    run = case.run()
    mesh = worker.mesh(run.parallel)
    options = run.data
    loader = BatchLoader(
        Corpus(64), run.training.micro_batch_size, mesh.dp.rank, mesh.dp.size, eod=EOD, reset_position_ids=options.reset_position_ids,
        reset_attention_mask=options.reset_attention_mask, eod_mask_loss=options.eod_mask_loss,
    )  # fmt: skip
    engine, size = TrainingStep(run, mesh), run.training.global_batch_size
    batches = [loader.micro_batch(0, index) for index in range(case.micro_batches)]
    step = partial(engine.step, batches=batches.__getitem__, global_batch_size=size, learning_rate=0.01)
    step(1)
    original = training_step.clip_factor

    def faulty(norm, limit):
        return original(norm, limit) if fault is None else original(norm, min(limit, getattr(norm, fault)()))

    with mock.patch.object(training_step, "clip_factor", faulty), watched() as watch:
        step(2)
    return dict(watch.found), watch.seen


CASES = [
    Case(documents="reset", dropout=0.1),
    Case(attention="unfused", precision="fp32"),
    Case(tp=2, dropout=0.1, documents="eod"),
    Case(pp=2, micro_batches=3, dropout=0.1, documents="reset"),
    Case(pp=2, micro_batches=3, schedule="gpipe", tied=False),
    Case(dp=2, zero=0, bucket=1),
    Case(dp=2, zero=1, bucket=1, precision="bf16"),
    Case(tp=2, pp=2, dp=2, zero=1, dropout=0.1, documents="reset"),
    Case(tp=2, pp=2, vpp=2, micro_batches=2, documents="reset"),
    Case(tp=2, dp=2, zero=1, dropout=0.1, bucket=1, sp=True),
    Case(pp=2, dp=2, zero=1, schedule="zb-v", micro_batches=3, bucket=1),
    Case(tp=2, documents="reset", positions="rope", normalization="rmsnorm", activation="swiglu", kv_heads=4, bias=False),
    Case(cp=2, dropout=0.1, documents="reset"),
    Case(cp=4, zero=1, documents="eod"),
    Case(cp=2, cp_method="all-to-all", dropout=0.1, documents="reset"),
    Case(recompute="selective", dropout=0.1, attention="sdpa", micro_batches=3),
    Case(tp=2, pp=2, recompute="full", partition=True, offload="activations", micro_batches=3, dropout=0.1),
]
SCALED = {"precision": "fp16", "scale": 2.0**11}


@pytest.mark.parametrize("case", [*CASES, *(with_settings(case, **SCALED) for case in CASES[::3])], ids=lambda case: case.name)
def test_a_step_reads_nothing_back(pools: Pools, case: Case):
    for found, seen in pools.run(case.world_size, step_under_watch, case, None):
        assert found == {FROM_HOST: 1}, "the random keys of the step are all that comes from the host"
        assert seen > 100


@pytest.mark.parametrize(("fault", "seen_as"), [("item", "_local_scalar_dense"), ("tolist", "tolist"), ("__float__", "__float__")])
def test_a_number_that_is_read_is_seen(pools: Pools, fault: str, seen_as: str):
    for found, _ in pools.run(1, step_under_watch, Case(), fault):
        assert found.get(seen_as) == 1, found
