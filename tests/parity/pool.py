"""Persistent gloo workers for tests. Each job is a top-level function that every rank of a world runs; its results are gathered.

Workers are forked from multiprocessing's fork server, a process without threads that has imported torch once: a worker is
there in milliseconds, and nothing of the test process (threads, open files, patched modules) comes with it.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

from megactl.config.schema import Parallel
from megactl.engine.mesh import Mesh, build_mesh, degrees, stage_ranks

# After one rank has failed the others wait for it in a collective; this long (seconds) they may still report something of their own.
GRACE = 1.0
# What the fork server imports, once for all workers: the engine takes seconds, most of them in torch._dynamo.
PRELOAD = ["torch.distributed", "megactl.engine.training_step"]


class WorkerFailure(Exception):
    """A job failed on at least one rank: its rank, and its traceback or how it ended."""


class Worker:
    """What a job finds on its rank: the rank, the world's size, and the mesh of a layout."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._degrees: dict[str, object] | None = None
        self._mesh: Mesh | None = None

    def mesh(self, parallel: Parallel) -> Mesh:
        """The mesh of `parallel`. The last one is kept; its groups are destroyed when another is asked for, for each holds threads."""
        import torch

        stages = stage_ranks(parallel)
        # Where the ends of the model are decides which ranks have a group for the embedding.
        wanted = {**degrees(parallel), "ends": (stages[0], stages[-1])}
        if wanted != self._degrees:
            self.forget_mesh()
            self._mesh, self._degrees = build_mesh(parallel, torch.device("cpu")), wanted
        return self._mesh

    def forget_mesh(self) -> None:
        """Destroy the groups of the mesh that is kept, if any. Every rank must do it together."""
        import torch.distributed as dist

        if self._mesh is None:
            return
        # Nobody may still be in a collective of a group whose sockets another rank closes.
        dist.barrier()
        axes = [getattr(self._mesh, name) for name in ("tp", "cp", "dp", "pp", "replicas", "embedding")]
        groups = {id(axis.group): axis.group for axis in axes if axis is not None and axis.group is not None}
        for group in groups.values():
            dist.destroy_process_group(group)
        self._mesh = self._degrees = None


Job = Callable[..., Any]


@dataclass
class _Member:
    """The parent's view of one worker."""

    process: multiprocessing.process.BaseProcess
    connection: Connection
    stacks: Path


class WorkerPool:
    """`world_size` workers that share one default process group. They are started by the first job, and again after a failure."""

    def __init__(self, world_size: int, *, timeout: float = 60.0) -> None:
        self.world_size, self.timeout = world_size, timeout
        self._members: list[_Member] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, job: Job, *arguments: Any) -> list[Any]:
        """Call job(worker, *arguments) on every rank; returns the results by rank.

        `job` must be importable by name. Raises WorkerFailure where a rank raised, died, or took longer than `timeout` seconds.
        """
        if not self._members:
            self._start()
        message = pickle.dumps((job, arguments))
        for member in self._members:
            member.connection.send_bytes(message)
        return self._gather()

    def pids(self) -> list[int]:
        """Process ids of the running workers, by rank."""
        return [member.process.pid for member in self._members]

    def close(self) -> None:
        """End the workers: they are asked, and killed where they do not answer."""
        for member in self._members:
            member.connection.close()
        for member in self._members:
            member.process.join(5.0)
        self._kill()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        # The server imports before it is told this process's path, so the path goes with its environment.
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
            forkserver.ensure_running()
        self._folder = tempfile.TemporaryDirectory(prefix="megactl-parity-")
        # Rank 0 serves the store on a port the kernel picks, and says which: none can be taken in between.
        self._members = [self._spawn(context, 0, 0)]
        (port,) = self._gather(1)
        self._members += [self._spawn(context, rank, port) for rank in range(1, self.world_size)]
        self._gather()

    def _spawn(self, context: Any, rank: int, port: int) -> _Member:
        ours, theirs = context.Pipe()
        stacks = Path(self._folder.name) / f"rank{rank}.txt"
        process = context.Process(target=_serve, args=(theirs, rank, self.world_size, port, str(stacks)), daemon=True)
        process.start()
        theirs.close()
        return _Member(process, ours, stacks)

    def _gather(self, count: int | None = None) -> list[Any]:
        """One answer from each of the first `count` workers."""
        waiting = {member.connection: rank for rank, member in enumerate(self._members[:count])}
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + self.timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), left):
                rank = waiting.pop(connection)
                good, value = self._receive(rank)
                (results if good else failures)[rank] = value
                if not good:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if waiting or failures:
            raise WorkerFailure(self._explain(sorted(waiting.values()), failures))
        return [results[rank] for rank in sorted(results)]

    def _receive(self, rank: int) -> tuple[bool, Any]:
        member = self._members[rank]
        try:
            return pickle.loads(member.connection.recv_bytes())
        except (EOFError, ConnectionError):
            member.process.join(1.0)
            return False, f"the process ended with exit code {member.process.exitcode}"

    def _explain(self, silent: list[int], failures: dict[int, str]) -> str:
        """The message of a failed job. The workers are gone afterwards: what the ranks of a broken collective hold is unknown."""
        parts = [f"rank {rank} of {self.world_size}: {text}" for rank, text in sorted(failures.items())]
        if not failures:
            # Nobody failed, so where the silent ones stand is all there is to know.
            parts += [f"rank {rank} of {self.world_size}: no answer in {self.timeout:g} s\n{self._stack(rank)}" for rank in silent]
        elif silent:
            parts.append(f"no answer from ranks {silent}, which were left waiting")
        self._kill()
        return "\n".join(parts)

    def _stack(self, rank: int) -> str:
        member = self._members[rank]
        os.kill(member.process.pid, signal.SIGUSR1)
        time.sleep(0.1)
        return member.stacks.read_text()

    def _kill(self) -> None:
        for member in self._members:
            member.connection.close()
            member.process.kill()
            member.process.join()
        self._members = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class Pools:
    """One pool a world size, each started when it is first asked for."""

    def __init__(self) -> None:
        self._pools: dict[int, WorkerPool] = {}

    def run(self, world_size: int, job: Job, *arguments: Any) -> list[Any]:
        """See WorkerPool.run."""
        pool = self._pools.setdefault(world_size, WorkerPool(world_size))
        return pool.run(job, *arguments)

    def close(self) -> None:
        """End the workers of every pool."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


def _serve(connection: Connection, rank: int, world_size: int, port: int, stacks: str) -> None:
    """The worker: join the world, then do what the connection says until it closes."""
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file)
        _answer(connection, lambda: _join(connection, rank, world_size, port))
        worker = Worker(rank, world_size)
        while True:
            try:
                message = connection.recv_bytes()
            except (EOFError, ConnectionError):
                # Without the goodbyes of gloo and of the store: a peer may be gone already.
                os._exit(0)
            _answer(connection, lambda message=message: _call(worker, message))


def _call(worker: Worker, message: bytes) -> Any:
    job, arguments = pickle.loads(message)
    return job(worker, *arguments)


def _answer(connection: Connection, work: Callable[[], Any]) -> None:
    try:
        # Plain pickle: the connection's own would send tensors through shared memory, one open file each.
        answer = pickle.dumps((True, work()))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    connection.send_bytes(answer)


def _join(connection: Connection, rank: int, world_size: int, port: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # gloo looks the host's name up otherwise, which machines without a network cannot do.
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        os.environ["GLOO_SOCKET_IFNAME"] = loopback[0]
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0, wait_for_workers=False)
    if rank == 0:
        connection.send_bytes(pickle.dumps((True, store.port)))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=50))
