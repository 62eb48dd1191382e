"""A file that someone else wrote, open for reading in positions: a plain file, every read bounded by its size."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from megactl.errors import CheckpointError


class OpenFile:
    """An open plain file (links are followed: Hugging Face's cache is made of them). `size` in bytes is that at opening."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError where it cannot be opened or is a folder, a pipe or a device."""
        self.path = path
        try:
            # Without O_NONBLOCK, opening a named pipe would wait for ever.
            self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(path, error) from error
        found = os.fstat(self.descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(self.descriptor)
            raise CheckpointError(f"{path}: must be a plain file", "leave it out")
        self.size = found.st_size

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from byte `start`. Raises CheckpointError where the file ends before."""
        if start < 0 or length < 0 or start + length > self.size:
            raise CheckpointError(f"{self.path}: {self.size} bytes, {start + length} are needed: the file was cut short", _AGAIN)
        pieces, at = [], start
        try:
            while at < start + length:
                piece = os.pread(self.descriptor, start + length - at, at)
                if not piece:
                    raise CheckpointError(f"{self.path}: ends at byte {at} while it is read", _AGAIN)
                pieces.append(piece)
                at += len(piece)
        except OSError as error:
            raise unreadable(self.path, error) from error
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


_AGAIN = "save or copy it again, or use another checkpoint"


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for what the system refuses to read."""
    return CheckpointError(f"{path}: cannot be read ({error.strerror})", "check the path and its permissions")
