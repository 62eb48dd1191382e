"""The network between the ranks, and the variables that change how a run behaves."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from megactl.config.load import load
from megactl.errors import ConfigError
from megactl.machine.check import Check
from megactl.machine.record import redacted_variables
from megactl.machine.system import System

_GROUP = "network"
# Old names that torch has given up, and what it reads instead.
_RENAMED = ("NCCL_BLOCKING_WAIT", "NCCL_ASYNC_ERROR_HANDLING", "NCCL_DESYNC_DEBUG", "NCCL_ENABLE_TIMING")
# What a launcher sets, which differs between nodes or has a check of its own.
_OWN = ("SLURM_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Port:
    """A port of an RDMA card: `device`/`number`, "ACTIVE" or another state, rate and link layer as the kernel writes them."""

    name: str
    state: str
    rate: str
    layer: str


def rdma_ports(system: System) -> tuple[Port, ...]:
    """The ports of InfiniBand and RoCE cards."""
    base, found = "sys/class/infiniband", []
    for device in system.names(base):
        for number in system.names(f"{base}/{device}/ports"):
            texts = [(system.read(f"{base}/{device}/ports/{number}/{file}") or "").strip() for file in ("state", "rate", "link_layer")]
            found.append(Port(f"{device}/{number}", texts[0].rpartition(":")[2].strip(), texts[1], texts[2]))
    return tuple(found)


def network_checks(system: System, ports: tuple[Port, ...], *, nodes: int, resolve: Callable[[str], str]) -> Iterator[Check]:
    """The host's own name, RDMA cards, and the interfaces that variables name. `resolve` gives the address of a name, or OSError."""
    yield _host_name(nodes, resolve)
    yield from _rdma(ports)
    interfaces = system.names("sys/class/net")
    for name, matches in (("NCCL_SOCKET_IFNAME", _matches_nccl), ("GLOO_SOCKET_IFNAME", _matches_exactly)):
        text = system.environ.get(name)
        if text and interfaces and not matches(text, interfaces):
            yield Check(_GROUP, name, f"{text}: no such interface", "problem", f"use one of {', '.join(interfaces)}", alike="warning")
    address = system.environ.get("MASTER_ADDR")
    if address:
        yield _master(address, resolve)


def _host_name(nodes: int, resolve: Callable[[str], str]) -> Check:
    name = socket.gethostname()
    try:
        address = resolve(name)
    except OSError:
        cure = f"gloo cannot listen without it: add {name} to /etc/hosts, or set GLOO_SOCKET_IFNAME to an interface"
        return Check(_GROUP, "host name", f"{name} has no address", "problem", cure)
    if address.startswith("127.") and nodes > 1:
        cure = "gloo would tell the other nodes this address: set GLOO_SOCKET_IFNAME to an interface they reach, or mend /etc/hosts"
        return Check(_GROUP, "host name", f"{name} is {address}", "warning", cure)
    return Check(_GROUP, "host name", f"{name} ({address})")


def _rdma(ports: tuple[Port, ...]) -> Iterator[Check]:
    active = [port for port in ports if port.state == "ACTIVE"]
    rates = sorted({f"{port.rate} {port.layer}".strip() for port in active})
    text = f"{len(active)} active ports, {', '.join(rates)}" if active else "none"
    down = [port for port in ports if port.state != "ACTIVE"]
    if down and not active:
        names = ", ".join(f"{port.name} {port.state}" for port in down)
        cure = "no port is active, so NCCL uses sockets: see ibstat, the cable, and the subnet manager"
        yield Check(_GROUP, "RDMA", names, "warning", cure, alike="warning", key=text)
    else:
        inactive = f" ({len(down)} not active)" if down else ""
        yield Check(_GROUP, "RDMA", text + inactive, alike="warning")


def _matches_nccl(text: str, interfaces: list[str]) -> bool:
    """NCCL takes a comma-separated list of prefixes; `=` before it asks for whole names, `^` for all others."""
    if text.startswith("^"):
        return True
    names = text.removeprefix("=").split(",")
    return any(interface == name if text.startswith("=") else interface.startswith(name) for name in names for interface in interfaces)


def _matches_exactly(text: str, interfaces: list[str]) -> bool:
    return any(name in interfaces for name in text.split(","))


def _master(address: str, resolve: Callable[[str], str]) -> Check:
    try:
        resolve(address)
    except OSError:
        return Check(
            _GROUP,
            "MASTER_ADDR",
            f"{address} has no address",
            "problem",
            "set it to the host of rank 0, as the nodes know it",
            alike="problem",
        )
    return Check(_GROUP, "MASTER_ADDR", address, alike="problem")


def variable_checks(environ: Mapping[str, str], *, rdma: bool, gpus: int) -> Iterator[Check]:
    """Every variable that changes how a run behaves, secrets redacted, and those that cost speed or mean nothing."""
    rules = _rules(rdma, gpus)
    for name, value in redacted_variables(environ).items():
        if name.startswith(_OWN) or name == "MASTER_ADDR":
            continue
        cure = rules.get(name, {}).get(value) or rules.get(name, {}).get("*")
        status = "ok" if cure is None else "warning"
        yield Check("variables", name, value, status, cure, alike="problem" if name == "MASTER_PORT" else "warning")
    try:
        load(environ=environ)
    except ConfigError as error:
        for problem in error.problems:
            cure = problem.instead or "unset it"
            yield Check("variables", problem.where or "MEGACTL_*", problem.rule, "problem", cure, alike="problem")


def _rules(rdma: bool, gpus: int) -> dict[str, dict[str, str]]:
    """variable -> value ("*": any) -> what to do instead."""
    rules = {name: {"*": f"torch does not read it any more: set TORCH_{name}"} for name in _RENAMED}
    rules["CUDA_LAUNCH_BLOCKING"] = {"1": "unset it: every kernel is waited for, which is for debugging"}
    rules["TORCH_DISTRIBUTED_DEBUG"] = {"DETAIL": "unset it: every collective is checked by another one, which is for debugging"}
    rules["NCCL_DEBUG"] = {"TRACE": "use INFO or WARN: every call is logged"}
    if gpus > 1:
        rules["NCCL_P2P_DISABLE"] = {"1": "unset it: GPUs would talk through host memory in place of NVLink"}
        rules["NCCL_SHM_DISABLE"] = {"1": "unset it: ranks of a machine would talk through the network"}
    if rdma:
        rules["NCCL_IB_DISABLE"] = {"1": "unset it: there are RDMA ports, and NCCL would use sockets"}
    return rules
