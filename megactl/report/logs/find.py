"""Which files are meant: names, folders with all below them, and patterns the shell has not expanded."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from megactl.report.logs.run_folder import is_run_folder
from megactl.report.records import METRICS_FILE

ENDINGS = (".out", ".log", ".err", ".txt")
PACKED = (".gz", ".zst")


@dataclass
class Found:
    """`files` in the order given (those of a folder by name), each once. `walked` are those that no one named, out of folders.

    missing: for each argument that led to no file, what it is and why.
    """

    files: list[str] = field(default_factory=list)
    walked: set[str] = field(default_factory=set)
    missing: list[tuple[str, str]] = field(default_factory=list)


def find_logs(arguments: Sequence[str]) -> Found:
    """The files that `arguments` mean. Of a folder: the files below it that end in .out, .log, .err or .txt, packed or not.

    A run directory of megactl among them stands for its metrics.jsonl.
    """
    found, seen = Found(), set()
    for argument in arguments:
        for path, walked in _expand(argument, found):
            real = os.path.realpath(path)
            if real not in seen:
                seen.add(real)
                found.files.append(path)
                found.walked |= {path} if walked else set()
    return found


def _expand(argument: str, found: Found) -> list[tuple[str, bool]]:
    # A file whose name has a bracket is a file before it is a pattern.
    if os.path.lexists(argument):
        matches = [argument]
    elif glob.has_magic(argument):
        matches = sorted(glob.glob(argument, recursive=True))
    else:
        found.missing.append((argument, "no such file or folder"))
        return []
    if not matches:
        found.missing.append((argument, "no file matches this pattern"))
        return []
    expanded = [item for match in matches for item in (_below(match) if os.path.isdir(match) else [(match, False)])]
    if not expanded:
        endings = ", ".join(ENDINGS)
        found.missing.append((argument, f"no file below it ends in {endings} (or these with {' or '.join(PACKED)})"))
    return expanded


def _below(folder: str) -> list[tuple[str, bool]]:
    paths = []
    for place, below, names in os.walk(folder):
        if is_run_folder(place):
            # Its rank logs and its own file tell of one run; checkpoints are many files.
            below.clear()
            paths.append(os.path.join(place, METRICS_FILE))
        else:
            paths += [os.path.join(place, name) for name in names if _is_log(name)]
    return [(path, True) for path in sorted(paths)]


def _is_log(name: str) -> bool:
    plain = next((name[: -len(ending)] for ending in PACKED if name.endswith(ending)), name)
    return plain.endswith(ENDINGS)
