"""Everything that is looked at on one node, in the order in which it is shown."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megactl.machine.check import Check, NodeReport
from megactl.machine.folder import folder_checks
from megactl.machine.gpus import Gpus, find_gpus, gpu_checks
from megactl.machine.host import clock_check, core_checks, kernel_clock, limit_checks, memory_checks, shm_check
from megactl.machine.network import network_checks, rdma_ports, variable_checks
from megactl.machine.software import compiler_checks, module_checks, version_checks
from megactl.machine.system import System
from megactl.machine.torch_facts import TorchFacts, ask_torch


def examine(system: System, node: str, *, nodes: int = 1, run_dir: Path | None = None, seconds: float = 120.0) -> NodeReport:
    """Look at everything on this node. `nodes` of the job; `run_dir`: where the run will write; `seconds`: how long torch may take."""
    gpus, torch, ports = find_gpus(system), ask_torch(system, seconds=seconds), rdma_ports(system)
    number = len(gpus.devices)
    files, locked = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    parts: list[tuple[str, Callable[[], Iterable[Check]]]] = [
        ("versions", lambda: version_checks(system, torch, gpus)),
        ("versions", lambda: compiler_checks(system)),
        ("modules", lambda: module_checks(torch)),
        ("GPUs", lambda: _gpu_checks(gpus, torch, system)),
        ("host", lambda: memory_checks(system)),
        ("host", lambda: [shm_check(system, gpus=number)]),
        ("host", lambda: core_checks(system, cores=len(os.sched_getaffinity(0)), gpus=number)),
        ("host", lambda: limit_checks(files, locked, infiniband=bool(ports))),
        ("host", lambda: [clock_check(kernel_clock())]),
        ("run directory", lambda: folder_checks(run_dir or Path(), named=run_dir is not None)),
        ("network", lambda: network_checks(system, ports, nodes=nodes, resolve=socket.gethostbyname)),
        ("variables", lambda: variable_checks(system.environ, rdma=bool(ports), gpus=number)),
    ]
    return NodeReport(node, tuple(check for group, look in parts for check in _guarded(group, look)))


def _gpu_checks(gpus: Gpus, torch: TorchFacts, system: System) -> Iterator[Check]:
    return gpu_checks(gpus, torch, system.environ.get("CUDA_VISIBLE_DEVICES"))


def _guarded(group: str, look: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """The checks of one part. One that cannot look (odd text in /proc, say) is itself a finding, and must not hide the others."""
    try:
        yield from look()
    except (OSError, ValueError, KeyError, IndexError) as error:
        reason = f"could not be looked at: {type(error).__name__}: {error}"
        yield Check(group, "checks", reason, "warning", "this is a bug in megactl: report it with this line")
