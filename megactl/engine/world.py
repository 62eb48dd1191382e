"""Joining the ranks of a run: this rank's device, the default process group, and their end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megactl.config.schema import Run
from megactl.engine.launch import RankContext, connect_store
from megactl.engine.resilience import Limits
from megactl.errors import RunError


@contextmanager
def joined(run: Run, context: RankContext) -> Iterator[torch.device]:
    """This rank's device; inside, the default process group of all ranks is up. `run` is resolved.

    Raises RunError where another rank is gone. After an error the group is left as it is: a rank that waited for the others to
    close it would never report.
    """
    device = _device(run, context)
    if context.world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        seconds = Limits.from_environment().collective
        store = connect_store(context, timeout=seconds)
        dist.init_process_group(backend, store=store, rank=context.rank, world_size=context.world_size, timeout=timedelta(seconds=seconds))
    try:
        yield device
        with context.heartbeat.phase("end"):
            _disconnect()
    except dist.DistError as error:
        raise RunError(f"rank {context.rank} lost its connection: {error}") from error


def _device(run: Run, context: RankContext) -> torch.device:
    if run.training.device != "cuda":
        return torch.device("cpu")
    # A Slurm task may see one GPU of several: its local rank then exceeds what it sees.
    device = torch.device("cuda", context.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = False
    return device


def _disconnect() -> None:
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
