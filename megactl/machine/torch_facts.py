"""Asking torch about itself from outside: a process of its own, so that no torch, a broken one, or a hanging driver can be reported."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from dataclasses import dataclass, field
from typing import Any

from megactl.machine.record import package_root
from megactl.machine.system import Answer, System

PROBE = "megactl.engine.probe"


@dataclass(frozen=True)
class TorchFacts:
    """`installed` False: there is no torch. `error`: it is there and does not work. `facts`: what `megactl/engine/probe.py` found."""

    installed: bool
    error: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def works(self) -> bool:
        """Whether torch could be asked."""
        return self.installed and self.error is None


def ask_torch(system: System, *, seconds: float = 120.0) -> TorchFacts:
    """What this Python's torch says of itself and of the GPUs."""
    if importlib.util.find_spec("torch") is None:
        return TorchFacts(False)
    # The package may be found by the current folder alone, which a module run with -m would look in too, but not first.
    paths = [str(package_root().parent), *filter(None, [system.environ.get("PYTHONPATH")])]
    environ = {**system.environ, "PYTHONPATH": os.pathsep.join(paths)}
    answer = system.run(sys.executable, "-m", PROBE, seconds=seconds, environ=environ)
    if answer.code != 0:
        return TorchFacts(True, _reason(answer))
    try:
        return TorchFacts(True, None, json.loads(answer.out.splitlines()[-1]))
    except (ValueError, IndexError):
        return TorchFacts(True, f"torch wrote {answer.out[:100]!r} where its facts should be")


def _reason(answer: Answer) -> str:
    """Why the probe failed, in one line: a signal, no answer, or the last line of its traceback."""
    if answer.code is None:
        return answer.err.replace(sys.executable, "torch")
    if answer.code < 0:
        return f"its process was killed by {signal.Signals(-answer.code).name}"
    lines = [line for line in answer.err.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"its process ended with exit code {answer.code}"
