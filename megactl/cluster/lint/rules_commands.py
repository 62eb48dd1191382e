"""Rules on srun and on what becomes of its exit code."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from megactl.cluster.lint.batch import TRAINS, Batch, command_name
from megactl.cluster.lint.findings import Hit, Rule
from megactl.cluster.lint.rules_ranks import tasks_of, training
from megactl.cluster.lint.syntax import Command
from megactl.cluster.quoting import shown
from megactl.cluster.slurm_options import PYXIS, letters, options
from megactl.config.names import nearest

_SRUN = re.compile(r"(?<![\w.-])srun(?![\w.-])")
_CONDITIONS = ("if", "elif", "while", "until", "!", "&&", "||")


def srun_options(batch: Batch) -> Iterator[Hit]:
    """Options that srun refuses: sbatch's own, and misspelt ones."""
    known = {**options("srun"), **dict.fromkeys(PYXIS, "value")}
    for srun in batch.sruns:
        for option in srun.options:
            name = option.name.lstrip("-")
            if option.fault == "unwanted-value":
                yield Hit(option.line, shown(option.written), "takes no value", f"write --{option.name}")
            elif option.fault == "ambiguous":
                candidates = ", ".join(f"--{item}" for item in known if item.startswith(name))
                yield Hit(option.line, option.written, f"may be {candidates}", "write it out")
            elif option.fault == "unknown" and (name in options("sbatch") or name in letters("sbatch")):
                yield Hit(option.line, option.written, "is an option of sbatch, and srun refuses it", "move it to an #SBATCH line")
            elif option.fault == "unknown" and (close := nearest(name, known)):
                yield Hit(option.line, shown(option.written), f"srun has no option {option.name}", f"did you mean --{close}?")


def kill_on_bad_exit(batch: Batch) -> Iterator[Hit]:
    """Ranks whose neighbour has died wait for it until the job's time is over."""
    if batch.mentions("SLURM_KILL_BAD_EXIT"):
        return
    for srun in training(batch):
        alone = batch.nodes == 1 and tasks_of(batch, srun) == 1
        given = srun.value("kill-on-bad-exit")
        if not alone and srun.complete and given in (None, "0"):
            rule = "does not end the step where one rank fails, and the others wait for it until the time is over"
            yield Hit(srun.command.line, "srun", rule, "add --kill-on-bad-exit=1")


def cpus_of_a_step(batch: Batch) -> Iterator[Hit]:
    """Since Slurm 22.05 a step does not take over the job's --cpus-per-task."""
    option = batch.option("cpus-per-task")
    if option is None or batch.mentions("SRUN_CPUS_PER_TASK"):
        return
    for srun in training(batch):
        if srun.complete and srun.value("cpus-per-task", "cpus-per-gpu", "threads-per-core") is None and option.value != "1":
            rule = f"does not take over {option.written} since Slurm 22.05, and gives each task one CPU"
            yield Hit(srun.command.line, "srun", rule, "add `export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK` before it")


def environment_lost(batch: Batch) -> Iterator[Hit]:
    """--export without ALL also empties the environment of srun's tasks."""
    option = batch.option("export")
    value = (option.value or "").upper() if option is not None else "ALL"
    handled = batch.mentions(r"SLURM_EXPORT_ENV") or any(srun.value("export") is not None for srun in batch.sruns)
    if option is not None and "ALL" not in value.split(",") and batch.sruns and not handled:
        rule = "holds for srun too: the tasks lose PATH and what the script has exported"
        yield Hit(option.line, shown(option.written), rule, "use --export=ALL,..., or `srun --export=ALL`")


def background(batch: Batch) -> Iterator[Hit]:
    """A job ends with its script, and with it every step."""
    if batch.mentions(r"\bwait\b"):
        return
    for command in batch.commands:
        if command.after == "&" and (_SRUN.search(command.text) or TRAINS.search(batch.fill(command.text))):
            rule = "runs in the background, and the job ends as soon as the script does"
            yield Hit(command.line, shown(f"{command.text[:40]} &"), rule, "add `wait` at the end")


def tee_hides_failure(batch: Batch) -> Iterator[Hit]:
    """A pipe's exit code is that of its last command."""
    if batch.mentions(r"\bpipefail\b|PIPESTATUS"):
        return
    for index, command in enumerate(batch.commands):
        later = batch.commands[index + 1] if index + 1 < len(batch.commands) else None
        starts = TRAINS.search(batch.fill(command.text))
        if starts and command.after in ("|", "|&") and later is not None and command_name(later) in ("tee", "ts", "grep", "sed", "awk"):
            rule = f"the exit code is {command_name(later)}'s, so a failed run counts as done"
            yield Hit(later.line, f"| {shown(later.text)}", rule, "add `set -o pipefail` at the beginning")


def _errexit(batch: Batch) -> Iterator[tuple[Command, bool]]:
    """Each command with whether `set -e` holds for it."""
    holds = re.match(r"#!.*\s-\w*e", batch.lines[0]) is not None
    for command in batch.commands:
        yield command, holds
        if command_name(command) == "set":
            for word in command.words[1:]:
                if re.match(r"[-+][a-df-z]*e", word.text) or word.text == "errexit":
                    holds = not command.text.startswith("set +")


def exit_code_lost(batch: Batch) -> Iterator[Hit]:
    """A script's exit code is that of its last command, so `echo done` makes every run a success."""
    kept, last = True, ""
    lost: list[Hit] = []
    for command, holds in reversed(list(_errexit(batch))):
        judged = holds or command.before in _CONDITIONS or command.after in ("&&", "||", "&", "|", "|&") or command.depth
        starts = batch.srun_of(command) is not None
        if starts and not judged and not kept and TRAINS.search(batch.fill(command.text)):
            rule = f"its exit code is lost: the job ends with that of `{shown(last)}`"
            lost.append(Hit(command.line, "srun", rule, "add `set -e` at the beginning, or `exit $?` behind it"))
        # Behind it the code may be asked for, or another step or an exit may end the script.
        looks = any("$?" in word.raw for word in [*command.words, *(item.value for item in command.assignments)])
        kept = starts or looks or command_name(command) in ("exit", "wait") or (kept and bool(last))
        last = last or command_name(command) or command.text
    yield from reversed(lost)


def errexit_skips(batch: Batch) -> Iterator[Hit]:
    """With `set -e` the script ends where srun fails, and what looks at its exit code is never reached."""
    commands = list(_errexit(batch))
    for (command, holds), (later, _) in itertools.pairwise(commands):
        starts = batch.srun_of(command) is not None or TRAINS.search(batch.fill(command.text))
        judged = command.before in _CONDITIONS or command.after not in ("\n", ";")
        looks = any("$?" in word.raw for word in [*later.words, *(item.value for item in later.assignments)])
        if holds and starts and not judged and looks:
            rule = "is never reached where the command before it fails: `set -e` ends the script"
            yield Hit(later.line, "$?", rule, "write `code=0; srun ... || code=$?`")


RULES = (
    Rule("srun-option", "error", "an option that srun refuses: misspelt, or sbatch's", srun_options),
    Rule("kill-on-bad-exit", "warning", "srun without --kill-on-bad-exit", kill_on_bad_exit),
    Rule("srun-cpus", "warning", "--cpus-per-task that does not reach srun", cpus_of_a_step),
    Rule("environment-lost", "warning", "--export that takes PATH from the tasks", environment_lost),
    Rule("background", "error", "a step in the background without `wait`", background),
    Rule("tee", "warning", "`| tee` without pipefail", tee_hides_failure),
    Rule("exit-code", "warning", "an exit code of training that is lost", exit_code_lost),
    Rule("errexit", "error", "`set -e` before a command that looks at `$?`", errexit_skips),
)
