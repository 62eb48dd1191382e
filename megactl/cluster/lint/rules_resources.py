"""Rules on what a job asks for: time, memory, GPUs, CPUs, its log, signals and requeueing."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megactl.cluster.formats import seconds_of
from megactl.cluster.lint.batch import TORCHRUN, Batch, command_name, gpus_of
from megactl.cluster.lint.findings import Hit, Rule
from megactl.cluster.quoting import shown

_RESUMES = r"resume|(?<!\w)--?load|--restart|from[_-]checkpoint|auto[_-]?restart|megactl(?: -\S+)* train"
_SIGNAL = re.compile(r"(?:([RB]{1,2}):)?(?:SIG)?(\w+)(?:@(\d+))?", re.IGNORECASE)
_NAMES = {1: "HUP", 2: "INT", 3: "QUIT", 10: "USR1", 12: "USR2", 15: "TERM", 18: "CONT"}


def time_format(batch: Batch) -> Iterator[Hit]:
    """What sbatch cannot read as a time."""
    for name in ("time", "time-min"):
        option = batch.option(name)
        if option is not None and option.value:
            try:
                seconds_of(option.value)
            except ValueError:
                yield Hit(option.line, shown(option.written), "is no time limit", "write HH:MM:SS or D-HH:MM:SS")


def time_units(batch: Batch) -> Iterator[Hit]:
    """20 is minutes, and 20:00 is minutes and seconds."""
    option = batch.option("time")
    if option is None or not option.value:
        return
    match = re.fullmatch(r"(\d+)(?::(\d+))?", option.value)
    if match:
        minutes = int(match[1])
        meant = f"{minutes // 60:02d}:{minutes % 60:02d}:{int(match[2] or 0):02d}"
        unit = "minutes and seconds" if match[2] else "minutes"
        yield Hit(option.line, option.written, f"is {unit}, not hours", f"write --time={meant} so that nobody has to know")


def no_time(batch: Batch) -> Iterator[Hit]:
    """The partition's default is often an hour or less."""
    if batch.is_job and batch.option("time") is None:
        rule = "the partition's default limit holds, and the scheduler cannot fit the job into gaps"
        yield Hit(1, "no --time", rule, "add #SBATCH --time=HH:MM:SS")


def memory(batch: Batch) -> Iterator[Hit]:
    """Formats that sbatch refuses, and options that exclude each other."""
    given = [option for name in ("mem", "mem-per-cpu", "mem-per-gpu") if (option := batch.option(name)) is not None]
    for option in given:
        if not re.fullmatch(r"\d+(?:[KMGT]B?)?", option.value or "", re.IGNORECASE):
            yield Hit(option.line, shown(option.written), "is no size", "write a whole number and K, M, G or T, such as 64G")
    if len(given) > 1:
        last = max(given, key=lambda option: option.line)
        both = " and ".join(f"--{option.name}" for option in given)
        yield Hit(last.line, last.written, f"sbatch refuses {both} together", "keep one of them")


def memory_units(batch: Batch) -> Iterator[Hit]:
    """A plain number is megabytes."""
    for name in ("mem", "mem-per-cpu", "mem-per-gpu"):
        option = batch.option(name)
        if option is not None and (option.value or "").isdecimal() and 0 < int(option.value or 0) < 1024:
            yield Hit(option.line, option.written, f"is {option.value} megabytes", f"write --{name}={option.value}G for gigabytes")


def exclusive_memory(batch: Batch) -> Iterator[Hit]:
    """Whole nodes come with all CPUs and GPUs, but with the default share of memory only."""
    option = batch.option("exclusive")
    if option is not None and not option.value and batch.option("mem", "mem-per-cpu", "mem-per-gpu") is None:
        rule = "gives all CPUs and GPUs of a node, but of its memory only the site's default"
        yield Hit(option.line, option.written, rule, "add #SBATCH --mem=0 for all of it")


def gpus_twice(batch: Batch) -> Iterator[Hit]:
    """--gres=gpu:N beside --gpus-per-node, or a total that does not fit."""
    found = [(option, count) for option in batch.options if (count := gpus_of(option)) is not None]
    kinds = {option.name for option, _ in found}
    if len(kinds) > 1:
        (first, left), (last, right) = found[0], found[-1]
        rule = f"asks for {right} GPUs a node" + (f" and {first.written} for {left}" if left != right else f", as {first.written} does")
        yield Hit(last.line, last.written, rule, "keep one of them")
    total, nodes, each = batch.number("gpus"), batch.nodes, batch.gpus_per_node
    if total is not None and found and nodes and each and total != nodes * each:
        option = batch.option("gpus")
        assert option is not None
        rule = f"{nodes} nodes with {each} GPUs each have {nodes * each}"
        yield Hit(option.line, option.written, rule, "delete --gpus, or make them agree")


def cpus(batch: Batch) -> Iterator[Hit]:
    """Without it a task has one CPU, which loads data and launches kernels for a GPU."""
    asked = batch.option("cpus-per-task", "cpus-per-gpu", "exclusive", "mincpus")
    if batch.is_job and batch.needs_gpus and asked is None and batch.launches:
        yield Hit(1, "no --cpus-per-task", "each task gets one CPU", "add #SBATCH --cpus-per-task=CPUS_OF_A_NODE / TASKS_OF_A_NODE")


def threads(batch: Batch) -> Iterator[Hit]:
    """Ranks of one node that each use every core slow each other down."""
    several = (batch.tasks_per_node or 1) > 1
    sets = batch.mentions(r"OMP_NUM_THREADS|MKL_NUM_THREADS")
    by_srun = [srun for srun in batch.sruns if re.search(r"(?<![\w.])python", srun.program)]
    if batch.is_job and several and by_srun and not sets and not batch.trains_with_megactl:
        rule = "every rank of a node starts a thread for each core that it sees"
        yield Hit(by_srun[0].command.line, "no OMP_NUM_THREADS", rule, "add `export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK` before srun")


def output_folder(batch: Batch) -> Iterator[Hit]:
    """Slurm makes no folders: the job fails at once and leaves no log that says why."""
    for name in ("output", "error"):
        option = batch.option(name)
        path = option.value if option is not None else None
        if option is None or not path or "/" not in path or "$" in path or path.startswith("~") or batch.folder is None:
            continue
        folder = path.rpartition("/")[0]
        base = batch.folder / (chdir.value if (chdir := batch.option("chdir")) is not None and chdir.value else "")
        if folder and "%" not in folder and not (base / folder).is_dir():
            rule = f"the folder {folder} does not exist, and Slurm does not make it"
            yield Hit(option.line, option.written, rule, f"run `mkdir -p {folder}` before sbatch")


def log_overwritten(batch: Batch) -> Iterator[Hit]:
    """One name for all jobs: each replaces the log of the one before."""
    for name in ("output", "error"):
        option = batch.option(name)
        if option is None or not option.value or option.value.startswith("/dev/"):
            continue
        mode = batch.option("open-mode")
        appends = mode is not None and (mode.value or "").lower() in ("append", "a")
        if not re.search(r"%\d*[jAJ]", option.value) and not appends:
            rule = "every job writes over the log of the one before"
            yield Hit(option.line, option.written, rule, "put %j (the job's number) into the name")
        elif batch.option("array") is not None and not re.search(r"%\d*[aj]", option.value):
            yield Hit(option.line, option.written, "all tasks of the array write into one file", "put %A_%a into the name")


def requeue_truncates(batch: Batch) -> Iterator[Hit]:
    """By default the log is emptied when a job starts again."""
    option = batch.option("requeue")
    line = option.line if option is not None else next((c.line for c in batch.commands if _requeues(c.text)), None)
    if line is not None and batch.is_job and batch.option("open-mode") is None and batch.option("no-requeue") is None:
        yield Hit(line, "requeue without --open-mode", "the log is emptied when the job starts again", "add #SBATCH --open-mode=append")


def _requeues(text: str) -> bool:
    return re.search(r"\bscontrol\b.*\brequeue", text) is not None


def requeue_without_resume(batch: Batch) -> Iterator[Hit]:
    """A job that starts again from step 0 loses what it did."""
    option = batch.option("requeue")
    own = next((command.line for command in batch.commands if _requeues(command.text)), None)
    if option is None and own is None:
        return
    line = option.line if option is not None else own or 1
    never = next((command.line for command, text in batch.launches if re.search(r"--resume[ =]never", text)), None)
    if never is not None:
        yield Hit(never, "--resume never", "the job is requeued and would begin at iteration 0 again", "use --resume auto")
    elif batch.launches and not batch.mentions(_RESUMES) and not re.search(_RESUMES, "\n".join(text for _, text in batch.launches)):
        rule = "nothing in the script loads a checkpoint, so a requeued job begins anew"
        yield Hit(line, "requeue", rule, "let the command resume from its last checkpoint")


def requeue_loop(batch: Batch) -> Iterator[Hit]:
    """A job that requeues itself whatever happened never ends."""
    if batch.mentions(r"SLURM_RESTART_COUNT"):
        return
    for command in batch.commands:
        # `if`, `case` and `&&` stand before it where it depends on something.
        if _requeues(command.text) and command.depth == 0 and command.before not in ("&&", "||", "then", ")"):
            rule = "requeues the job whatever happened, also after a crash or when it is done"
            yield Hit(command.line, shown(command.text), rule, "requeue on exit code 75 only, and stop at a SLURM_RESTART_COUNT")
            return


def signal_traps(batch: Batch) -> Iterator[Hit]:
    """B: sends the signal to the batch shell alone, which dies of it unless it has a trap."""
    option, found = batch.option("signal"), _signal(batch)
    if option is None or found is None or "B" not in found[0]:
        return
    name = found[1]
    traps = [command for command in batch.commands if command_name(command) == "trap"]
    if not any(re.search(rf"\b(?:SIG)?{name}\b", " ".join(word.text for word in command.words[2:])) for command in traps):
        rule = f"B: sends {name} to the batch shell alone; without a trap it ends the script, and the ranks see nothing of it"
        yield Hit(option.line, option.written, rule, f"leave B: out, so that srun's tasks get {name}, or add `trap ... {name}`")
        return
    waits = [srun for srun in batch.sruns if srun.command.after != "&"]
    if waits:
        rule = f"bash runs the trap for {name} only when the srun in the foreground has ended"
        yield Hit(waits[0].command.line, "srun in the foreground", rule, "write `srun ... &` and `wait $!`")


def signal_and_torchrun(batch: Batch) -> Iterator[Hit]:
    """torchrun ends its ranks on a signal without letting them save."""
    option, found = batch.option("signal"), _signal(batch)
    by_torchrun = any(TORCHRUN.search(text) for _, text in batch.launches)
    if option is not None and found is not None and "B" not in found[0] and by_torchrun:
        rule = "the signal goes to torchrun, which ends its ranks before they can save"
        yield Hit(option.line, option.written, rule, "start one srun task a GPU without torchrun")


def signal_without_requeue(batch: Batch) -> Iterator[Hit]:
    """A signal before the limit is for saving; nothing then goes on."""
    option = batch.option("signal")
    if option is not None and batch.option("requeue", "array", "dependency") is None and not batch.mentions(r"requeue|\bsbatch\b"):
        cure = "add #SBATCH --requeue, and `scontrol requeue` where it exits 75"
        yield Hit(option.line, option.written, "the run saves before the limit, and nothing starts it again", cure)


def signal_time(batch: Batch) -> Iterator[Hit]:
    """Texts that sbatch refuses, and a signal that comes when the job begins."""
    option, found = batch.option("signal"), _signal(batch)
    if option is None:
        return
    if found is None:
        yield Hit(option.line, shown(option.written), "is no signal", "write --signal=USR1@180")
        return
    limit = batch.option("time")
    try:
        seconds = seconds_of(limit.value or "") if limit is not None else None
    except ValueError:
        return
    if seconds is not None and found[2] >= seconds:
        rule = f"the limit is {seconds} s, so the signal comes as the job begins"
        yield Hit(option.line, option.written, rule, "give fewer seconds, or more --time")


def _signal(batch: Batch) -> tuple[str, str, int] | None:
    """(flags, name, seconds before the limit); None where there is none that sbatch takes."""
    option = batch.option("signal")
    match = _SIGNAL.fullmatch(option.value or "") if option is not None else None
    if match is None or not (match[2].isdecimal() or match[2].upper() in (*_NAMES.values(), "URG", "TSTP", "KILL", "STOP", "XCPU")):
        return None
    name = _NAMES.get(int(match[2]), match[2]) if match[2].isdecimal() else match[2].upper()
    return (match[1] or "").upper(), name, int(match[3] or 60)


RULES = (
    Rule("time-format", "error", "a --time that sbatch cannot read", time_format),
    Rule("time-units", "warning", "`--time=20` (minutes) and `--time=20:00` (minutes and seconds)", time_units),
    Rule("no-time", "warning", "no --time", no_time),
    Rule("memory", "error", "a --mem that sbatch cannot read, or two kinds of it", memory),
    Rule("memory-units", "warning", "`--mem=64` (megabytes)", memory_units),
    Rule("exclusive-memory", "warning", "--exclusive without --mem, which leaves most memory unused", exclusive_memory),
    Rule("gpus-twice", "error", "GPUs asked for in two ways", gpus_twice),
    Rule("no-cpus", "warning", "GPUs, and one CPU a task", cpus),
    Rule("no-threads", "warning", "several ranks a node without OMP_NUM_THREADS", threads),
    Rule("output-folder", "warning", "a log in a folder that does not exist", output_folder),
    Rule("log-overwritten", "warning", "a log without the job's number in its name", log_overwritten),
    Rule("requeue-log", "warning", "requeue without --open-mode=append", requeue_truncates),
    Rule("requeue-resume", "error", "requeue of a command that does not resume", requeue_without_resume),
    Rule("requeue-loop", "warning", "a job that requeues itself whatever happened", requeue_loop),
    Rule("signal-trap", "error", "--signal=B:... without a trap, or with one that cannot run", signal_traps),
    Rule("signal-torchrun", "warning", "--signal to torchrun, which does not pass it on", signal_and_torchrun),
    Rule("signal-requeue", "warning", "--signal and nothing that starts the job again", signal_without_requeue),
    Rule("signal-format", "error", "a --signal that sbatch refuses, or that comes at once", signal_time),
)
