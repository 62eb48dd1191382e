"""`RUN_DIR/checkpoints`: names, what is there, which one is the newest good one, and the steps that put a new one in place.

    step-00000100/                  a complete checkpoint (manifest.json, rank-*.safetensors)
    latest                          the name of the newest one; for people and scripts, never trusted alone
    .tmp-step-00000100-<id>/        being written
    .replaced-step-00000100-<id>/   the old one while a new one of the same step takes its name
    .delete-step-00000100-<id>/     being deleted

The caller holds the run directory for itself: two trainers must not save into one folder.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megactl.errors import CheckpointError
from megactl.storage import durable
from megactl.storage.manifest import FILE_NAME, read

LATEST = "latest"
Log = Callable[[str], None]

_STEP = re.compile(r"step-([0-9]{8,18})", re.ASCII)
_HIDDEN = re.compile(r"\.(tmp|replaced|delete)-(step-([0-9]{8,18}))-[0-9a-f]{8}", re.ASCII)
_POINTER = re.compile(r"\.latest-[0-9a-f]{8}", re.ASCII)


def warn(message: str) -> None:
    """Where messages go unless the caller says otherwise: the logger megactl.checkpoint."""
    logging.getLogger("megactl.checkpoint").warning(message)


def folder_name(step: int) -> str:
    """step-00000100: sorted by name is sorted by step."""
    return f"step-{step:08d}"


def hidden_name(purpose: str, step: int, unique: str) -> str:
    """A name that no reader takes for a checkpoint. `purpose` is tmp, replaced or delete; `unique` is 8 hexadecimal digits."""
    return f".{purpose}-{folder_name(step)}-{unique}"


@dataclass(frozen=True)
class Candidate:
    """A folder that may be a checkpoint: its name says so, nothing has been read yet."""

    step: int
    path: Path


def candidates(root: Path) -> list[Candidate]:
    """Folders under `root` that may be checkpoints, newest step first. A `.replaced-` one stands in where a crash came between the two
    renames of an overwrite: it comes after the real one of its step."""
    if not root.is_dir():
        return []
    found = []
    for path in root.iterdir():
        plain, hidden = _STEP.fullmatch(path.name), _HIDDEN.fullmatch(path.name)
        if plain and path.is_dir():
            found.append((int(plain[1]), 1, path))
        elif hidden and hidden[1] == "replaced" and path.is_dir():
            found.append((int(hidden[3]), 0, path))
    return [Candidate(step, path) for step, _, path in sorted(found, reverse=True)]


def latest(root: Path) -> str | None:
    """The folder name in `latest`, or None where it is missing or is no such name."""
    try:
        name = (root / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return name if _STEP.fullmatch(name) else None


def resolve(path: Path) -> Path:
    """The checkpoint folder a user means by `path`: itself, or the newest complete one of a checkpoints folder or run directory.

    Only manifests are read here, so that looking at a checkpoint is quick; loading checks the rest. Raises CheckpointError.
    """
    if (path / FILE_NAME).is_file():
        return path
    for root in (path, path / "checkpoints"):
        for candidate in candidates(root):
            try:
                read(candidate.path)
            except CheckpointError:
                continue
            return candidate.path
    hint = "give a run directory, or a folder such as RUN_DIR/checkpoints/step-00000100"
    raise CheckpointError(f"{path}: holds no complete checkpoint", hint)


def newest_good(found: list[Candidate], pointed: str | None, log: Log, problems: Callable[[Path], list[str]]) -> Path | None:
    """The first of `found` (as `candidates` gives them) for which `problems(path)` is empty; None where there are none at all.

    Each one passed over is logged with its reason, and so is a pointer (`pointed`, from `latest`) that names another one. Raises
    CheckpointError where there are checkpoints and every one is damaged: starting afresh over them is not for this code to decide.
    """
    damage: list[str] = []
    for candidate in found:
        damage = problems(candidate.path)
        if not damage:
            name = candidate.path.name
            if pointed != name:
                log(f"using checkpoint {name}, the newest good one; '{LATEST}' names {pointed or 'none'}")
            return candidate.path
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        log(f"checkpoint {candidate.path.name} is damaged and passed over: {damage[0]}{more}")
    if found:
        hint = "restore one from a copy, or move the folder away to start from the beginning"
        raise CheckpointError(f"{found[0].path.parent}: {len(found)} checkpoints, none of them good; the last one tried: {damage[0]}", hint)
    return None


def commit(temporary: Path, step: int, unique: str) -> Path:
    """Give a complete, synced folder its final name, then point `latest` at it. Returns the final path.

    Raises OSError; what was there before is then still found by `newest_good`, under its own name or as `.replaced-`.
    """
    root = temporary.parent
    final, aside = root / folder_name(step), root / hidden_name("replaced", step, unique)
    durable.sync_folder(temporary)
    overwrite = final.exists()
    if overwrite:
        os.rename(final, aside)
        durable.sync_folder(root)
    try:
        os.rename(temporary, final)
    except OSError:
        if overwrite:
            os.rename(aside, final)
        raise
    # The new name must be on disk before anything says it is there, and before the old one may go.
    durable.sync_folder(root)
    durable.replace_file(root / LATEST, (final.name + "\n").encode(), unique)
    return final


def discard(path: Path, step: int, unique: str) -> None:
    """Delete a checkpoint. It loses its name first, so that a half deleted folder never looks like a checkpoint. Raises OSError."""
    hidden = path.with_name(hidden_name("delete", step, unique))
    os.rename(path, hidden)
    durable.remove_tree(hidden)


def retain(root: Path, step: int, keep: int, protect: Path | None, unique: str, log: Log) -> None:
    """After `step` is complete: delete what it replaced, and all but the newest `keep` (0: none is deleted).

    `protect` and checkpoints of a later step stay (the latter are an abandoned future: this run started before them). A folder that
    cannot be deleted is logged; the save has succeeded all the same.
    """
    try:
        found = candidates(root)
    except OSError as error:
        log(f"{root} could not be listed ({error.strerror}); old checkpoints stay")
        return
    old = [candidate for candidate in found if _STEP.fullmatch(candidate.path.name) and candidate.step < step]
    surplus = old[keep - 1 :] if keep > 0 else []
    replaced = [candidate for candidate in found if _HIDDEN.fullmatch(candidate.path.name) and candidate.step == step]
    for candidate in [*replaced, *surplus]:
        if protect is not None and candidate.path.resolve() == protect.resolve():
            continue
        try:
            discard(candidate.path, candidate.step, unique)
        except OSError as error:
            log(f"checkpoint {candidate.path.name} could not be deleted ({error.strerror}); delete it by hand")


def sweep(root: Path, log: Log = warn) -> None:
    """Clear up after a crash, before a run starts: unfinished and half deleted folders go, a displaced checkpoint gets its name back.

    Only names this module makes are touched. Raises CheckpointError (exit code 1) where the system refuses.
    """
    if not root.is_dir():
        return
    try:
        for path in sorted(root.iterdir()):
            match = _HIDDEN.fullmatch(path.name)
            if match and match[1] == "replaced" and not (root / match[2]).exists():
                os.rename(path, root / match[2])
                log(f"checkpoint {match[2]} has its name back: a save over it was cut short")
            elif match:
                durable.remove_tree(path)
                log(f"removed {path.name}, left over from an interrupted save")
            elif _POINTER.fullmatch(path.name):
                path.unlink()
        durable.sync_folder(root)
    except OSError as error:
        raise failed(f"{root}: leftovers of an interrupted save cannot be removed ({error.strerror})", "check permissions") from error


def failed(message: str, hint: str | None = None) -> CheckpointError:
    """A CheckpointError for work that failed (disk, permissions): exit code 1, since the input was not at fault."""
    error = CheckpointError(message, hint)
    error.exit_code = 1
    return error
