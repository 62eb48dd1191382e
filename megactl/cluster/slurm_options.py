"""The options of sbatch and of srun (Slurm 20.11 to 25.05): long names, letters, what each takes. Source: their manual pages.

Both commands share most options; each table below is the shared part and what only one of them has. Plugins of a site (SPANK) add more:
those of pyxis are known here, since they are how containers are started on most training clusters.
"""

from __future__ import annotations

from typing import Literal

Takes = Literal["value", "nothing", "optional"]
Tool = Literal["sbatch", "srun"]

_SHARED_VALUE = """
account acctg-freq bb bbf begin chdir cluster-constraint clusters comment constraint container container-id core-spec cores-per-socket
cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution error exclude export extra extra-node-info gid gpu-bind
gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres gres-flags hint input job-name licenses mail-type mail-user mcs-label mem
mem-bind mem-per-cpu mem-per-gpu mincpus network nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node
ntasks-per-socket ntasks-per-tres oom-kill-step open-mode output partition power prefer priority profile qos reservation segment signal
sockets-per-node switches thread-spec threads-per-core time time-min tmp tres-bind tres-per-task uid wait-all-nodes wckey
"""
_SHARED_FLAG = "contiguous help hold overcommit oversubscribe quiet reboot spread-job stepmgr test-only usage use-min-nodes verbose version"
_SHARED_OPTIONAL = "exclusive nice no-kill propagate resv-ports"
_ONLY: dict[Tool, dict[Takes, str]] = {
    "sbatch": {
        "value": "array batch export-file kill-on-invalid-dep wrap",
        "nothing": "ignore-pbs no-requeue parsable requeue wait",
        "optional": "get-user-env",
    },
    "srun": {
        "value": """accel-bind bcast-exclude cpu-bind epilog het-group jobid mpi msg-timeout prolog relative slurmd-debug task-epilog
                    task-prolog threads treewidth wait""",
        "nothing": "disable-status exact external interactive label multi-prog no-allocate overlap preserve-env pty unbuffered "
        "quit-on-interrupt",
        "optional": "bcast compress immediate kill-on-bad-exit send-libs x11",
    },
}
_SHARED_LETTERS = {
    "A": "account", "b": "begin", "B": "extra-node-info", "c": "cpus-per-task", "C": "constraint", "d": "dependency", "D": "chdir",
    "e": "error", "F": "nodefile", "G": "gpus", "h": "help", "H": "hold", "i": "input", "J": "job-name", "k": "no-kill", "L": "licenses",
    "m": "distribution", "M": "clusters", "n": "ntasks", "N": "nodes", "o": "output", "O": "overcommit", "p": "partition", "q": "qos",
    "Q": "quiet", "s": "oversubscribe", "S": "core-spec", "t": "time", "v": "verbose", "V": "version", "w": "nodelist", "x": "exclude",
}  # fmt: skip
_LETTERS: dict[Tool, dict[str, str]] = {
    "sbatch": {**_SHARED_LETTERS, "a": "array", "W": "wait"},
    "srun": {
        **_SHARED_LETTERS, "E": "preserve-env", "I": "immediate", "K": "kill-on-bad-exit", "l": "label", "r": "relative",
        "T": "threads", "u": "unbuffered", "W": "wait", "X": "disable-status", "Z": "no-allocate",
    },
}  # fmt: skip
# https://github.com/NVIDIA/pyxis: options of srun, and of sbatch where the site allows it.
PYXIS = (
    "container-image", "container-mounts", "container-workdir", "container-name", "container-save", "container-mount-home",
    "no-container-mount-home", "container-remap-root", "no-container-remap-root", "container-entrypoint", "no-container-entrypoint",
    "container-entrypoint-log", "container-writable", "container-readonly", "container-env",
)  # fmt: skip


def options(tool: Tool) -> dict[str, Takes]:
    """Long names (without dashes) that `tool` knows by itself, each with what it takes."""
    found: dict[str, Takes] = {}
    shared: tuple[tuple[Takes, str], ...] = (("value", _SHARED_VALUE), ("nothing", _SHARED_FLAG), ("optional", _SHARED_OPTIONAL))
    for takes, names in (*shared, *_ONLY[tool].items()):
        found.update(dict.fromkeys(names.split(), takes))
    return found


def letters(tool: Tool) -> dict[str, str]:
    """Letters that `tool` knows, each with its long name."""
    return _LETTERS[tool]


def optional_letter(tool: Tool, letter: str) -> bool:
    """Whether a letter's value is optional, and then must stand right behind it (`-K1`)."""
    return options(tool)[_LETTERS[tool][letter]] == "optional"
