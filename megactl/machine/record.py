"""What a run records of the machine: the package's own state, the driver, the processor, the variables that matter."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import megactl
from megactl import _build
from megactl.machine.system import System

_SOURCE_SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h", ".hpp")
_RECORDED = re.compile(
    r"^(NCCL|CUDA|OMP|MKL|OPENBLAS|TORCH|PYTORCH|TORCHELASTIC|GLOO|UCX|FI|MEGACTL|SLURM)_|"
    r"^(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT)$"
)
_SECRET = re.compile(r"KEY|TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIAL", re.IGNORECASE)
# A proxy or store address may carry `user:password@`.
_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")


def redacted_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables worth recording. A value whose name looks like a secret, and `user:password@` in any value, become '<redacted>'."""
    recorded = {}
    for name in sorted(environment):
        if _RECORDED.search(name):
            recorded[name] = "<redacted>" if _SECRET.search(name) else _USERINFO.sub("<redacted>@", environment[name])
    return recorded


def package_root() -> Path:
    """The folder of the `megactl` package."""
    return Path(megactl.__file__).resolve().parent


def git_commit(system: System) -> dict[str, Any] | None:
    """`{"hash", "dirty"}` of the checkout the package lies in, None if it is not in one."""
    root = package_root().parent
    # Only the package's own repository: an installed copy may lie below somebody else's.
    if not (root / ".git").exists():
        return None
    commit = system.output("git", "-C", str(root), "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"hash": commit, "dirty": bool(system.output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"))}


@cache
def source_hash() -> str:
    """SHA-256 (16 hex digits) over the package's source files and their relative paths: the same code on every node, or not."""
    root, digest = package_root(), hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in _SOURCE_SUFFIXES):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def compiled_modules() -> dict[str, Any]:
    """For each compiled module what it records about its build; None where it is not installed."""
    infos = {module: _build.built(module) for module in _build.SOURCES}
    return {f"megactl.{module}": asdict(info) if info is not None else None for module, info in infos.items()}


def driver_version(system: System) -> str | None:
    """NVIDIA's driver version, None without one."""
    text = system.read("proc/driver/nvidia/version")
    if text is None:
        answer = system.output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return answer.splitlines()[0] if answer else None
    match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return match[1] if match else None


def cpu_name(system: System) -> str | None:
    """The processor's model name, None where the kernel does not say."""
    lines = (system.read("proc/cpuinfo") or "").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
