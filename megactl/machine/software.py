"""Versions: megactl and its compiled modules, Python, torch and what it carries, compilers."""

from __future__ import annotations

import platform
import re
import shlex
import sys
from collections.abc import Iterator

from megactl import __version__, _build
from megactl.machine.check import Check
from megactl.machine.gpus import Gpus
from megactl.machine.record import git_commit, source_hash
from megactl.machine.system import System
from megactl.machine.torch_facts import PROBE, TorchFacts

_GROUP = "versions"
_OLDEST_TORCH = (2, 11)


def version_checks(system: System, torch: TorchFacts, gpus: Gpus) -> Iterator[Check]:
    """megactl, Python and torch, and what torch brings for GPUs."""
    commit = git_commit(system)
    state = f"commit {commit['hash'][:12]}{' with changes' if commit['dirty'] else ''}, " if commit else ""
    yield Check(_GROUP, "megactl", f"{__version__} ({state}source {source_hash()})", alike="problem", key=f"{__version__} {source_hash()}")
    yield Check(_GROUP, "Python", platform.python_version(), alike="problem")
    yield Check(_GROUP, "Linux", platform.release(), alike=None)
    yield _torch(torch)
    if torch.works and torch.facts["cuda"]:
        facts = torch.facts
        yield Check(_GROUP, "CUDA of torch", facts["cuda"], alike="problem")
        yield _library("NCCL", facts["nccl"], several=len(gpus.devices) > 1)
        yield Check(_GROUP, "cuDNN", facts["cudnn"] or "none", alike="warning")
        yield Check(_GROUP, "Triton", facts["triton"] or "none", alike="warning")


def _torch(torch: TorchFacts) -> Check:
    if not torch.installed:
        return Check(
            _GROUP, "torch", "not installed", "warning", 'training, generate and bench need it: pip install "megactl[train]"',
            alike="problem", key="no torch",
        )  # fmt: skip
    if torch.error is not None:
        value, cure = f"does not work: {torch.error}", f"see the whole of it: {shlex.quote(sys.executable)} -m {PROBE}"
        return Check(_GROUP, "torch", value, "problem", cure, alike="problem", key="a torch that does not work")
    version = torch.facts["torch"]
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        return Check(_GROUP, "torch", version, "problem", f"install torch {oldest} or newer", alike="problem")
    return Check(_GROUP, "torch", version, alike="problem")


def _library(name: str, version: str | None, *, several: bool) -> Check:
    if version is None and several:
        return Check(_GROUP, name, "none", "problem", f"several GPUs need it: install a torch that is built with {name}", alike="problem")
    return Check(_GROUP, name, version or "none", alike="problem")


def compiler_checks(system: System) -> Iterator[Check]:
    """What builds the compiled modules. That one is missing matters only where they are to be built, which `module_checks` says."""
    compiler = system.environ.get("CXX", "g++")
    for name, command, pattern in (("g++", compiler, r"\b(\d+\.\d+\.\d+)\b"), ("nvcc", _nvcc(system), r"release (\d+\.\d+)")):
        text = system.output(command, "--version")
        found = re.search(pattern, text) if text else None
        yield Check(_GROUP, name, found[1] if found else "none" if text is None else text.splitlines()[0], alike=None)


def _nvcc(system: System) -> str:
    home = system.environ.get("CUDA_HOME") or system.environ.get("CUDA_PATH")
    return f"{home}/bin/nvcc" if home else "nvcc"


def module_checks(torch: TorchFacts) -> Iterator[Check]:
    """Both compiled modules: built from what, for what, and why one is missing or refused."""
    yield _ops(torch)
    yield _native(torch)


def _ops(torch: TorchFacts) -> Check:
    module, build = "megactl._ops", f"run: {_build.build_command()}"
    missing = _build.missing("_ops")
    if missing is not None and torch.installed:
        return Check("modules", module, missing, "warning", f"plain torch does its work, several times slower; {build}", alike="problem")
    if missing is not None:
        return Check("modules", module, "not built; only training needs it", alike="problem")
    reason = _reason("_ops", torch)
    if reason is not None:
        return Check("modules", module, reason, "problem", f"{build} (or set MEGACTL_OPS=torch for the slower reference)", alike="problem")
    return Check("modules", module, _built("_ops"), alike="problem")


def _native(torch: TorchFacts) -> Check:
    module, cure = "megactl._native", f"Python does its work, many times slower; run: {_build.build_command()}"
    missing = _build.missing("_native")
    reason = missing or _reason("_native", torch)
    if reason is not None:
        return Check("modules", module, reason, "warning", cure, alike="warning")
    return Check("modules", module, _built("_native"), alike="warning")


def _reason(module: str, torch: TorchFacts) -> str | None:
    """Why a module that is there does not work: as torch's process found, or by its record alone where there is no such process."""
    if torch.works:
        return torch.facts["modules"][module]["reason"]
    info = _build.built(module)
    # What torch it is for cannot be compared with a torch that is not there.
    return _build.misfit(module, info, torch=(info.torch if info else None) or "", cuda=info.cuda if info else None, gpus=0)


def _built(module: str) -> str:
    info = _build.built(module)
    assert info is not None, "only a module with a record is called good"
    parts = [f"Python {info.python}", *([f"torch {info.torch}"] if info.torch else [])]
    if info.torch:
        parts.append(f"CUDA {info.cuda} for sm_{', sm_'.join(info.archs)}" if info.cuda else "CPU only")
    return f"built for {', '.join(parts)}; source {info.source_hash}"
