"""The ranks of this machine as children of this process: forked, supervised, and their end told."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megactl.engine.launch.child import run_child
from megactl.engine.launch.context import RankContext
from megactl.engine.launch.failures import describe, root_cause
from megactl.engine.launch.host import ParentDeath
from megactl.engine.launch.job import EXIT_ABORTED, EXIT_SAVED, Job
from megactl.engine.launch.supervisor import Child, Outcome, Supervisor
from megactl.engine.resilience import STOP_SIGNALS, Board, HangWatch, Heartbeat, StopFlag
from megactl.errors import RunError
from megactl.machine.sockets import listen

if TYPE_CHECKING:
    from megactl.config.start import StartInfo


def run_forked(job: Job) -> int:
    """Fork the ranks, wait for them, print what went wrong, and return the exit code."""
    _check_fork_is_safe()
    start = job.start
    job.forget_last_attempt(range(start.rank, start.rank + start.local_world_size))
    with _wire(start) as wires:
        watch = HangWatch(wires.board, job.limits)
        children = _fork_all(job, wires)
        outcome = Supervisor(children, wires.board, watch, job.run_dir, wires.read_end, job.stopping).run()
    return _conclude(job, outcome)


def _check_fork_is_safe() -> None:
    # A forked child has only the thread that forked: a lock another thread held stays locked for ever. CUDA does not survive a fork at all.
    others = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    assert not others, f"launch() must fork before any thread is started; running: {others}"
    torch = sys.modules.get("torch")
    assert torch is None or not torch.cuda.is_initialized(), "launch() must fork before CUDA is initialised"


@dataclass
class _Wires:
    """What parent and children share: memory, the rendezvous socket, the terminal, and the pipe of rank 0's stderr."""

    board: Board
    death: ParentDeath
    server: socket.socket | None
    terminal: int | None
    read_end: int | None
    write_end: int | None

    def keep_child_ends(self, is_first: bool) -> None:
        """In a child: close what belongs to others, so that the port and the pipe end with the rank that owns them."""
        self.close_fd("read_end")
        if not is_first:
            self.close_fd("write_end", "terminal")
            if self.server is not None:
                self.server.close()

    def close_fd(self, *names: str) -> None:
        """Close these descriptors if they are open."""
        for name in names:
            if (fd := getattr(self, name)) is not None:
                os.close(fd)
                setattr(self, name, None)


@contextmanager
def _wire(start: StartInfo) -> Iterator[_Wires]:
    read_end, write_end = os.pipe() if start.is_first else (None, None)
    terminal = os.dup(2) if start.is_first and sys.stderr.isatty() else None
    wires = _Wires(Board(start.local_world_size), ParentDeath(), None, terminal, read_end, write_end)
    try:
        if start.kind == "self":
            wires.server = listen("127.0.0.1", 0)
        elif start.is_first:
            wires.server = listen("", start.master_port)
        yield wires
    finally:
        if wires.server is not None:
            wires.server.close()
        wires.close_fd("read_end", "write_end", "terminal")


def _fork_all(job: Job, wires: _Wires) -> list[Child]:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    gc.collect()
    # Objects made so far are never collected again in a child, so that its collector does not touch (and copy) the pages it shares.
    gc.freeze()
    # A stop signal between the fork and the child's handlers would kill the child: it waits until both sides are ready.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    children: list[Child] = []
    try:
        for local_rank in range(job.start.local_world_size):
            children.append(_fork(job, wires, local_rank))
    except OSError as error:
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        message = f"rank {job.start.rank + len(children)} could not be started: {error.strerror}"
        raise RunError(message, "lower --nproc, or raise ulimit -u") from error
    finally:
        gc.unfreeze()
    wires.close_fd("write_end", "terminal")
    if wires.server is not None:
        wires.server.close()
    return children


def _fork(job: Job, wires: _Wires, local_rank: int) -> Child:
    start, server = job.start, wires.server
    rank = start.rank + local_rank
    context = RankContext(
        rank=rank,
        local_rank=local_rank,
        world_size=start.world_size,
        local_world_size=start.local_world_size,
        master_addr=start.master_addr,
        master_port=server.getsockname()[1] if server is not None else start.master_port,
        run_dir=job.run_dir,
        is_child=True,
        stop=StopFlag(wires.board),
        heartbeat=Heartbeat(wires.board, local_rank),
        listen_fd=server.fileno() if rank == 0 and server is not None else None,
        terminal_fd=wires.terminal if rank == 0 else None,
        started=job.started,
    )
    pid = os.fork()
    if pid:
        return Child(pid, context)
    wires.keep_child_ends(rank == 0)
    run_child(lambda: job.work(context), context, wires.death, wires.write_end)


def _conclude(job: Job, outcome: Outcome) -> int:
    if outcome.aborted:
        print("interrupted: the ranks were ended without saving", file=sys.stderr)
        return job.finish("interrupted", EXIT_ABORTED, "interrupted by a second SIGINT")
    if outcome.hang is not None:
        print(f"error: {outcome.hang}", file=sys.stderr)
        return job.finish("failed", 1, outcome.hang.splitlines()[0])
    if outcome.failures:
        failure = root_cause(outcome.failures)
        same = sum(1 for other in outcome.failures if other.report and failure.report and other.report.message == failure.report.message)
        text = describe(failure, job.run_dir, local_ranks=job.start.local_world_size, same_message=max(1, same))
        print(text, file=sys.stderr)
        return job.finish("failed", failure.exit_code, text.splitlines()[0].removeprefix("error: "), secondary=failure.secondary)
    code = EXIT_SAVED if EXIT_SAVED in outcome.codes.values() else 0
    return job.finish("saved" if code == EXIT_SAVED else "completed", code, None)
