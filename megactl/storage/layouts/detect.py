"""From what a user types to a checkpoint: a file, a checkpoint's folder, or the folder above it with a pointer to the newest one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from megactl.errors import CheckpointError
from megactl.storage import manifest
from megactl.storage.foreign import Limits
from megactl.storage.foreign.opened import unreadable
from megactl.storage.layouts.base import Layout
from megactl.storage.layouts.deepspeed import DeepSpeed, Universal
from megactl.storage.layouts.distributed import Distributed
from megactl.storage.layouts.folder import Folder
from megactl.storage.layouts.huggingface import HuggingFace
from megactl.storage.layouts.inventory import NOTE, PROBLEM, Finding, Inventory
from megactl.storage.layouts.megatron import MegatronLegacy
from megactl.storage.layouts.own import Own
from megactl.storage.layouts.plain import PlainFolder, inspect_file
from megactl.storage.layouts.proportions import judge

MEGATRON_POINTER = "latest_checkpointed_iteration.txt"
POINTERS = (MEGATRON_POINTER, "latest", "latest_universal")
_CHECKPOINT = re.compile(r"(iter_(\d+)|release|global_step(\d+)(?:_universal)?|checkpoint-(\d+)|step-(\d{8,18}))", re.ASCII)
_POINTER_LIMIT = 4096


def layouts() -> tuple[Layout, ...]:
    """The layouts that are known, the most particular first: a folder belongs to the first that matches."""
    return (Own(), Distributed(), MegatronLegacy(), Universal(), DeepSpeed(), HuggingFace(), PlainFolder())


@dataclass
class _Choice:
    """The folder to inspect, and what finding it brought up."""

    path: Path
    findings: list[Finding] = field(default_factory=list)


def inspect(path: Path, limits: Limits | None = None) -> Inventory:
    """What the checkpoint at `path` holds. Damage inside becomes findings; what cannot be a checkpoint raises CheckpointError."""
    limits = Limits() if limits is None else limits
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: does not exist", "give a checkpoint's folder, the folder above it, or a file")
        if not path.is_dir():
            return judge(inspect_file(path, limits))
        choice = _choose(path)
    except OSError as error:
        raise unreadable(path, error) from error
    folder = Folder(choice.path, limits)
    layout = next((layout for layout in layouts() if layout.matches(folder)), None)
    if layout is None:
        known = "megactl, Megatron-LM, PyTorch distributed, DeepSpeed and Hugging Face checkpoints, .pt and .safetensors files"
        raise CheckpointError(f"{choice.path}: holds no checkpoint of a known kind", f"known are {known}")
    inventory = layout.inspect(folder)
    inventory.findings[:0] = choice.findings
    return judge(inventory)


def _choose(path: Path) -> _Choice:
    """Follow the pointer of a folder that holds checkpoints; a folder that is one stays."""
    if (path / "checkpoints").is_dir() and not _is_checkpoint(path):
        path = path / "checkpoints"
    found = _numbered(path)
    pointer = next((name for name in POINTERS if (path / name).is_file()), None)
    if _is_checkpoint(path) or (pointer is None and not found):
        return _Choice(path)
    choice = _Choice(found[-1] if found else path)
    if pointer is not None:
        _follow(choice, path, pointer)
    if len(found) > 1:
        others = [other.name for other in found if other != choice.path]
        choice.findings.append(Finding(NOTE, "", f"{choice.path.name} of {len(found)} checkpoints; others: {', '.join(others[-5:])}"))
    return choice


def _follow(choice: _Choice, path: Path, pointer: str) -> None:
    try:
        with (path / pointer).open("rb") as file:
            text = file.read(_POINTER_LIMIT).decode("utf-8", "replace").strip()
    except OSError as error:
        choice.findings.append(Finding(PROBLEM, pointer, f"cannot be read ({error.strerror})"))
        return
    name = f"iter_{int(text):07d}" if pointer == MEGATRON_POINTER and re.fullmatch(r"\d{1,12}", text, re.ASCII) else text
    if not re.fullmatch(r"[\w.-]{1,200}", name, re.ASCII) or name in (".", "..") or not (path / name).is_dir():
        rest = f"; {choice.path.name} is shown" if choice.path != path else ""
        choice.findings.append(Finding(PROBLEM, pointer, f"points to {name[:80]!r}, which is not there{rest}"))
        return
    newest = choice.path
    choice.path = path / name
    if newest != path and newest.name != name:
        rule = f"points to {name}, {newest.name} is newer: its save was cut short, or is still going on"
        choice.findings.append(Finding(NOTE, pointer, rule))


def _numbered(path: Path) -> list[Path]:
    """Folders under `path` whose names are those of checkpoints, oldest first; `release` counts as the oldest."""
    found = []
    for child in path.iterdir():
        match = _CHECKPOINT.fullmatch(child.name)
        if match and child.is_dir():
            found.append((max((int(number) for number in match.groups()[1:] if number), default=-1), child.name, child))
    return [child for *_, child in sorted(found)]


def _is_checkpoint(path: Path) -> bool:
    """Whether the folder itself holds a checkpoint's files, so that a pointer in it is not for us (Hugging Face with DeepSpeed)."""
    names = {child.name for child in path.iterdir()}
    if manifest.FILE_NAME in names or ".metadata" in names or "trainer_state.json" in names or "config.json" in names:
        return True
    return any(name.startswith("mp_rank_") or name.endswith(("_states.pt", ".distcp", ".safetensors")) for name in names)
