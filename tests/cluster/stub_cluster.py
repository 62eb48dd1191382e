"""Stand-ins for a cluster: srun, scontrol, salloc and module as scripts that note how they were called."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

# The number of words, then each, ended by a NUL byte: any text survives that, and none at all.
_NOTE = """printf '%s\\0' "$(($# + 1))" "{name}" "$@" >> "$CALLS"\n"""
_SRUN = """
{ printf '%s\\0' "MASTER_ADDR=$MASTER_ADDR" "MASTER_PORT=$MASTER_PORT" "OMP_NUM_THREADS=${OMP_NUM_THREADS-}"; env -0; } > "$ENVIRONMENT"
if [ -n "${SUMMARY-}" ]; then
    for word in "$@"; do
        case $word in --run-dir=*) mkdir -p -- "${word#*=}"; printf '%s' "$SUMMARY" > "${word#*=}/summary.json" ;; esac
    done
fi
exit "${SRUN_CODE:-0}"
"""
_SCONTROL = """
case "$*" in
    "show hostnames "*) printf 'node1\\nnode2\\n' ;;
    *"show job"*) echo "JobId=1 JobState=${JOB_STATE:-RUNNING} Reason=None" ;;
    requeue*) exit "${REQUEUE_CODE:-0}" ;;
esac
"""
_BODIES = {"srun": _SRUN, "scontrol": _SCONTROL, "salloc": "", "sbatch": "", "module": ""}


@dataclass
class Ran:
    """How a script ended: its exit code, what it printed on stderr, the calls it made (program and arguments), and srun's environment."""

    code: int
    stdout: str
    stderr: str
    calls: list[list[str]]
    environment: dict[str, str]

    def of(self, program: str) -> list[list[str]]:
        """Arguments of each call of `program`."""
        return [call[1:] for call in self.calls if call[0] == program]


class StubCluster:
    """Runs rendered scripts with the stand-ins first on PATH, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder / "work", folder / "bin"
        self.folder.mkdir()
        self.bin.mkdir()
        for name, body in _BODIES.items():
            path = self.bin / name
            path.write_text(f"#!/bin/bash\n{_NOTE.format(name=name)}{body}")
            path.chmod(0o755)

    def run(self, script: str, *arguments: str, **variables: object) -> Ran:
        """Run a script's text as a batch job's shell would; `variables` are set besides a job's usual ones, None unsets one."""
        path, calls, environment = self.folder / "script.sh", self.folder / "calls", self.folder / "environment"
        path.write_text(script, encoding="utf-8")
        for file in (calls, environment):
            file.unlink(missing_ok=True)
        values: dict[str, object] = {
            "PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(self.folder), "CALLS": calls, "ENVIRONMENT": environment,
            "SLURM_JOB_ID": 4711, "SLURM_JOB_NODELIST": "node[1-2]", **variables,
        }  # fmt: skip
        environ = {name: str(value) for name, value in values.items() if value is not None}
        answer = subprocess.run(
            ["bash", str(path), *arguments], cwd=self.folder, env=environ, capture_output=True, text=True, timeout=60, check=False
        )
        return Ran(answer.returncode, answer.stdout, answer.stderr, _calls(calls), _environment(environment))


def _calls(path: Path) -> list[list[str]]:
    words = iter(path.read_bytes().decode().split("\0")[:-1] if path.exists() else ())
    return [[next(words) for _ in range(int(count))] for count in words]


def _environment(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    return dict(entry.partition("=")[::2] for entry in path.read_bytes().decode().split("\0") if entry)


def summary(status: str, iterations: int) -> str:
    """A summary.json as the trainer writes it."""
    return json.dumps({"status": status, "iterations": iterations, "layout": {"tp": 1, "status": "inner"}}, indent=2) + "\n"
