"""What a run ran on: environment.json for the reader of a result, and a fingerprint by which ranks find the odd node out at start."""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import megactl
from megactl.machine.agreement import disagreement
from megactl.machine.record import compiled_modules, cpu_name, driver_version, git_commit, redacted_variables, source_hash
from megactl.machine.system import System

if TYPE_CHECKING:
    from megactl.config.schema import Run


def write_environment(run_dir: Path, *, hosts: Sequence[str] = (), extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write `run_dir`/environment.json (atomically) and return it. `hosts`: every rank's host, where known; `extra`: further entries.

    Call it on rank 0, after the fork: it may initialise CUDA. Raises OSError if the file cannot be written.
    """
    content = collect_environment() | {"hosts": sorted(set(hosts) or {socket.gethostname()})} | dict(extra or {})
    path = run_dir / "environment.json"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")
    os.replace(temporary, path)
    return content


def collect_environment() -> dict[str, Any]:
    """Versions, commit or source hash, devices, driver and the variables that change how a run behaves, secrets redacted."""
    import torch

    cuda, system = torch.cuda.is_available(), System()
    return {
        "megactl": getattr(megactl, "__version__", None),
        "commit": git_commit(system),
        "source_hash": source_hash(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "driver": driver_version(system),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "cpu": cpu_name(system),
        "cores": len(os.sched_getaffinity(0)),
        "compiled": compiled_modules(),
        "variables": redacted_variables(os.environ),
    }


def fingerprint(run: Run) -> dict[str, str]:
    """What must be equal on every rank, with the host it was taken on: source, configuration, Python, torch."""
    import torch

    from megactl.config.store import config_hash

    return {
        "host": socket.gethostname(),
        "source hash": source_hash(),
        "configuration hash": config_hash(run),
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }


def compare_fingerprints(fingerprints: Sequence[Mapping[str, str]]) -> str | None:
    """A sentence naming the ranks and hosts that differ from the majority, in rank order; None if all agree."""
    complaints = []
    for key in fingerprints[0] if fingerprints else ():
        if key == "host":
            continue
        values = [entry.get(key, "missing") for entry in fingerprints]
        found = disagreement(values)
        if found is not None:
            odd = [f"rank {rank} on {fingerprints[rank].get('host', '?')} has {values[rank]}" for rank in found.odd]
            shown = ", ".join(odd[:8]) + (f" and {len(odd) - 8} more ranks" if len(odd) > 8 else "")
            complaints.append(f"{key} differs between ranks: {shown}; {found.count} of {len(values)} ranks have {found.common}")
    return "; ".join(complaints) or None
