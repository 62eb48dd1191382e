"""The run directory: whether a run can write there, and how much."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megactl.machine.check import Check
from megactl.machine.host import GIB, gib

_GROUP = "run directory"
# A first write shows what free space does not: a quota, a file system that is read-only or full of inodes.
_PROBE_BYTES = 2**20
_FULL, _LOW = GIB, 20 * GIB


def folder_checks(folder: Path, *, named: bool) -> Iterator[Check]:
    """Whether `folder` (`named`: by --run-dir; otherwise the current one) or the one it would be made in can be written, and has room."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        yield Check(_GROUP, "folder", f"{existing} is a file", "problem", "choose another --run-dir")
        return
    reason = _write(existing)
    if reason is not None:
        cure = "choose a --run-dir that you may write to and that has room"
        yield Check(_GROUP, "folder", f"{existing}: {reason}", "problem" if named else "warning", cure)
    else:
        yield Check(_GROUP, "folder", str(folder.absolute()) + ("" if existing == folder.absolute() else " (to be made)"))
    yield _space(existing, named)


def _write(folder: Path) -> str | None:
    """Why nothing can be written to `folder`; None where it can."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".megactl-doctor-") as file:
            file.write(b"\0" * _PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return None


def _space(folder: Path, named: bool) -> Check:
    found = os.statvfs(folder)
    free, total = found.f_frsize * found.f_bavail, found.f_frsize * found.f_blocks
    text = f"{gib(free)} of {gib(total)} free"
    cure = "free some, or choose another --run-dir: a checkpoint has up to 18 bytes a parameter"
    if found.f_files and not found.f_favail:
        return Check(_GROUP, "room", f"{text}, but no inode", "problem", "delete small files: the file system can name no more")
    if free < _FULL:
        return Check(_GROUP, "room", text, "problem" if named else "warning", cure)
    return Check(_GROUP, "room", text, "warning", cure) if free < _LOW else Check(_GROUP, "room", text)
