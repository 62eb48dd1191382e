"""Runs `launch` with a small worker in a process of its own, as a user's shell would: python driver.py RUN_DIR WORKER RANKS [KIND]."""

from __future__ import annotations

import dataclasses
import importlib
import os
import signal
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

from megactl.config.schema import Logging, Run
from megactl.config.start import StartInfo
from megactl.config.store import claim
from megactl.engine.launch import connect_store, launch
from megactl.engine.metrics import MetricsWriter, Step
from megactl.errors import ConfigError, MegactlError, Problem, RunError


def _steps(context, *, seconds=0.02, total=10_000):
    """A trainer's loop without training: beats, and returns 75 when asked to stop."""
    for iteration in range(1, total + 1):
        context.heartbeat.beat(iteration)
        time.sleep(seconds)
        if context.stop.requested:
            return 75
    return 0


def _ready(context):
    (context.run_dir / f"ready-{context.rank}").write_text(str(os.getpid()))


def fine(run, resolved, context):
    if context.rank == 0:
        print("hello from rank 0")
    print(f"noise of rank {context.rank}", file=sys.stderr)
    return 0


def loop(run, resolved, context):
    _ready(context)
    return _steps(context)


def loop_and_report_signal(run, resolved, context):
    code = loop(run, resolved, context)
    (context.run_dir / f"signal-{context.rank}").write_text(str(context.stop.requested))
    return code


def slow_save(run, resolved, context):
    code = loop(run, resolved, context)
    with context.heartbeat.phase("save"):
        time.sleep(1.0)
    (context.run_dir / f"saved-{context.rank}").touch()
    return code


def never_stops(run, resolved, context):
    _ready(context)
    while True:
        time.sleep(0.02)


def first_step_hangs(run, resolved, context):
    """Rank 1 never comes out of its first step; the others wait for it, as in a collective."""
    context.heartbeat.beat()
    _ready(context)
    if context.rank == 1:
        stuck()
    waits_in_a_collective(context)


def stuck():
    time.sleep(60)


def waits_in_a_collective(context):
    while True:
        time.sleep(0.02)


def stops_early(run, resolved, context):
    """Rank 1 is stopped after the others have begun to wait for it, so that theirs is the longer silence."""
    if context.rank == 1:
        time.sleep(0.6)
        context.heartbeat.beat()
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


def witness_of_a_stopped_rank(run, resolved, context):
    """Rank 0's collective gives up on rank 1, which is stopped, before the watch does."""
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)
    raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 600000ms for recv operation to complete")


def beats_then_hangs(run, resolved, context):
    for iteration in range(1, 4):
        context.heartbeat.beat(iteration)
    time.sleep(60)
    return 0


def killed(run, resolved, context):
    for iteration in range(1, 8):
        context.heartbeat.beat(iteration)
    if context.rank == 1:
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return _steps(context)


def segfault(run, resolved, context):
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    return _steps(context)


def raises(run, resolved, context):
    if context.rank == 1:
        raise ValueError("the loss fell off a cliff")
    return _steps(context)


def witness_first(run, resolved, context):
    """Rank 0 notices the lost connection before rank 1, the cause, has reported."""
    if context.rank == 0:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4321")
    if context.rank == 1:
        time.sleep(0.4)
        raise ValueError("the cause")
    return _steps(context)


def wrapped_witness(run, resolved, context):
    if context.rank == 0:
        try:
            raise ConnectionResetError("Connection reset by peer")
        except ConnectionResetError as error:
            raise RunError("all-reduce failed") from error
    time.sleep(0.3)
    raise ZeroDivisionError("the cause")


def user_error(run, resolved, context):
    raise ConfigError([Problem("micro_batch_size = 3", "must divide the global batch", "set 4")])


def run_error(run, resolved, context):
    if context.rank == 1:
        raise RunError("the disk is full", "free some space")
    return _steps(context)


def sys_exit_3(run, resolved, context):
    if context.rank == 1:
        sys.exit(3)
    return _steps(context)


def sys_exit_text(run, resolved, context):
    sys.exit("no more coffee")


def sys_exit_0(run, resolved, context):
    sys.exit(0)


def returns_none(run, resolved, context):
    return None


def saved_on_one(run, resolved, context):
    return 75 if context.rank == 1 else 0


def live_metrics(run, resolved, context):
    terminal = os.fdopen(context.terminal_fd, "w") if context.terminal_fd is not None else None
    options = {"start_iteration": 0, "total_iterations": 12, "is_terminal": terminal is not None, "terminal": terminal}
    writer = MetricsWriter(context.run_dir, resolved.run, **options)
    for iteration in range(1, 13):
        time.sleep(0.02)
        values = {"loss": 1.0, "learning_rate": 0.1, "global_batch_size": 1, "seconds": 0.02}
        writer.step(Step(iteration=iteration, consumed_samples=iteration, **values))
        if iteration == 5:
            print("a warning", file=sys.stderr, flush=True)
    writer.finish("completed")
    return 0


def torch_sum(run, resolved, context):
    import torch
    import torch.distributed as dist

    store = connect_store(context, timeout=30)
    dist.init_process_group("gloo", store=store, rank=context.rank, world_size=context.world_size)
    value = torch.tensor([float(context.rank + 1)])
    dist.all_reduce(value)
    dist.destroy_process_group()
    print(f"sum {value.item()} threads {torch.get_num_threads()} env {os.environ['RANK']}/{os.environ['WORLD_SIZE']}")
    return 0 if value.item() == context.world_size * (context.world_size + 1) / 2 else 1


def torch_cuda(run, resolved, context):
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(context.local_rank)
    store = connect_store(context, timeout=60)
    dist.init_process_group("nccl", store=store, rank=context.rank, world_size=context.world_size)
    value = torch.tensor([float(context.rank + 1)], device="cuda")
    dist.all_reduce(value)
    print(f"nccl sum {value.item()}")
    dist.destroy_process_group()
    return 0


def torch_peer_dies(run, resolved, context):
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", store=connect_store(context, timeout=30), rank=context.rank, world_size=context.world_size)
    for iteration in range(1, 1000):
        context.heartbeat.beat(iteration)
        dist.all_reduce(torch.ones(4))
        if context.rank == 1 and iteration == 5:
            raise ValueError("the cause")
    return 0


def many_lines(run, resolved, context):
    for number in range(300):
        print(f"line {number} of rank {context.rank} " + "x" * 80 + " end", flush=True)
        print(f"err {number} of rank {context.rank} " + "y" * 80 + " end", file=sys.stderr, flush=True)
    return 0


def main() -> None:
    run_dir, worker, ranks, *rest = sys.argv[1:]
    kind = rest[0] if rest else "self"
    rank = int(os.environ.get("TEST_RANK", "0"))
    port = int(os.environ.get("TEST_PORT", "0"))
    world = int(os.environ.get("TEST_WORLD", ranks))
    start = StartInfo(kind, rank, 0, world, int(ranks), "127.0.0.1", port)
    run = dataclasses.replace(Run(), logging=Logging(run_dir=run_dir, tensorboard_dir=os.environ.get("TEST_TENSORBOARD")))
    if worker.startswith("torch"):
        # As the trainer does: imported once, before the fork.
        importlib.import_module("torch")
    try:
        # As the train command does: the run directory is held by the process that answers for rank 0.
        with claim(run_dir) if start.is_first else nullcontext():
            code = launch(run, SimpleNamespace(run=run, derived=()), start, worker=globals()[worker])
    except MegactlError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
