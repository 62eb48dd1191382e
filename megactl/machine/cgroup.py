"""What the control groups of this process allow it (version 1 and 2, also both at once): memory, processor time, memory kills."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from megactl.machine.system import System

_MOUNT = "sys/fs/cgroup"
# Version 1 says "no limit" with the largest number of whole pages.
_UNLIMITED = 2**60


def memory_limit(system: System) -> int | None:
    """The least limit on memory in bytes of this process's groups and those above them; None without any."""
    texts = [*_values(system, "", "memory.max"), *_values(system, "memory", "memory.limit_in_bytes")]
    limits = [int(text) for text in texts if text.isdigit()]
    return min((limit for limit in limits if limit < _UNLIMITED), default=None)


def cpu_quota(system: System) -> float | None:
    """Processors' worth of time that this process's groups allow, as `docker --cpus` and Kubernetes set it; None without a limit."""
    pairs = [text.split() for text in _values(system, "", "cpu.max")]
    for quota_file, period_file in zip(_files(system, "cpu", "cpu.cfs_quota_us"), _files(system, "cpu", "cpu.cfs_period_us"), strict=True):
        pairs.append([_text(quota_file), _text(period_file)])
    found = [int(pair[0]) / int(pair[1]) for pair in pairs if len(pair) == 2 and all(word.isdigit() and int(word) > 0 for word in pair)]
    return min(found, default=None)


def memory_event_files(system: System) -> list[Path]:
    """Files that may count this process's memory kills in a line `oom_kill N`, the nearest first.

    /proc/vmstat, the last resort, counts for the whole machine.
    """
    files = [*_files(system, "", "memory.events"), *_files(system, "memory", "memory.oom_control")]
    return [*files, system.path("proc/vmstat")]


def _values(system: System, controller: str, file: str) -> list[str]:
    return [text for path in _files(system, controller, file) if (text := _text(path))]


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _files(system: System, controller: str, file: str) -> list[Path]:
    """`file` of this process's group of `controller` ("": version 2) and of every group above it, the nearest first."""
    found: list[Path] = []
    for mount, group in _groups(system, controller):
        # Inside a container the path is the host's and does not exist: its own group is mounted at the root, where this walk ends.
        inside = PurePosixPath(group.lstrip("/"))
        found += [mount / folder / file for folder in (inside, *inside.parents)]
    return list(dict.fromkeys(found))


def _groups(system: System, controller: str) -> Iterator[tuple[Path, str]]:
    """(mount point, path of the group) for each place where the hierarchy of `controller` may be mounted."""
    root = system.path(_MOUNT)
    lines = [line.split(":", 2) for line in (system.read("proc/self/cgroup") or "").splitlines()]
    groups = [parts for parts in lines if len(parts) == 3 and (controller in parts[1].split(",") if controller else parts[1] == "")]
    for _, controllers, path in groups or [["", controller, "/"]]:
        if controller:
            # Controllers that share a hierarchy are mounted together, and by their single names through links.
            yield from ((root / name, path) for name in dict.fromkeys((controllers, controller)))
        else:
            # Beside version 1 the second version is mounted below it.
            yield from ((root / name, path) for name in ("", "unified"))
