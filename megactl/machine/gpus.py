"""NVIDIA's GPUs and driver as nvidia-smi and the kernel tell them, and whether torch can use them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from megactl.machine.check import Check
from megactl.machine.record import driver_version
from megactl.machine.system import System
from megactl.machine.torch_facts import TorchFacts

_GROUP = "GPUs"
_FIELDS = "index,name,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
# What a GPU uses by itself, the driver's and a display's share, stays below.
_BUSY_MIB = 2048


@dataclass(frozen=True)
class Gpu:
    """One GPU; memory in MiB, `uncorrected` memory errors since the driver was loaded (None: not counted)."""

    index: int
    name: str
    memory: int
    used: int
    uncorrected: int | None


@dataclass(frozen=True)
class Gpus:
    """`driver` and the newest CUDA it supports (None: unknown), its GPUs, and what nvidia-smi complained about."""

    driver: str | None = None
    cuda: str | None = None
    devices: tuple[Gpu, ...] = ()
    error: str | None = None


def find_gpus(system: System) -> Gpus:
    """The GPUs of this machine, or those that a container or a batch system shows of them."""
    driver = driver_version(system)
    answer = system.run("nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits")
    if answer.code is None:
        # No nvidia-smi, as in many containers: the driver lists its GPUs itself.
        return Gpus(driver, None, tuple(_from_proc(system)), None if "is not on the PATH" in answer.err else answer.err)
    if answer.code != 0:
        text = (answer.out + answer.err).strip()
        return Gpus(driver, error=text.splitlines()[0] if text else f"nvidia-smi ended with exit code {answer.code}")
    header = re.search(r"CUDA (?:\w+ )?Version\s*:\s*(\d+\.\d+)", system.output("nvidia-smi") or "")
    devices = tuple(gpu for line in answer.out.splitlines() if (gpu := _gpu(line)) is not None)
    return Gpus(driver, header[1] if header else None, devices)


def _gpu(line: str) -> Gpu | None:
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != 5 or not parts[0].isdigit():
        return None
    memory, used, errors = (int(part) if part.isdigit() else None for part in parts[2:])
    return Gpu(int(parts[0]), parts[1], memory or 0, used or 0, errors)


def _from_proc(system: System) -> Iterator[Gpu]:
    for index, name in enumerate(system.names("proc/driver/nvidia/gpus")):
        text = system.read(f"proc/driver/nvidia/gpus/{name}/information") or ""
        model = re.search(r"^Model:\s*(.+)$", text, re.MULTILINE)
        yield Gpu(index, model[1].strip() if model else "unknown", 0, 0, None)


def gpu_checks(gpus: Gpus, torch: TorchFacts, visible: str | None) -> Iterator[Check]:
    """GPUs, driver, and torch on them. `visible` is CUDA_VISIBLE_DEVICES (None: not set)."""
    yield _driver(gpus)
    yield _devices(gpus)
    yield from _busy(gpus)
    if visible is not None:
        yield _visible(visible, len(gpus.devices))
    if torch.works and (gpus.devices or torch.facts["available"]):
        yield _seen(gpus, torch, visible)
        yield from _architectures(torch)


def _driver(gpus: Gpus) -> Check:
    if gpus.error is not None:
        return Check(_GROUP, "driver", gpus.error, "problem", _driver_cure(gpus.error), alike="warning")
    if gpus.driver is None:
        return Check(_GROUP, "driver", "none", alike="warning")
    return Check(_GROUP, "driver", gpus.driver + (f" (CUDA {gpus.cuda})" if gpus.cuda else ""), alike="warning")


def _driver_cure(error: str) -> str:
    if "mismatch" in error:
        return "the driver was updated while it was loaded: reboot, or reload the kernel modules nvidia_uvm and nvidia"
    if "No devices" in error:
        return "ask for GPUs (srun --gpus-per-node, docker --gpus all, apptainer --nv), or look at dmesg for a GPU that fell off the bus"
    return "load the driver (modprobe nvidia), and give a container its GPUs (docker --gpus all, apptainer --nv); dmesg says more"


def _devices(gpus: Gpus) -> Check:
    models = Counter(gpu.name for gpu in gpus.devices)
    memory = {gpu.memory for gpu in gpus.devices if gpu.memory}
    text = ", ".join(f"{number} x {name}" for name, number in models.items()) or "none"
    if len(models) > 1:
        cure = "the slowest sets the pace and the smallest the memory: choose alike ones with CUDA_VISIBLE_DEVICES"
        return Check(_GROUP, "devices", text, "warning", cure, alike="warning")
    return Check(_GROUP, "devices", text + (f", {min(memory) / 1024:.0f} GiB each" if memory else ""), alike="warning", key=text)


def _busy(gpus: Gpus) -> Iterator[Check]:
    busy = [gpu for gpu in gpus.devices if gpu.used > _BUSY_MIB]
    if busy:
        text = ", ".join(f"GPU {gpu.index}: {gpu.used / 1024:.1f} GiB in use" for gpu in busy)
        yield Check(_GROUP, "memory in use", text, "warning", "another process has it: nvidia-smi shows which")
    broken = [gpu for gpu in gpus.devices if gpu.uncorrected]
    if broken:
        text = ", ".join(f"GPU {gpu.index}: {gpu.uncorrected}" for gpu in broken)
        cure = "a run on it may die or learn nonsense: reset the GPU (nvidia-smi -r) or take the node out of service"
        yield Check(_GROUP, "uncorrected memory errors", text, "warning", cure)


def _visible(text: str, number: int) -> Check:
    name, words = "CUDA_VISIBLE_DEVICES", [word.strip() for word in text.split(",")]
    if not text.strip() or words[0] == "-1":
        status = ("warning", f"unset {name} to use the {number} GPUs of this machine") if number else ("ok", None)
        return Check(_GROUP, name, "empty: hides every GPU", *status)
    # CUDA stops reading at the first name it does not know, in silence.
    wrong = [word for word in words if word.isdigit() and int(word) >= number]
    if wrong and number:
        cure = f"use 0 to {number - 1}: CUDA leaves out the first wrong one and all that follow"
        return Check(_GROUP, name, f"{text}: there is no GPU {wrong[0]}", "problem", cure)
    return Check(_GROUP, name, text)


def _seen(gpus: Gpus, torch: TorchFacts, visible: str | None) -> Check:
    """Whether torch uses what is there."""
    facts, name = torch.facts, "torch sees"
    number = len(facts["devices"])
    hidden = visible is not None and (not visible.strip() or visible.strip().startswith("-1"))
    if facts["available"]:
        if number < len(gpus.devices) and visible is None:
            return Check(_GROUP, name, f"{number} of {len(gpus.devices)} GPUs", "warning", "nvidia-smi and dmesg say what ails the others")
        return Check(_GROUP, name, f"{number} GPUs", alike="problem")
    if hidden:
        return Check(_GROUP, name, "no GPU, as CUDA_VISIBLE_DEVICES asks")
    if not facts["cuda"]:
        value, cure = (
            f"no GPU: torch {facts['torch']} is a CPU build",
            f"install a torch for CUDA{_upto(gpus)}: https://pytorch.org/get-started",
        )
        return Check(_GROUP, name, value, "problem", cure, alike="problem")
    driver = facts["driver_cuda"] or gpus.cuda
    if driver is not None and _major(facts["cuda"]) > _major(driver):
        value = f"no GPU: it was built for CUDA {facts['cuda']}, driver {gpus.driver} supports CUDA {driver}"
        cure = f"update the driver, or install a torch for CUDA {_major(driver)}"
        return Check(_GROUP, name, value, "problem", cure, alike="problem")
    return Check(_GROUP, name, f"no GPU: {facts['error']}", "problem", "look at nvidia-smi and dmesg, or reboot", alike="problem")


def _upto(gpus: Gpus) -> str:
    return f" {gpus.cuda} or older" if gpus.cuda else ""


def _major(version: str) -> int:
    return int(version.split(".")[0])


def _architectures(torch: TorchFacts) -> Iterator[Check]:
    """GPUs for which this torch carries no code."""
    archs = torch.facts["archs"]
    if not archs:
        return
    lacking = {
        f"{device['name']} (sm_{device['capability'][0]}{device['capability'][1]})"
        for device in torch.facts["devices"]
        if not any(_runs(arch, *device["capability"]) for arch in archs)
    }
    if lacking:
        cure = f"install a torch that is built for it; this one has {', '.join(archs)}"
        yield Check(_GROUP, "architecture", f"no code for {', '.join(sorted(lacking))}", "problem", cure)


def _runs(arch: str, major: int, minor: int) -> bool:
    """Machine code (sm_) runs on its own major version from its minor on; PTX (compute_) on everything newer; an `a` on its own alone."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
    if match is None:
        return False
    has = (int(match[2]), int(match[3]))
    if match[4] == "a":
        return has == (major, minor)
    return has <= (major, minor) if match[1] == "compute" else has[0] == major and has[1] <= minor
