"""Reading the stacks that faulthandler wrote into a rank's log, to say where a rank is."""

from __future__ import annotations

import os
import re
from pathlib import Path

_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)$')
_WAITING = ("torch/distributed/", "megactl/engine/collectives.py")


def innermost_frame(log: Path, offset: int) -> str | None:
    """`file:line function` where the main thread is, from the dump written after byte `offset` of `log`; None without a dump.

    faulthandler writes each thread's most recent call first and the main thread last.
    """
    try:
        with log.open("rb") as handle:
            handle.seek(offset)
            lines = handle.read(1 << 20).decode(errors="replace").splitlines()
    except OSError:
        return None
    starts = [i for i, line in enumerate(lines) if line.endswith("(most recent call first):")]
    if not starts:
        return None
    frames = [match for line in lines[starts[-1] + 1 :] if (match := _FRAME.match(line))]
    if not frames:
        return None
    own = next((frame for frame in frames if _is_ours(frame["file"])), frames[0])
    return _place(frames[0]) if own is frames[0] else f"{_place(frames[0])}, called from {_place(own)}"


def _is_ours(file: str) -> bool:
    launcher = os.path.dirname(__file__)
    package = os.path.dirname(os.path.dirname(launcher))
    return file.startswith(package + os.sep) and not file.startswith(launcher + os.sep)


def _place(frame: re.Match[str]) -> str:
    return f"{frame['file']}:{frame['line']} {frame['function']}"


def waits_for_others(frame: str | None) -> bool:
    """Whether that frame is a collective or a store: such a rank waits for another one rather than holding up the run."""
    return frame is not None and any(part in frame for part in _WAITING)
