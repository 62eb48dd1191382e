"""How many GPUs a process started here would see, without importing torch and without touching the driver from this process."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

_SECONDS = 20.0


def count_gpus(environ: Mapping[str, str]) -> int:
    """GPUs that CUDA would show a child of this process: CUDA_VISIBLE_DEVICES applied to what the machine has."""
    listed = visible_list(environ.get("CUDA_VISIBLE_DEVICES"))
    if listed == 0:
        return 0
    present = _present()
    return present if listed is None else min(listed, present)


def visible_list(text: str | None) -> int | None:
    """Entries that CUDA reads from CUDA_VISIBLE_DEVICES: None where it is not set; the list ends at the first invalid entry, as in CUDA."""
    if text is None:
        return None
    count = 0
    for entry in text.split(","):
        if not re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", entry.strip()):
            break
        count += 1
    return count


def _present() -> int:
    """GPUs of this machine. nvidia-smi is asked first: in a container /proc may list GPUs that the container cannot use."""
    tool = shutil.which("nvidia-smi")
    if tool:
        try:
            answer = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired):
            answer = None
        if answer is not None and answer.returncode == 0:
            return sum(line.startswith("GPU ") for line in answer.stdout.splitlines())
    nodes = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()]
    folder = Path("/proc/driver/nvidia/gpus")
    listed = len(list(folder.iterdir())) if folder.is_dir() else 0
    return min(len(nodes), listed) if listed else len(nodes)


def cpu_only_torch() -> str | None:
    """The version of an installed torch whose name says that it is a CPU build ("2.13.0+cpu"), else None. Reads metadata only."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("torch")
    except PackageNotFoundError:
        return None
    return found if found.endswith("+cpu") else None
