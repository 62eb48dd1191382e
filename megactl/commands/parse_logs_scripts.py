"""The options of `megactl parse-logs` that change scripts: shown first, written down, taken back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megactl.commands.common import emit_json, printable, say
from megactl.errors import ConfigError, Problem
from megactl.storage.file_changes import Change, Rename, apply, check, undo

if TYPE_CHECKING:
    from megactl.cluster.scripts import Plan


@dataclass(frozen=True)
class Wanted:
    """The options as given."""

    rename_by: str | None
    set_job_name: bool
    set_time: str | None
    dry_run: bool
    undo_file: Path | None
    undo: Path | None

    @property
    def actions(self) -> list[str]:
        """The options that say what to change."""
        named = {
            "--rename-by": self.rename_by,
            "--set-job-name": self.set_job_name or None,
            "--set-time": self.set_time,
            "--undo": self.undo,
        }
        return [flag for flag, value in named.items() if value is not None]

    @property
    def any(self) -> bool:
        """Whether scripts are to be changed at all."""
        return bool(self.actions)


def left_over(wanted: Wanted) -> list[Problem]:
    """Options that belong to a change where no change is asked for."""
    instead = "add --rename-by gas, --set-job-name or --set-time TIME, or leave it out"
    given = {"--dry-run": wanted.dry_run, "--undo-file": wanted.undo_file is not None}
    return [Problem(flag, "is for changes of scripts", instead) for flag, is_given in given.items() if is_given]


def change_scripts(wanted: Wanted, files: Sequence[str], others: Sequence[str], *, as_json: bool) -> int:
    """Carry out one change of scripts, or undo one. `others` are flags that have no meaning beside it. Raises ConfigError."""
    problems = [
        Problem(flag, f"is for reading logs, and {wanted.actions[0]} changes scripts", "leave one of the two out") for flag in others
    ]
    if len(wanted.actions) > 1:
        problems.append(Problem(" ".join(wanted.actions), "are several changes", "make one after the other"))
    if wanted.rename_by not in (None, "gas"):
        problems.append(Problem(f"--rename-by {wanted.rename_by}", "is not known", "use gas"))
    if wanted.undo is not None and (files or wanted.undo_file or wanted.dry_run):
        problems.append(Problem("--undo", "takes its undo file and nothing else", "leave the other options and files out"))
    if wanted.undo is None and not files:
        problems.append(Problem("FILE...", "is missing", "name the scripts"))
    if problems:
        raise ConfigError(problems)
    if wanted.undo is not None:
        return _undo(wanted.undo, as_json=as_json)
    plan = _plan(wanted, files)
    problems = plan.problems + check(plan.changes)
    if problems:
        raise ConfigError(problems)
    return _carry_out(plan, wanted, as_json=as_json)


def _plan(wanted: Wanted, files: Sequence[str]) -> Plan:
    from megactl.cluster import scripts

    paths = [Path(name) for name in files]
    if wanted.rename_by is not None:
        return scripts.rename_by_steps(paths)
    return scripts.job_name_from_file(paths) if wanted.set_job_name else scripts.set_time(paths, wanted.set_time or "")


def _carry_out(plan: Plan, wanted: Wanted, *, as_json: bool) -> int:
    for note in plan.notes:
        say(printable(note), label="note")
    journal = None
    if plan.changes and not wanted.dry_run:
        journal = wanted.undo_file or _new_journal()
        apply(plan.changes, journal)
    if as_json:
        emit_json({"changed": not wanted.dry_run, "changes": [_document(item) for item in plan.changes], "undo_file": journal})
        return 0
    for change in plan.changes:
        print("\n".join(_shown(change)))
    if not plan.changes:
        say("nothing to change")
    elif journal is None:
        say(f"{len(plan.changes)} files would change; without --dry-run they do")
    else:
        say(f"{len(plan.changes)} files changed; take it back with: megactl parse-logs --undo {journal}")
    return 0


def _new_journal() -> Path:
    """A name for the undo file in the current folder; two changes in one second get two."""
    stem = f"megactl-undo-{datetime.now():%Y%m%d-%H%M%S}"
    number = 1
    while (path := Path(f"{stem}{f'-{number}' if number > 1 else ''}.json")).exists():
        number += 1
    return path


def _undo(journal: Path, *, as_json: bool) -> int:
    changes = undo(journal)
    if as_json:
        emit_json({"changed": bool(changes), "changes": [_document(item) for item in changes], "undo_file": None})
        return 0
    for change in changes:
        print("\n".join(_shown(change)))
    say(f"{len(changes)} changes taken back" if changes else "nothing to take back: it is as it was before")
    return 0


def _lines(change: Change) -> list[tuple[int, str, str]]:
    """(number, old, new) of the lines that a rewrite changes."""
    before, after = ([line.rstrip("\r") for line in data.decode("utf-8", "replace").split("\n")] for data in (change.before, change.after))
    return [(number, old, new) for number, (old, new) in enumerate(zip(before, after, strict=False), start=1) if old != new]


def _document(change: Change) -> dict[str, Any]:
    if isinstance(change, Rename):
        return {"rename": str(change.source), "to": str(change.target)}
    return {"edit": str(change.path), "lines": [{"line": number, "old": old, "new": new} for number, old, new in _lines(change)]}


def _shown(change: Change) -> list[str]:
    if isinstance(change, Rename):
        return [printable(f"{change.source} -> {os.path.basename(change.target)}")]
    edits = [[f"  {number}: - {old}", f"  {number}: + {new}"] for number, old, new in _lines(change)]
    return [printable(str(change.path)), *(printable(line) for pair in edits for line in pair)]
