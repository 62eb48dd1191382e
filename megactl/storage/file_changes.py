"""Renaming and editing many files so that it can be taken back: checked whole, written down first, never over another file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megactl.errors import ConfigError, DataError, Problem, RunError
from megactl.storage import durable

FORMAT = "megactl-undo"
VERSION = 1


@dataclass(frozen=True)
class Rename:
    """A file gets another name."""

    source: Path
    target: Path


@dataclass(frozen=True)
class Rewrite:
    """A file gets another content. Both are its whole bytes."""

    path: Path
    before: bytes
    after: bytes


Change = Rename | Rewrite


def check(changes: Sequence[Change]) -> list[Problem]:
    """What forbids these changes: a new name that is taken, two files that would get one name, a file that is gone or not the one read."""
    problems, taken = [], {}
    sources = {change.source for change in changes if isinstance(change, Rename)}
    for change in changes:
        if isinstance(change, Rewrite):
            problems += _rewrite_problem(change)
            continue
        other = taken.setdefault(change.target, change.source)
        if other != change.source:
            problems.append(Problem(str(change.source), f"would get the name of {other}: {change.target.name}", "rename one of them first"))
        elif os.path.lexists(change.target):
            hint = "run it again once that one is renamed" if change.target in sources else "move that file away first"
            problems.append(Problem(str(change.source), f"would become {change.target.name}, which exists", hint))
        if not os.path.lexists(change.source):
            problems.append(Problem(str(change.source), "is gone", "run the command again"))
    return problems


def _rewrite_problem(change: Rewrite) -> list[Problem]:
    try:
        same = change.path.read_bytes() == change.before
    except OSError as error:
        return [Problem(str(change.path), f"cannot be read ({error.strerror})", "restore the file, or leave it out")]
    return [] if same else [Problem(str(change.path), "was changed meanwhile", "run the command again")]


def apply(changes: Sequence[Change], journal: Path) -> None:
    """Write `journal`, then make the changes. Raises ConfigError, with nothing changed, where `check` finds something.

    A failure in the middle (a full disk) is a RunError that names the journal; `undo` then takes back what was done.
    """
    problems = check(changes)
    if os.path.lexists(journal):
        problems.append(Problem(str(journal), "exists, and an undo file is never overwritten", "name another with --undo-file"))
    if problems:
        raise ConfigError(problems)
    document = {"format": FORMAT, "version": VERSION, "made_at": datetime.now(UTC).isoformat(timespec="seconds")}
    text = json.dumps({**document, "changes": [_described(change) for change in changes]}, indent=1)
    try:
        durable.write_file(journal, text.encode())
        durable.sync_folder(journal.absolute().parent)
    except OSError as error:
        raise ConfigError([Problem(str(journal), f"cannot be written ({error.strerror})", "name another with --undo-file")]) from error
    for number, change in enumerate(changes):
        try:
            _make(change)
        except OSError as error:
            where = change.source if isinstance(change, Rename) else change.path
            done = f"{number} of {len(changes)} changes were made"
            raise RunError(f"{where}: {error.strerror}; {done}", f"take them back with --undo {journal}") from error


def _make(change: Change) -> None:
    if isinstance(change, Rewrite):
        durable.write_output(change.path, change.after)
        return
    # The name is taken first, as an empty file that only we can have made: rename alone would silently replace a file that came since.
    os.close(durable.create(change.target))
    try:
        os.rename(change.source, change.target)
    except OSError:
        change.target.unlink()
        raise
    durable.sync_folder(change.target.parent)


def _described(change: Change) -> dict[str, Any]:
    if isinstance(change, Rename):
        return {"rename": str(change.source.absolute()), "to": str(change.target.absolute())}
    # Bytes that are no UTF-8 survive as lone surrogates, which JSON can hold.
    before = change.before.decode("utf-8", "surrogateescape")
    return {"rewrite": str(change.path.absolute()), "before": before, "after_sha256": hashlib.sha256(change.after).hexdigest()}


def undo(journal: Path) -> list[Change]:
    """Take back what `journal` records, last first; what was never done, or is undone already, is passed over.

    Returns the changes made. Raises DataError for a file that is no journal and ConfigError, with nothing changed, where a file was
    changed since or a name is taken.
    """
    problems: list[Problem] = []
    changes: list[Change] = []
    for entry in reversed(_read(journal)):
        try:
            change = _reversed(entry)
        except OSError as error:
            problems.append(Problem(str(error.filename), f"cannot be read ({error.strerror})", "restore it, then undo again"))
            continue
        if isinstance(change, Problem):
            problems.append(change)
        elif change is not None:
            changes.append(change)
    problems = problems or check(changes)
    if problems:
        raise ConfigError(problems)
    for number, change in enumerate(changes):
        try:
            _make(change)
        except OSError as error:
            done = f"{number} of {len(changes)} changes were taken back"
            raise RunError(f"{journal}: {error.strerror}; {done}", "undo again once that is cured") from error
    return changes


def _read(journal: Path) -> list[dict[str, Any]]:
    try:
        document = json.loads(journal.read_bytes())
        if document["format"] != FORMAT or document["version"] != VERSION:
            raise ValueError(document["format"])
        for entry in document["changes"]:
            names = ("rename", "to") if "rename" in entry else ("rewrite", "before", "after_sha256")
            if not all(isinstance(entry[name], str) for name in names):
                raise TypeError
        return document["changes"]
    except OSError as error:
        raise DataError(f"{journal}: cannot be read ({error.strerror})", "give the undo file that the command named") from error
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{journal}: is not an undo file of megactl", "give the undo file that the command named") from error


def _reversed(entry: dict[str, Any]) -> Change | Problem | None:
    """The change that takes back an entry, None where there is nothing to take back, a Problem where it cannot be."""
    if "rename" in entry:
        source, target = Path(entry["rename"]), Path(entry["to"])
        if os.path.lexists(target):
            return Rename(target, source)
        return None if os.path.lexists(source) else Problem(str(target), "is gone", "restore it, then undo again")
    path, before = Path(entry["rewrite"]), entry["before"].encode("utf-8", "surrogateescape")
    now = path.read_bytes()
    if now == before:
        return None
    if hashlib.sha256(now).hexdigest() != entry["after_sha256"]:
        return Problem(str(path), "was changed since", "undo that by hand, or move the file away")
    return Rewrite(path, now, before)
