"""What the launcher asks of the operating system: cores, threads, parent death, memory kills, process states. Linux."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

from megactl.machine.cgroup import memory_event_files
from megactl.machine.system import System

_PR_SET_PDEATHSIG = 1


def visible_cores() -> int:
    """Cores this process may run on (Slurm and containers give fewer than the machine has)."""
    return len(os.sched_getaffinity(0))


def thread_environment(local_ranks: int) -> dict[str, str]:
    """Thread counts for the math libraries, for the variables that are not set yet: the cores shared out over the local ranks.

    OpenBLAS gets one: numpy's copy starts its pool when imported, nothing in training uses it, and a process with threads should not fork.
    """
    share = str(max(1, visible_cores() // local_ranks))
    wanted = {"OMP_NUM_THREADS": share, "MKL_NUM_THREADS": share, "OPENBLAS_NUM_THREADS": "1"}
    return {name: value for name, value in wanted.items() if not os.environ.get(name)}


def thread_share(local_ranks: int) -> int:
    """Intra-op threads of one rank: OMP_NUM_THREADS (its first level, if nested) or the share of the cores."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdigit() and int(first) > 0 else max(1, visible_cores() // local_ranks)


class ParentDeath:
    """Makes the kernel kill this process when its parent dies. Made before the fork: loading libc is no work for a fresh child."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._parent = os.getpid()

    def arm(self) -> None:
        """Call first thing in the child. Raises OSError where the kernel refuses."""
        if self._libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        # The parent may have died between fork and prctl, and then no signal will ever come.
        if os.getppid() != self._parent:
            os._exit(1)


def oom_kills() -> int | None:
    """Processes of this memory cgroup (v2, then v1) killed for memory so far; None where the kernel does not tell."""
    for path in memory_event_files(System()):
        try:
            text = path.read_text()
        except OSError:
            continue
        for line in text.splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill" and value.strip().isdigit():
                return int(value)
    return None


def process_state(pid: int) -> str:
    """One letter as in ps: R, S, D (waits for a device), T (stopped), Z; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
