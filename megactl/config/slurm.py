"""What Slurm tells a task through its environment: host lists, tasks per node, a port both ends agree on. No Slurm command is run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from megactl.errors import ConfigError, Problem

# Slurm numbers its own steps (batch 0xfffffffb, extern 0xfffffffc, interactive 0xfffffffa) from the top of 32 bits; srun's count from 0.
_FIRST_RESERVED_STEP = 0xFFFFFFF0
# Below the kernel's ephemeral range (32768 up), so that the port is not taken by an outgoing connection.
PORT_BASE, PORT_SPAN = 10_000, 20_000


def inside_srun(environ: Mapping[str, str]) -> bool:
    """True in a task that srun started; False in the batch script itself and in an salloc shell, which also carry SLURM_PROCID."""
    step = environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEPID") or ""
    return "SLURM_PROCID" in environ and step.isdigit() and int(step) < _FIRST_RESERVED_STEP


def integer(environ: Mapping[str, str], *names: str) -> int | None:
    """The first of `names` that is set, as an integer; None where none is set. Raises ConfigError for text that is no integer."""
    for name in names:
        text = environ.get(name, "").strip()
        if text:
            if not text.isdigit():
                raise ConfigError([Problem(f"{name}={text}", "must be a whole number", "unset it or start the command with srun")])
            return int(text)
    return None


def tasks_on_node(environ: Mapping[str, str], node: int) -> int | None:
    """Tasks of this step on node number `node`, from `SLURM_STEP_TASKS_PER_NODE` (such as "8(x2),4"); None where it is not set."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    if not text:
        return None
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\(x(\d+)\))?\s*", part)
        if match is None:
            raise ConfigError([Problem(f"SLURM_TASKS_PER_NODE={text}", "must look like 8(x2),4", "start the command with srun")])
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[node] if node < len(counts) else None


def expand_hosts(text: str) -> Iterator[str]:
    """Hosts of a Slurm list in order: "n[01-03,7],login" gives n01 n02 n03 n7 login. Leading zeros are kept; several brackets multiply."""
    for part in _split_outside_brackets(text):
        yield from _expand_one(part)


def _split_outside_brackets(text: str) -> Iterator[str]:
    depth, start = 0, 0
    for index, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            yield text[start:index]
            start = index + 1
    if depth:
        raise ConfigError([Problem(f"SLURM_NODELIST={text}", "has an unclosed bracket", "set MASTER_ADDR to the first host instead")])
    yield text[start:]


def _expand_one(pattern: str) -> Iterator[str]:
    head, bracket, rest = pattern.partition("[")
    if not bracket:
        if pattern.strip():
            yield pattern.strip()
        return
    inside, _, tail = rest.partition("]")
    for item in inside.split(","):
        for number in _numbers(item.strip()):
            yield from _expand_one(f"{head}{number}{tail}")


def _numbers(item: str) -> Iterator[str]:
    low, dash, high = item.partition("-")
    if not dash:
        yield low
        return
    if not (low.isdigit() and high.isdigit()):
        instead = "set MASTER_ADDR to the first host instead"
        raise ConfigError([Problem(f"SLURM_NODELIST item {item}", "must be a range of numbers", instead)])
    for value in range(int(low), int(high) + 1):
        yield f"{value:0{len(low)}d}"


def master_address(environ: Mapping[str, str]) -> str:
    """The host of task 0: the first host of the step's node list, or MASTER_ADDR where the user set it."""
    if environ.get("MASTER_ADDR"):
        return environ["MASTER_ADDR"]
    for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"):
        if environ.get(name):
            return next(expand_hosts(environ[name]))
    raise ConfigError([Problem("SLURM_STEP_NODELIST", "is not set, so the host of rank 0 is unknown", "set MASTER_ADDR to it")])


def master_port(environ: Mapping[str, str]) -> int:
    """A port that every task computes alike from the job and step ids (so no task has to tell another), or MASTER_PORT."""
    given = integer(environ, "MASTER_PORT")
    if given is not None:
        return given
    job = integer(environ, "SLURM_JOB_ID", "SLURM_JOBID") or 0
    step = integer(environ, "SLURM_STEP_ID", "SLURM_STEPID") or 0
    # 7919 is prime to the span: steps of one job that run side by side land on different ports.
    return PORT_BASE + (job + 7919 * step) % PORT_SPAN
