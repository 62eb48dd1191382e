"""Small changes to many Slurm scripts at once: names that carry the accumulation steps, job names, time limits. Plans only."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megactl.cluster.formats import seconds_of
from megactl.errors import Problem
from megactl.storage.file_changes import Change, Rename, Rewrite

_STEPS = re.compile(
    rb"^[ \t]*(?:export[ \t]+)?(?:PP_CHUNKS|GAS|GRAD_ACC_STEPS|GRADIENT_ACCUMULATION_STEPS)=[\"']?(\d{1,9})[\"']?[ \t]*(?:[;#\r].*)?$",
    re.MULTILINE,
)
_BEHIND = re.compile(r"dp-?(\d+)(?!\d)")
_NAMED = re.compile(r"-gas-?(\d+)(?!\d)")
_VALUE = rb"(\"[^\"\r\n]*\"|'[^'\r\n]*'|[^\s#\"'][^\s]*)"
_OPTION = rb"^(#SBATCH[ \t]+(?:[^\r\n#]*?[ \t])?(?:--%s(?:=|[ \t]+)|-%s[ \t]*))" + _VALUE
# What may follow a script's name in its own name and in those of its logs: an ending, or a job's number and an ending.
_SIBLING = re.compile(r"(?:[-_]\d+)*\..+")
_ENDINGS = (".sh", ".slurm", ".sbatch")
# What sbatch takes as a name without quotes, and what no shell reads as more than a word.
_PLAIN = re.compile(r"[\w.,:+=@%-]+", re.ASCII)


@dataclass
class Plan:
    """What would be done. `notes` say of a file why it is left alone; a plan with `problems` is not carried out."""

    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def rename_by_steps(scripts: Sequence[Path]) -> Plan:
    """Names that carry the gradient accumulation steps: `...-dp-1.sh` becomes `...-dp-1-gas-128.sh`, and its logs with it.

    The number is the one the script assigns to PP_CHUNKS or GAS. Its logs are the files beside it that have its name up to the ending,
    then a job's number or nothing, then any ending.
    """
    plan = Plan()
    for script, content in _contents(scripts, plan):
        steps = {int(value) for value in _STEPS.findall(content)}
        if len(steps) > 1:
            values = ", ".join(map(str, sorted(steps)))
            plan.problems.append(Problem(str(script), f"sets PP_CHUNKS or GAS to more than one value ({values})", "rename it by hand"))
        elif not steps:
            plan.notes.append(f"{script}: no line PP_CHUNKS=NUMBER or GAS=NUMBER, left alone")
        else:
            _rename_one(script, steps.pop(), plan)
    # `x.sh` and `x.slurm` of one run share their logs.
    plan.changes = list(dict.fromkeys(plan.changes))
    return plan


def _rename_one(script: Path, steps: int, plan: Plan) -> None:
    stem = _stem(script)
    named, behind = _NAMED.search(stem), _BEHIND.search(stem)
    if named is not None:
        if int(named[1]) != steps:
            rule = f"is named after {named[1]} steps and sets {steps}"
            plan.problems.append(Problem(str(script), rule, "correct the script or its name by hand"))
        else:
            plan.notes.append(f"{script}: carries its steps already, left alone")
    elif behind is None:
        plan.problems.append(Problem(str(script), "has no dp-N in its name to put -gas-N behind", "rename it by hand"))
    else:
        new = f"{stem[: behind.end()]}-gas-{steps}{stem[behind.end() :]}"
        for name in sorted(os.listdir(script.parent or ".")):
            rest = name[len(stem) :]
            if name.startswith(stem) and _SIBLING.fullmatch(rest):
                plan.changes.append(Rename(script.with_name(name), script.with_name(new + rest)))


def job_name_from_file(scripts: Sequence[Path]) -> Plan:
    """`#SBATCH --job-name` set to the script's own name, so that a log carries the name of its script."""
    return _set_option(scripts, b"job-name", b"J", _stem)


def set_time(scripts: Sequence[Path], limit: str) -> Plan:
    """`#SBATCH --time` set to `limit`, in one of Slurm's forms."""
    try:
        usable = seconds_of(limit) != 0
    except ValueError:
        usable = False
    if not usable:
        forms = "MINUTES, MIN:SEC, HOURS:MIN:SEC, DAYS-HOURS[:MIN[:SEC]] or UNLIMITED"
        return Plan(problems=[Problem(f"--set-time {limit!r}", "is not a time that Slurm reads", f"give {forms}")])
    return _set_option(scripts, b"time", b"t", lambda script: limit)


def _set_option(scripts: Sequence[Path], long: bytes, short: bytes, value_of: Callable[[Path], str]) -> Plan:
    plan, pattern = Plan(), re.compile(_OPTION % (long, short), re.MULTILINE)
    for script, content in _contents(scripts, plan):
        value = value_of(script)
        if not _PLAIN.fullmatch(value):
            rule = f"{value!r} cannot stand in an #SBATCH line"
            plan.problems.append(Problem(str(script), rule, "rename the file to letters, digits, - and _"))
            continue
        changed = pattern.sub(partial(_with_value, value.encode()), content)
        if not pattern.search(content):
            plan.notes.append(f"{script}: no line #SBATCH --{long.decode()}=..., left alone")
        elif changed == content:
            plan.notes.append(f"{script}: says --{long.decode()}={value} already, left alone")
        else:
            plan.changes.append(Rewrite(script, content, changed))
    return plan


def _with_value(value: bytes, match: re.Match[bytes]) -> bytes:
    return match[1] + value


def _contents(scripts: Sequence[Path], plan: Plan) -> list[tuple[Path, bytes]]:
    """Each script once, with its bytes; what cannot be read, or is no text, is a problem."""
    found = []
    for script in dict.fromkeys(scripts):
        try:
            content = script.read_bytes()
        except OSError as error:
            plan.problems.append(Problem(str(script), f"cannot be read ({error.strerror})", "correct the name, or leave it out"))
            continue
        if b"\0" in content:
            plan.problems.append(Problem(str(script), "is not a text file", "give scripts"))
        else:
            found.append((script, content))
    return found


def _stem(script: Path) -> str:
    return next((script.name[: -len(ending)] for ending in _ENDINGS if script.name.endswith(ending)), script.name)
