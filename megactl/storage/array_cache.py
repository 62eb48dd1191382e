"""Arrays that are expensive to build, kept in a file and built by one process of a machine while the others wait.

The lock is the kernel's (flock): it vanishes with the process that held it, so a killed builder never blocks anyone.
No shared storage is assumed: each machine that does not see the file builds its own.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megactl.errors import DataError

FOLDER_NAME = "megactl-index-cache"
_MAGIC = b"MGCACHE1"
_PREFIX = struct.Struct("<8sII")  # magic, bytes of the JSON header, crc32 of it
_ALIGNMENT = 64
_WORDS = 1 << 17  # words of 8 bytes in a checksum block
_REPEAT_S = 30.0
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}

Arrays = dict[str, np.ndarray]


class ArrayCache:
    """A folder of built arrays. Beside the data by default; in the user's cache folder, said aloud, where that cannot be written."""

    def __init__(self, data_folder: Path, chosen: str | None, log: Callable[[str], None]) -> None:
        self._log = log
        self.folder = self._usable_folder(data_folder, chosen)

    def get(self, what: str, key: dict[str, Any], build: Callable[[], Arrays]) -> Arrays:
        """The arrays of `key`, from the file or from `build()`. `what` names them in messages."""
        text = json.dumps(key, sort_keys=True)
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.cache"
        found = self._read(path, key, what)
        if found is not None:
            return found
        with self._lock(path.with_suffix(".lock"), what):
            # Another process may have built it while this one waited.
            found = self._read(path, key, what)
            return found if found is not None else self._build(path, key, what, build)

    def _build(self, path: Path, key: dict[str, Any], what: str, build: Callable[[], Arrays]) -> Arrays:
        started = time.monotonic()
        arrays = build()
        try:
            _write(path, key, arrays)
        except OSError as error:
            raise DataError(
                f"{path}: the {what} cannot be written ({error.strerror})", "free space there, or set --data-cache to another folder"
            ) from error
        self._log(f"built the {what} in {time.monotonic() - started:.1f} s: {path}")
        found = self._read(path, key, what)
        if found is None:
            raise DataError(f"{path}: does not read back as it was written", "set --data-cache to a folder on another disk")
        return found

    def _read(self, path: Path, key: dict[str, Any], what: str) -> Arrays | None:
        try:
            return _load(path, key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._log(f"the cached {what} {path} is damaged ({error}); building it again")
            return None

    @contextmanager
    def _lock(self, path: Path, what: str) -> Iterator[None]:
        """Hold the lock of one file. Whoever waits says for whom, at once and every half minute."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._acquire(descriptor, what)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def _acquire(self, descriptor: int, what: str) -> None:
        said = -_REPEAT_S
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() - said >= _REPEAT_S:
                    owner = os.pread(descriptor, 20, 0).decode("ascii", "replace") or "unknown"
                    self._log(f"waiting for the {what}: being built by pid {owner}")
                    said = time.monotonic()
                time.sleep(0.05)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                # Without locks two processes may both build; each renames a whole file into place, so the result is the same.
                return self._log(f"{self.folder}: this file system has no locks; each process builds the {what} itself")

    def _usable_folder(self, data_folder: Path, chosen: str | None) -> Path:
        if chosen is not None:
            folder = Path(chosen)
            problem = _unwritable(folder)
            if problem:
                raise DataError(
                    f"--data-cache {chosen}: cannot be written ({problem})", "name a folder that can, or leave --data-cache out"
                )
            return folder
        beside = data_folder / FOLDER_NAME
        problem = _unwritable(beside)
        if not problem:
            return beside
        own = user_cache_folder()
        trouble = _unwritable(own)
        if trouble:
            raise DataError(f"{beside}: cannot be written ({problem}), nor can {own} ({trouble})", "set --data-cache to a folder that can")
        self._log(f"{beside} cannot be written ({problem}): keeping indices in {own}")
        return own


def user_cache_folder() -> Path:
    """Where indices go when the data folder is read-only: XDG_CACHE_HOME, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "megactl" / "index"


def _unwritable(folder: Path) -> str | None:
    """Why nothing can be written there; None where it can. Tried, since permission bits do not show a read-only mount."""
    probe = folder / f".probe-{os.getpid()}-{time.monotonic_ns()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return None


def checksum(array: np.ndarray) -> int:
    """crc32 over the wrapping sums of 1 MiB blocks: any damage to one place changes it, at the speed of memory and not of a crc."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    whole = len(data) // 8 * 8
    words = data[:whole].view(np.uint64)
    sums = np.array([np.add.reduce(words[i : i + _WORDS], dtype=np.uint64) for i in range(0, len(words), _WORDS)], np.uint64)
    return zlib.crc32(data[whole:].tobytes(), zlib.crc32(sums.tobytes()))


def _write(path: Path, key: dict[str, Any], arrays: Arrays) -> None:
    offset, entries = 0, {}
    for name, array in arrays.items():
        offset = -(-offset // _ALIGNMENT) * _ALIGNMENT
        entries[name] = {"dtype": array.dtype.str, "shape": list(array.shape), "offset": offset, "checksum": checksum(array)}
        offset += array.nbytes
    header = json.dumps({"key": key, "arrays": entries, "bytes": offset}).encode()
    beside = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}.partial")
    try:
        with beside.open("wb") as file:
            file.write(_PREFIX.pack(_MAGIC, len(header), zlib.crc32(header)) + header)
            start = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
            for name, array in arrays.items():
                file.seek(start + entries[name]["offset"])
                file.write(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))
            # Padding before an empty last array is otherwise not written.
            file.truncate(start + offset)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _load(path: Path, key: dict[str, Any]) -> Arrays:
    """Map a file's arrays. Raises FileNotFoundError, or ValueError where anything is not as it was written."""
    with path.open("rb") as file:
        magic, length, crc = _PREFIX.unpack(file.read(_PREFIX.size).ljust(_PREFIX.size, b"\0"))
        header = file.read(min(length, 1 << 20))
    if magic != _MAGIC or len(header) != length or zlib.crc32(header) != crc:
        raise ValueError("its header does not read")
    document = json.loads(header)
    start = -(-(_PREFIX.size + length) // _ALIGNMENT) * _ALIGNMENT
    if document["key"] != key:
        raise ValueError("it belongs to other data")
    if path.stat().st_size != start + document["bytes"]:
        raise ValueError(f"it has {path.stat().st_size} bytes instead of {start + document['bytes']}")
    arrays = {}
    for name, entry in document["arrays"].items():
        shape, dtype = tuple(entry["shape"]), np.dtype(entry["dtype"])
        size = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.memmap(path, dtype, "r", start + entry["offset"], shape) if size else np.zeros(shape, dtype)
        if checksum(arrays[name]) != entry["checksum"]:
            raise ValueError(f"the checksum of '{name}' does not match")
    return arrays
