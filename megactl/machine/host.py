"""The host: memory and what limits it, /dev/shm, cores, limits of a process, the clock."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass

from megactl.machine.cgroup import cpu_quota, memory_limit
from megactl.machine.check import Check
from megactl.machine.system import System

GIB = 2**30
_MIB = 2**20
# Docker's /dev/shm, unless told otherwise, has 64 MiB; NCCL asks for some ten MiB a pair of GPUs.
_SHM_TINY, _SHM_SMALL = 256 * _MIB, GIB
_MEMORY_LOW = 2 * GIB
_FILES_FEW, _FILES_ENOUGH = 256, 4096
# NCCL registers its buffers with the network card, tens of MiB a connection.
_LOCKED_TINY = 256 * _MIB


def gib(number: float) -> str:
    """Bytes as "12.3 GiB"."""
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / _MIB:.0f} MiB"


@dataclass(frozen=True)
class HostMemory:
    """Bytes: what the machine has, what it could give now, and the limit of this process's control groups (None without any)."""

    total: int
    available: int
    limit: int | None

    @property
    def usable(self) -> int:
        """What a new run may take."""
        return self.available if self.limit is None else min(self.available, self.limit)


def host_memory(system: System) -> HostMemory | None:
    """None where /proc/meminfo cannot be read. A limit above what the machine has is none."""
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in (system.read("proc/meminfo") or "").splitlines() if "kB" in line}
    total, available, limit = values.get("MemTotal"), values.get("MemAvailable"), memory_limit(system)
    if total is None or available is None:
        return None
    return HostMemory(total, available, limit if limit is not None and limit < total else None)


def memory_checks(system: System) -> Iterator[Check]:
    """Memory of the host, the limit of the control groups, and what is left."""
    found = host_memory(system)
    if found is None:
        yield Check("host", "memory", "unknown: /proc/meminfo cannot be read", "warning", "mount /proc")
        return
    if found.limit is not None:
        text = f"{gib(found.limit)} (limit of the control group; the machine has {gib(found.total)})"
    else:
        text = f"{gib(found.total)}, {gib(found.available)} available"
    key = f"{round((found.limit or found.total) / GIB)} GiB"
    if found.usable < _MEMORY_LOW:
        cure = "end what uses it, or ask for more (srun --mem, docker --memory)"
        yield Check("host", "memory", text, "warning", cure, alike="warning", key=key)
    else:
        yield Check("host", "memory", text, alike="warning", key=key)


def shm_check(system: System, *, gpus: int) -> Check:
    """/dev/shm, through which the ranks of a machine exchange data."""
    try:
        found = os.statvfs(system.path("dev/shm"))
    except OSError as error:
        cure = "mount it: mount -t tmpfs -o size=8g tmpfs /dev/shm"
        return Check("host", "/dev/shm", f"cannot be used: {error.strerror}", "problem", cure, alike="warning")
    size, free = found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail
    text, key = f"{gib(size)}, {gib(free)} free", gib(size)
    cure = "NCCL keeps its buffers there: docker --shm-size=8g, or mount -o remount,size=8g /dev/shm"
    if size < _SHM_TINY or (size and free < size / 100):
        cure = cure if size < _SHM_TINY else "it is full, perhaps of files that killed runs left: look for them with ls -l /dev/shm"
        return Check("host", "/dev/shm", text, "problem" if gpus > 1 else "warning", cure, alike="warning", key=key)
    if size < _SHM_SMALL and gpus > 1:
        return Check("host", "/dev/shm", text, "warning", cure, alike="warning", key=key)
    return Check("host", "/dev/shm", text, alike="warning", key=key)


def core_checks(system: System, *, cores: int, gpus: int) -> Iterator[Check]:
    """The cores this process may run on (`cores`), the time it gets on them, and the threads it will start."""
    online = os.cpu_count() or cores
    text = f"{cores} of {online}" if cores != online else str(cores)
    if cores == 1 and online > 1:
        cure = "everything runs on one core: srun --cpus-per-task=N (or --cpu-bind=none), taskset"
        yield Check("host", "cores", text, "warning", cure, alike="warning")
    elif 0 < cores < gpus:
        yield Check(
            "host", "cores", text, "warning", f"{gpus} GPUs need a core each and more: srun --cpus-per-task, docker --cpus", alike="warning"
        )
    else:
        yield Check("host", "cores", text, alike="warning")
    quota = cpu_quota(system)
    if quota is not None and quota < cores:
        cure = (
            f"threads beyond it are stopped in turn: OMP_NUM_THREADS={max(1, int(quota))} for one rank, or a larger limit (docker --cpus)"
        )
        yield Check("host", "time on them", f"that of {quota:g} (limit of the control group)", "warning", cure, alike="warning")
    threads = system.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if threads:
        name = "OMP_NUM_THREADS"
        if not threads.isdigit() or int(threads) == 0:
            yield Check("host", name, threads, "warning", "set a whole number of threads, or unset it", alike="warning")
        elif int(threads) <= cores:
            yield Check("host", name, threads, alike="warning")
        else:
            yield Check(
                "host", name, threads, "warning", f"there are {cores} cores: set at most that many for all ranks together", alike="warning"
            )


def limit_checks(files: int, locked: int, *, infiniband: bool) -> Iterator[Check]:
    """Open files and locked memory of a process (soft limits; resource.RLIM_INFINITY for none)."""
    text = _limit(files, str(files))
    if files != resource.RLIM_INFINITY and files < _FILES_ENOUGH:
        status = "problem" if files < _FILES_FEW else "warning"
        cure = "a rank holds a connection to every other: ulimit -n 65536 (LimitNOFILE of the service that starts the job)"
        yield Check("host", "open files", text, status, cure, alike="warning")
    else:
        yield Check("host", "open files", text, alike="warning")
    text = _limit(locked, gib(locked))
    if infiniband and locked != resource.RLIM_INFINITY:
        cure = "RDMA locks its buffers in memory: ulimit -l unlimited (docker --ulimit memlock=-1, LimitMEMLOCK of slurmd)"
        yield Check("host", "locked memory", text, "problem" if locked < _LOCKED_TINY else "warning", cure, alike="problem")
    else:
        yield Check("host", "locked memory", text, alike="warning")


def _limit(value: int, text: str) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else text


@dataclass(frozen=True)
class Clock:
    """The kernel's clock: whether something keeps it in time (NTP, PTP), and the most it may be wrong by, in seconds."""

    synchronised: bool
    error: float


class _Timex(ctypes.Structure):
    """`struct timex` of Linux on 64 bits; only the fields up to `status` are read, the rest makes up its size."""

    _fields_ = (
        ("modes", ctypes.c_uint), ("offset", ctypes.c_long), ("frequency", ctypes.c_long), ("maximum_error", ctypes.c_long),
        ("estimated_error", ctypes.c_long), ("status", ctypes.c_int), ("rest", ctypes.c_long * 32),
    )  # fmt: skip


_UNSYNCHRONISED, _TIME_ERROR = 0x40, 5


def kernel_clock() -> Clock | None:
    """What adjtimex(2) says, without changing anything; None where the kernel does not answer."""
    adjtimex = getattr(ctypes.CDLL(None, use_errno=True), "adjtimex", None)
    state = _Timex()
    answer = adjtimex(ctypes.byref(state)) if adjtimex is not None else -1
    if answer < 0:
        return None
    return Clock(answer != _TIME_ERROR and not state.status & _UNSYNCHRONISED, state.maximum_error / 1e6)


def clock_check(clock: Clock | None) -> Check:
    """Whether the clock is kept in time. Nodes whose clocks differ write logs that cannot be put in order."""
    if clock is None:
        return Check("host", "clock", "unknown: the kernel does not say")
    if not clock.synchronised:
        return Check(
            "host", "clock", "not synchronised", "warning", "start a time service: systemctl enable --now chronyd (or systemd-timesyncd)"
        )
    return Check("host", "clock", f"synchronised, within {1e3 * clock.error:.0f} ms")
