"""--sbatch and --srun: any other option of the two, checked against what they have, against what has a setting, and as text."""

from __future__ import annotations

import re

from megactl.cluster.quoting import Place, broken_rule, shown
from megactl.cluster.slurm_options import PYXIS, Tool, options
from megactl.config.names import nearest
from megactl.errors import Problem

# Options that the script rests on, and what sets each.
_NODES = "--nodes and --gpus-per-node, or --ntasks-per-node without GPUs"
_OWN_SHARED = {
    "account": "--account", "chdir": "--chdir", "constraint": "--constraint", "cpus-per-gpu": "--cpus-per-task",
    "cpus-per-task": "--cpus-per-task", "error": "--log-dir", "exclude": "--exclude", "exclusive": "--exclusive",
    "gpus": "--gpus-per-node", "gpus-per-node": "--gpus-per-node", "gpus-per-task": "--gpus-per-node", "hint": "--hint",
    "job-name": "--job-name", "mail-type": "--mail-type", "mail-user": "--mail-user", "mem": "--mem", "nodelist": "--nodelist",
    "nodes": _NODES, "ntasks": _NODES, "ntasks-per-gpu": _NODES, "ntasks-per-node": _NODES, "output": "--log-dir",
    "partition": "--partition", "qos": "--qos", "reservation": "--reservation", "signal": "--signal", "time": "--time",
    "container-image": "--container-image", "container-mounts": "--container-mount", "container-workdir": "--container-workdir",
}  # fmt: skip
_OWN: dict[Tool, dict[str, str]] = {
    "sbatch": {
        **_OWN_SHARED, "array": "--array or --sweep", "no-requeue": "--no-requeue", "requeue": "--requeue",
        "open-mode": "--requeue, which appends",
    },
    "srun": {**_OWN_SHARED},
}  # fmt: skip
_PRINTS = "prints a text and starts nothing"
_TYPED = "belongs to the command line of sbatch"
_INSIDE = "would run the script itself inside, where scontrol is missing; use --container-image"
_REFUSED: dict[Tool, dict[str, str]] = {
    "sbatch": {
        "wrap": "makes a script of its own, which would replace this one", "parsable": _TYPED, "test-only": _TYPED, "wait": _TYPED,
        "help": _PRINTS, "usage": _PRINTS, "version": _PRINTS, "container": _INSIDE, "container-id": _INSIDE,
        **{name: _INSIDE for name in PYXIS},
    },
    "srun": {
        "help": _PRINTS, "usage": _PRINTS, "version": _PRINTS, "test-only": "starts nothing",
        "kill-on-bad-exit": "is on: a rank that fails must end the others, which would wait for it",
        "wait": "is set: a rank that ends early must not be waited for without end",
        "distribution": "is block: tensor parallelism needs the ranks of a node to be neighbours",
        "multi-prog": "every task runs the same command", "pty": "connects one task to the terminal and breaks signals",
    },
}  # fmt: skip


def pass_through_problem(tool: Tool, text: str) -> Problem | None:
    """What is wrong with "key=value" or "key" of --sbatch or --srun; None where it may stand in a script."""
    name, equals, value = text.partition("=")
    where = f"--{tool} {shown(text)}"
    if not re.fullmatch(r"[a-z][a-z-]*", name):
        return Problem(where, f"must be a long option of {tool} without its dashes", "such as switches=1")
    if name in _OWN[tool]:
        return Problem(where, "is a setting of its own", f"use {_OWN[tool][name]}")
    if name in _REFUSED[tool]:
        return Problem(where, _REFUSED[tool][name], "leave it out")
    known = {**options(tool), **({name: "optional" for name in PYXIS} if tool == "srun" else {})}
    takes = known.get(name)
    if takes is None:
        close = nearest(name, known)
        return Problem(where, f"{tool} has no such option", f"did you mean {close}?" if close else f"see man {tool}")
    if takes == "value" and not equals:
        return Problem(where, "takes a value", f"write {name}=VALUE")
    if takes == "nothing" and equals:
        return Problem(where, "takes no value", f"write --{tool} {name}")
    place: Place = "directive" if tool == "sbatch" else "shell"
    rule = broken_rule(value, place) if equals else None
    return Problem(where, rule, "use another value") if rule else None
