"""The way to the operating system: files below a root, programs on a PATH, variables. All are passed in, so that a test has its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_COMMAND_SECONDS = 20.0


@dataclass(frozen=True)
class Answer:
    """How a program ended: its exit code (None: not found, or no answer in time), and what it wrote."""

    code: int | None
    out: str
    err: str


@dataclass(frozen=True)
class System:
    """This machine: `root` is where /proc and /sys are, `environ` the variables (PATH finds the programs)."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def path(self, name: str) -> Path:
        """The file that is called /`name`."""
        return self.root / name.lstrip("/")

    def read(self, name: str) -> str | None:
        """The text of /`name`; None where it is not there or cannot be read."""
        try:
            return self.path(name).read_text(errors="replace")
        except OSError:
            return None

    def names(self, folder: str) -> list[str]:
        """What lies in /`folder`, sorted; empty where it is not there."""
        try:
            return sorted(os.listdir(self.path(folder)))
        except OSError:
            return []

    def run(self, *command: str, seconds: float = _COMMAND_SECONDS, environ: Mapping[str, str] | None = None) -> Answer:
        """Run a program to its end. One that is not there, or hangs (a driver can make it), is no error here: `code` is None."""
        program = shutil.which(command[0], path=self.environ.get("PATH", os.defpath))
        if program is None:
            return Answer(None, "", f"{command[0]} is not on the PATH")
        try:
            child = subprocess.Popen(
                [program, *command[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                errors="replace", env=dict(self.environ if environ is None else environ), start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Answer(None, "", f"{command[0]} cannot be run: {error.strerror}")
        try:
            out, err = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            # Not waited for: a process inside a wedged driver does not even die of SIGKILL, and this one must go on.
            os.killpg(child.pid, signal.SIGKILL)
            return Answer(None, "", f"{command[0]} gave no answer within {seconds:g} s")
        return Answer(child.returncode, out, err)

    def output(self, *command: str) -> str | None:
        """What a program wrote on stdout, without the white space around it; None where it failed."""
        answer = self.run(*command)
        return answer.out.strip() if answer.code == 0 else None
