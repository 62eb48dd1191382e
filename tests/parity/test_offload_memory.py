"""What `--offload` leaves on the device and takes of the host, counted: bytes of live tensors between steps, and while building."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megactl.config.memory import offload_targets
from megactl.config.schema import Run
from megactl.costmodel.offload import host_bytes
from megactl.engine import offload
from megactl.engine.offload import OffloadedOptimizer
from megactl.engine.training_step import TrainingStep
from megactl.engine.transient import TransientBuffer
from megactl.engine.zero import ShardedOptimizer
from parity.cases import Case
from parity.pool import Pools, Worker
from parity.test_zero_memory import stepper, storage_bytes, wide


class HostTensors:
    """Counts what is asked of host memory, and keeps which storages it is."""

    def __init__(self) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}
        self._original = offload.host_tensor

    def make(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        found = self._original(numel, dtype, device)
        storage = found.untyped_storage()
        self.storages[storage._cdata] = storage
        return found

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def counted(worker: Worker, run: Run) -> tuple[int, int, int, int]:
    """Bytes that a run keeps between steps (on the device, in host memory), elements of its flat buffers, of its longest piece."""
    worker.mesh(run.parallel)
    before, host = storage_bytes(), HostTensors()
    with mock.patch.object(offload, "host_tensor", host.make):
        engine, step = stepper(worker, run)
        for iteration in (1, 2):
            step(iteration)
    optimizer = engine.parts[0].optimizer
    pieces = optimizer._pieces
    return storage_bytes() - before - host.nbytes, host.nbytes, engine.parts[0].flat.total, max(piece.numel for piece in pieces)


# Bytes of a parameter on the device, with d replicas.
ON_DEVICE = {
    ("bf16", "optimizer", 0): lambda d: 6.0,
    ("bf16", "optimizer", 1): lambda d: 6.0,
    ("bf16", "optimizer", 2): lambda d: 2 + 4 / d,
    ("bf16", "optimizer", 3): lambda d: 6 / d,
    ("bf16", "optimizer,parameters", 3): lambda d: 4 / d,
    ("bf16", "parameters", 3): lambda d: 16 / d,
    ("fp32", "optimizer", 1): lambda d: 8.0,
    ("fp32", "optimizer,parameters", 3): lambda d: 4 / d,
    ("fp32", "parameters", 3): lambda d: 12 / d,
}


@pytest.mark.parametrize(("precision", "what", "stage", "dp"), [*((*key, 2) for key in ON_DEVICE), ("bf16", "optimizer,parameters", 3, 1)])
def test_bytes_are_those_of_the_formula(pools: Pools, precision: str, what: str, stage: int, dp: int):
    case = Case(dp=dp, zero=stage, precision=precision, tied=False, offload=what)
    weight, main = (2, 4) if precision == "bf16" else (4, 4)
    for device, host, elements, piece in pools.run(dp, counted, wide(case)):
        assert device == pytest.approx(ON_DEVICE[precision, what, stage](dp) * elements, rel=0.002)
        # Pages are whole, and a tensor has its own.
        wanted = host_bytes(offload_targets(what), parameters=elements, zero=stage, replicas=dp, weight=weight, main=main, largest=piece)
        assert host == pytest.approx(wanted, rel=0.002)


def built(worker: Worker, run: Run) -> tuple[int, int]:
    """The most bytes of buffers that come and go while a part is built, and those of its largest bucket."""
    mesh, now, most = worker.mesh(run.parallel), {}, [0]
    resize = torch.UntypedStorage.resize_

    def watched(storage: torch.UntypedStorage, size: int) -> None:
        resize(storage, size)
        now[storage._cdata] = size
        most[0] = max(most[0], sum(now.values()))

    made = TransientBuffer.__init__

    def init(self, numel, dtype, device):
        # What it takes before it gives it back.
        most[0] = max(most[0], sum(now.values()) + numel * dtype.itemsize)
        made(self, numel, dtype, device)

    with (
        mock.patch.object(torch.UntypedStorage, "resize_", watched),
        mock.patch.object(TransientBuffer, "__init__", init),
        mock.patch.object(OffloadedOptimizer, "_new_state", _only_on_the_host(OffloadedOptimizer._new_state)),
    ):
        engine = TrainingStep(run, mesh)
    flat = engine.parts[0].flat
    return most[0], max(bucket.numel for bucket in flat.buckets) * (flat.dtype.itemsize + flat.main_dtype.itemsize)


def _only_on_the_host(original):
    def made(self, numel):
        with mock.patch.object(ShardedOptimizer, "_new_state", side_effect=AssertionError("state on the device")):
            return original(self, numel)

    return made


def test_building_takes_no_more_than_a_bucket(pools: Pools):
    case = Case(zero=3, precision="bf16", tied=False, offload="optimizer,parameters")
    for most, bucket in pools.run(1, built, wide(case)):
        assert 0 < most <= bucket
