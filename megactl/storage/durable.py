"""Writing so that a crash or a full disk cannot leave half of something: the few operating-system steps a save is made of.

Each step goes through `os` by its module attribute, so that a test can stop the process, or fail the disk, after any one of them.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from megactl.errors import CheckpointError

# Linux transfers at most 0x7ffff000 bytes a call; smaller parts also let other threads in between.
_TRANSFER = 64 * 1024 * 1024


def create(path: Path) -> int:
    """A new file open for writing; one that exists already, or a link, is an error (FileExistsError)."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte of `data` at the descriptor's position; the system may take fewer than it is given."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view[:_TRANSFER]) :]


def write_file(path: Path, data: bytes) -> None:
    """A new file with `data`, on disk when this returns (its name is not, until `sync_folder`)."""
    descriptor = create(path)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable: creation and renaming are on disk only after this."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(path: Path) -> None:
    """Create a folder and those above it, their names on disk when this returns; existing ones are fine. Raises OSError."""
    if path.is_dir():
        return
    make_folders(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def replace_file(path: Path, data: bytes, unique: str, *, mode: int | None = None) -> None:
    """Give `path` the content `data` at one moment: readers see the old bytes or the new ones, also after a power cut.

    `mode`: the permissions of the new file (default: those of any new file).
    """
    beside = path.with_name(f".{path.name}-{unique}")
    try:
        write_file(beside, data)
        if mode is not None:
            os.chmod(beside, mode)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_output(path: Path, data: bytes) -> None:
    """Write what a user asked for to where they asked: a file at one moment, with the permissions it has; through a link, its target.

    What is no file (`/dev/stdout`, a pipe) is written to and never replaced. Raises OSError.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        with path.open("wb") as stream:
            stream.write(data)
        return
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    replace_file(target, data, f"megactl-{os.getpid()}", mode=mode)


def remove_tree(path: Path) -> None:
    """Delete a folder; one that is gone already is fine, anything else that fails raises OSError."""
    if path.exists():
        shutil.rmtree(path)


def open_regular(path: Path) -> int:
    """A descriptor for reading a plain file. Links and devices are refused: a name in a manifest must mean the file in that folder."""
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror})", "restore the file, or use another checkpoint") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: must be a plain file", "copy the checkpoint with its files, not links to them")
    return descriptor


def read_exactly(descriptor: int, view: memoryview, offset: int, source: Path) -> None:
    """Fill `view` with the bytes at `offset`. Reads, not a memory map: a bad sector is then an OSError and not a SIGBUS."""
    while view:
        taken = os.preadv(descriptor, [view[:_TRANSFER]], offset)
        if taken == 0:
            raise CheckpointError(f"{source}: ends at byte {offset}, before its last tensor", "use another checkpoint")
        view, offset = view[taken:], offset + taken
