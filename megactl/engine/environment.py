"""What a run ran on: environment.json for the reader of a result, and a fingerprint by which ranks find the odd node out at start."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import socket
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import megactl
from megactl import _build

if TYPE_CHECKING:
    from megactl.config.schema import Run

_SOURCE_SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h", ".hpp")
_RECORDED = re.compile(
    r"^(NCCL|CUDA|OMP|MKL|OPENBLAS|TORCH|PYTORCH|TORCHELASTIC|GLOO|UCX|FI|MEGACTL|SLURM)_|"
    r"^(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT)$"
)
_SECRET = re.compile(r"KEY|TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIAL", re.IGNORECASE)
# A proxy or store address may carry `user:password@`.
_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")
_COMMAND_SECONDS = 10


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

    cuda = torch.cuda.is_available()
    return {
        "megactl": getattr(megactl, "__version__", None),
        "commit": git_commit(),
        "source_hash": source_hash(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "driver": driver_version(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "compiled": compiled_modules(),
        "variables": redacted_variables(os.environ),
    }


def redacted_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables worth recording. A value whose name looks like a secret, and `user:password@` in any value, become '<redacted>'."""
    recorded = {}
    for name in sorted(environment):
        if _RECORDED.search(name):
            recorded[name] = "<redacted>" if _SECRET.search(name) else _USERINFO.sub("<redacted>@", environment[name])
    return recorded


def git_commit() -> dict[str, Any] | None:
    """`{"hash", "dirty"}` of the checkout the package lies in, None if it is not in one."""
    root = _package_root().parent
    # Only the package's own repository: an installed copy may lie below somebody else's.
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"hash": commit, "dirty": bool(_output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"))}


@cache
def source_hash() -> str:
    """SHA-256 (16 hex digits) over the package's source files and their relative paths: the same code on every node, or not."""
    root, digest = _package_root(), hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in _SOURCE_SUFFIXES):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def compiled_modules() -> dict[str, Any]:
    """For each compiled module what it records about its build; None where it is not installed."""
    infos = {module: _build.built(module) for module in _build.SOURCES}
    return {f"megactl.{module}": asdict(info) if info is not None else None for module, info in infos.items()}


def driver_version() -> str | None:
    """NVIDIA's driver version, None without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", first_line=True)
    match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return match[1] if match else None


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
        # With a tie the value of the lowest rank counts as the common one (Counter keeps the order of first sight).
        common, count = Counter(values).most_common(1)[0]
        odd = [f"rank {rank} on {fingerprints[rank].get('host', '?')} has {value}" for rank, value in enumerate(values) if value != common]
        if odd:
            shown = ", ".join(odd[:8]) + (f" and {len(odd) - 8} more ranks" if len(odd) > 8 else "")
            complaints.append(f"{key} differs between ranks: {shown}; {count} of {len(values)} ranks have {common}")
    return "; ".join(complaints) or None


def _package_root() -> Path:
    return Path(megactl.__file__).resolve().parent


def _output(*command: str, first_line: bool = False) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    text = done.stdout.strip()
    return text.splitlines()[0] if first_line and text else text


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
