"""Rules on how ranks are started: tasks and GPUs, who finds whom, and what is expanded before there are ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megactl.cluster.lint.batch import MEGACTL, NODE_LAUNCHERS, SPREADERS, TRAINS, Batch, Srun, command_name
from megactl.cluster.lint.findings import Hit, Rule
from megactl.cluster.lint.syntax import Expansion
from megactl.cluster.quoting import shown

# Set by srun for each task; in the batch script they are unset, or those of its first node.
_OF_A_TASK = frozenset(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"))
_OF_A_TASK_TOO = frozenset(("SLURMD_NODENAME", "SLURM_TASK_PID", "HOSTNAME"))
_OF_A_JOB = re.compile(
    r"SLURM_(?:JOB\w*|PROCID|LOCALID|NODEID|NNODES|NTASKS\w*|NPROCS|NODELIST|STEP\w*|ARRAY\w*|CPUS\w*|GPUS\w*|TASKS\w*|RESTART_COUNT"
    r"|SUBMIT_DIR)|SLURMD_NODENAME"
)
_ONLY_SHOWS = frozenset(("echo", "printf", "[", "[[", "test", "case"))
_ADDRESS = r"(?:MASTER_ADDR=|--(?:master|rdzv)[_-](?:addr|endpoint)[= ]?)[\"']?"
_PORT = r"(?:MASTER_PORT=|--(?:master|main_process)[_-]port[= ]?|--rdzv[_-]endpoint[= ]?[^\s:]*:)[\"']?"
_NODES = frozenset(("NNODES", "NUM_NODES", "N_NODES", "NODES", "NUM_OF_NODES"))
_GPUS = frozenset(("GPUS_PER_NODE", "N_GPUS_PER_NODE", "NUM_GPUS_PER_NODE", "NPROC_PER_NODE", "N_GPUS"))


def tasks_of(batch: Batch, srun: Srun) -> int | None:
    """Tasks a node of one srun: its own options, else the job's."""
    own, total, nodes = (srun.value(name) for name in ("ntasks-per-node", "ntasks", "nodes"))
    if own is not None:
        return int(own) if own.isdecimal() else None
    if total is not None:
        many = int(nodes) if nodes and nodes.isdecimal() else batch.nodes
        return int(total) // many if total.isdecimal() and many and int(total) % many == 0 else None
    return batch.tasks_per_node


def training(batch: Batch) -> list[Srun]:
    """The sruns that start training."""
    return [srun for srun in batch.sruns if TRAINS.search(srun.program)]


def launcher_tasks(batch: Batch) -> Iterator[Hit]:
    """torchrun starts a process a GPU by itself: several of them on a node start every rank several times."""
    for srun in training(batch):
        tasks, launcher = tasks_of(batch, srun), NODE_LAUNCHERS.search(srun.program)
        if launcher and not MEGACTL.search(srun.program) and tasks is not None and tasks > 1:
            rule = f"srun starts it {tasks} times on each node, and each starts a process a GPU"
            yield Hit(srun.command.line, launcher[0], rule, "set --ntasks-per-node=1")


def one_task(batch: Batch) -> Iterator[Hit]:
    """One process a node uses one GPU of it."""
    gpus = batch.gpus_per_node
    for srun in training(batch):
        if gpus and gpus > 1 and tasks_of(batch, srun) == 1 and not NODE_LAUNCHERS.search(srun.program):
            rule = f"starts one process on a node with {gpus} GPUs, and nothing here starts the others"
            yield Hit(srun.command.line, "srun", rule, f"set --ntasks-per-node={gpus}, or start torchrun, or megactl train")


def tasks_and_gpus(batch: Batch) -> Iterator[Hit]:
    """A task a GPU is what every launcher but torchrun's kind expects."""
    gpus = batch.gpus_per_node
    for srun in training(batch):
        tasks, by_itself = tasks_of(batch, srun), NODE_LAUNCHERS.search(srun.program) and not MEGACTL.search(srun.program)
        if gpus and tasks and tasks > 1 and tasks != gpus and not by_itself:
            yield Hit(srun.command.line, "srun", f"starts {tasks} tasks on nodes with {gpus} GPUs each", f"set --ntasks-per-node={gpus}")


def no_srun(batch: Batch) -> Iterator[Hit]:
    """The batch script runs on the first node alone."""
    option = batch.option("nodes")
    several = option is not None and batch.nodes != 1
    if several and batch.launches and not any(SPREADERS.search(batch.fill(command.text)) for command in batch.commands):
        command, text = batch.launches[0]
        asked = option.written if option is not None else "--nodes"
        rule = f"runs on the first node only, and {asked} asks for more"
        yield Hit(command.line, shown(" ".join(text.split()[:3])), rule, "start it with srun")


def layout(batch: Batch) -> Iterator[Hit]:
    """Numbers that the script repeats must be those of its directives."""
    for names, asked, where in ((_NODES, batch.nodes, "--nodes"), (_GPUS, batch.gpus_per_node, "the GPUs of a node")):
        for assignment, _ in batch.assignments:
            value = assignment.value.text
            if assignment.name in names and value.isdecimal() and asked and int(value) != asked and batch.is_job:
                cure = "use $SLURM_NNODES" if names is _NODES else "make them agree"
                yield Hit(assignment.line, f"{assignment.name}={value}", f"{where} is {asked}", cure)
    flags = (
        (r"--nnodes[= ](\d+)\b", batch.nodes, "--nodes"),
        (r"--nproc[_-]per[_-]node[= ](\d+)\b", batch.gpus_per_node, "the GPUs of a node"),
    )
    for command, text in batch.launches:
        for pattern, asked, where in flags:
            match = re.search(pattern, command.text) or re.search(pattern, text)
            if match and asked and int(match[1]) != asked and batch.is_job:
                yield Hit(command.line, match[0], f"{where} is {asked}", "make them agree")


def early_expansion(batch: Batch) -> Iterator[Hit]:
    """`$SLURM_PROCID` outside single quotes is filled in by the batch script, once, before there are tasks."""
    if not batch.is_job and not batch.sruns:
        return
    for command in batch.commands:
        srun = batch.srun_of(command)
        first = srun.first_program_word if srun is not None else 0
        words = [] if command_name(command) in _ONLY_SHOWS else command.words[first:]
        names = _OF_A_TASK | _OF_A_TASK_TOO if srun is not None else _OF_A_TASK
        values = [word for assignment in command.assignments for word in assignment.words]
        for word in [*words, *values]:
            for item in word.expansions:
                if item.name in names:
                    yield _too_early(item, inside=srun is not None)


def _too_early(item: Expansion, *, inside: bool) -> Hit:
    rule = "is filled in by the batch script, before srun starts any task, so every rank gets the same"
    example = f"srun bash -c '... ${item.name} ...'"
    quote = f"put it in single quotes ({example}), or write \\${item.name} in double quotes"
    return Hit(item.line, item.text, rule, quote if inside else f"move it into the command that srun starts: {example}")


def early_heredoc(batch: Batch) -> Iterator[Hit]:
    """An unquoted here-document is filled in when it is written."""
    for command in batch.commands:
        for heredoc in command.heredocs:
            if heredoc.quoted:
                continue
            submits = command_name(command) == "sbatch" or re.search(r"^#SBATCH", heredoc.body, re.M) is not None
            for item in heredoc.expansions:
                held = (item.name and _OF_A_JOB.fullmatch(item.name)) if submits else item.name in _OF_A_TASK
                command_too = submits and item.name is None and re.search(r"SLURM_JOB|scontrol|hostname", item.text)
                if held or command_too:
                    when = "when there is no job yet" if submits else "before there are tasks"
                    cure = f"write <<'{heredoc.delimiter}', or put a backslash before it"
                    yield Hit(item.line, shown(item.text), f"is filled in where the here-document is written, {when}", cure)


def local_address(batch: Batch) -> Iterator[Hit]:
    """Every node would look for rank 0 at itself."""
    if batch.nodes == 1 or not batch.is_job:
        return
    pattern = re.compile(_ADDRESS + r"(localhost|127\.\d+\.\d+\.\d+|0\.0\.0\.0)")
    for line, text in _texts(batch):
        match = pattern.search(text)
        if match:
            yield Hit(line, match[0], "every node looks for the first rank at itself", _HEAD)


_HEAD = 'use MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'


def _texts(batch: Batch) -> Iterator[tuple[int, str]]:
    for assignment, _ in batch.assignments:
        yield assignment.line, f"{assignment.name}={assignment.value.text}"
    for command in batch.commands:
        if command_name(command) not in ("echo", "printf"):
            yield command.line, command.text


def _task_texts(batch: Batch) -> Iterator[tuple[int, str]]:
    """What the tasks' own shells read: words of srun's program without what the batch script fills in."""
    for srun in batch.sruns:
        for word in srun.command.words[srun.first_program_word :]:
            text = word.text
            for item in word.expansions:
                text = text.replace(item.text, "", 1)
            yield word.line, text


def own_address(batch: Batch) -> Iterator[Hit]:
    """Each node would take itself for the first one."""
    pattern = re.compile(_ADDRESS + r"(?:\$\(\s*hostname|`\s*hostname|\$\{?HOSTNAME|\$\{?SLURMD_NODENAME)")
    for line, text in _task_texts(batch):
        match = pattern.search(text)
        if match and batch.nodes != 1:
            yield Hit(line, match[0], "is evaluated by every task, so each node names itself", f"{_HEAD} before srun")


def random_port(batch: Batch) -> Iterator[Hit]:
    """Each task would wait at a port of its own."""
    pattern = re.compile(_PORT + r"(?:\$\(\(?[^)]*(?:RANDOM|shuf)|\$\{?RANDOM|`shuf)")
    for line, text in _task_texts(batch):
        match = pattern.search(text)
        if match:
            yield Hit(line, shown(match[0]), "is evaluated by every task, so each waits at another port", _JOB_PORT + " before srun")


_JOB_PORT = "use MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))"


def fixed_port(batch: Batch) -> Iterator[Hit]:
    """Two jobs on one node take each other's port."""
    pattern = re.compile(_PORT + r"(\d{2,5})\b")
    for line, text in _texts(batch):
        match = pattern.search(text)
        if match and batch.is_job:
            yield Hit(line, match[0], "two jobs on one node take the same port", _JOB_PORT)


def nodes_by_hand(batch: Batch) -> Iterator[Hit]:
    """Lists are compressed: node[1-4,7]. Cutting at commas gives text that is no host."""
    for assignment, _ in batch.assignments:
        for item in assignment.value.expansions:
            inside = re.search(r"SLURM_(?:JOB_|STEP_)?NODELIST", item.text)
            cuts = re.search(r"NODELIST\}?[^}\w]*[%#/:]", item.text) if item.name else True
            if inside and cuts and not re.search(r"scontrol|nodeset|hostlist|python", item.text):
                yield Hit(item.line, shown(item.text), "node lists look like node[1-4,7], and cutting them gives no host", _HEAD)


def visible_devices(batch: Batch) -> Iterator[Hit]:
    """Slurm has said which GPUs a job may use."""
    for assignment, _ in batch.assignments:
        if assignment.name == "CUDA_VISIBLE_DEVICES" and assignment.value.text[:1].isdigit() and batch.is_job:
            value = f"CUDA_VISIBLE_DEVICES={assignment.value.text}"
            yield Hit(assignment.line, value, "Slurm sets it for each task, and these may be another job's GPUs", "delete the line")


RULES = (
    Rule("launcher-tasks", "error", "torchrun (or its kind) in several tasks of a node", launcher_tasks),
    Rule("one-task", "warning", "one task on a node with several GPUs, and no launcher", one_task),
    Rule("tasks-and-gpus", "warning", "tasks and GPUs of a node that differ", tasks_and_gpus),
    Rule("no-srun", "error", "several nodes, and nothing that starts the command on each", no_srun),
    Rule("layout", "error", "numbers of nodes or GPUs that differ from the directives", layout),
    Rule("early-expansion", "error", "`$SLURM_PROCID` and the like filled in before there are tasks", early_expansion),
    Rule("early-heredoc", "error", "an unquoted here-document that fills in the job's variables too early", early_heredoc),
    Rule("local-address", "error", "MASTER_ADDR=localhost with several nodes", local_address),
    Rule("own-address", "error", "a MASTER_ADDR that each node evaluates for itself", own_address),
    Rule("random-port", "error", "a port that each task draws for itself", random_port),
    Rule("fixed-port", "warning", "a fixed MASTER_PORT", fixed_port),
    Rule("nodes-by-hand", "warning", "a node list cut by hand", nodes_by_hand),
    Rule("visible-devices", "warning", "CUDA_VISIBLE_DEVICES set by hand", visible_devices),
)
