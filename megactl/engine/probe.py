"""What torch says of this machine, as one line of JSON on stdout. `megactl doctor` runs it as a process of its own, since importing torch
takes seconds, and on a broken driver it may hang or die."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch

from megactl import _build


def probe() -> dict[str, Any]:
    """Versions of torch and what it carries, the GPUs it can really use, and whether the compiled modules load in it."""
    available = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "available": available,
        "error": None if available else _cuda_error(),
        "driver_cuda": _driver_cuda(),
        "devices": [_device(index) for index in range(torch.cuda.device_count())] if available else [],
        "archs": torch.cuda.get_arch_list() if available else [],
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if available and torch.distributed.is_nccl_available() else None,
        "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
        "cudnn": _cudnn(),
        "triton": _version("triton"),
        "modules": {module: _module(module) for module in _build.SOURCES},
    }


def _cuda_error() -> str | None:
    """Why a CUDA build of torch sees no GPU, in its own words; None where it is a build for CPUs."""
    if not torch.version.cuda:
        return None
    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).splitlines()[0]
    return "no GPU is visible"


def _driver_cuda() -> str | None:
    """The newest CUDA that the driver supports, "12.4"; None without a driver."""
    number = torch._C._cuda_getDriverVersion() if torch.version.cuda and hasattr(torch._C, "_cuda_getDriverVersion") else 0
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {"name": properties.name, "capability": [properties.major, properties.minor], "memory": properties.total_memory}


def _cudnn() -> str | None:
    number = torch.backends.cudnn.version() if torch.version.cuda else None
    if number is None:
        return None
    # 8905 was 8.9.5; from version 9 on there is a digit more, 90701 being 9.7.1.
    major, rest = divmod(number, 10000) if number >= 90000 else divmod(number, 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _module(module: str) -> dict[str, Any]:
    """`reason`: why `module` does not work here, None where it does. It is loaded, so the dynamic linker has its say."""
    info = _build.built(module)
    reason = _build.missing(module)
    if reason is None:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        reason = _build.misfit(module, info, torch=torch.__version__, cuda=torch.version.cuda, gpus=gpus)
    if reason is None:
        try:
            importlib.import_module(f"megactl.{module}")
        except ImportError as error:
            reason = f"megactl.{module} does not load: {error}"
    return {"reason": reason, "record": asdict(info) if info is not None else None}


if __name__ == "__main__":
    print(json.dumps(probe()), flush=True)
