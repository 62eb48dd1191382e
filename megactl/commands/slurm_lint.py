"""`megactl slurm lint`: known traps of batch scripts, found without running anything."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megactl.commands.common import emit_json, printable, say, wants_colour
from megactl.config.names import nearest
from megactl.errors import ConfigError, MegactlError, Problem

if TYPE_CHECKING:
    from megactl.cluster.lint import Finding


def lint(
    files: Annotated[list[str] | None, typer.Argument(metavar="FILE...", help="Batch scripts; - reads stdin.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 for warnings too.")] = False,
    ignore: Annotated[list[str] | None, typer.Option("--ignore", metavar="RULE", help="Leave a rule out; repeatable.")] = None,
    rules: Annotated[bool, typer.Option("--rules", help="List the rules instead.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Find known traps in batch scripts. The scripts are read, never run, and no Slurm is needed.

    A finding says where, what, why and what to write instead. Exit codes: 0 no errors, 1 errors (with --strict also warnings) or an
    unreadable file, 2 a wrong request.

    Examples:

      megactl slurm lint train.sh

      megactl slurm lint jobs/*.sbatch --strict --ignore fixed-port

      ssh cluster cat train.sh | megactl slurm lint -

      megactl slurm lint train.sh --json | jq '.files[].findings[] | select(.severity == "error")'
    """
    if rules:
        return _list_rules(json_)
    if not files:
        raise MegactlError("no file is given", "name batch scripts, or - for stdin")
    results, failed = lint_files(files, check_ignored(ignore or []))
    if json_:
        emit_json(_document(results, failed))
    else:
        for name, findings in results.items():
            show_findings(name, findings)
        for error in failed:
            say(error.message, label="error")
            say(error.hint or "", label="hint")
        say(_summary(results))
    errors, warnings = (_count(results, severity) for severity in ("error", "warning"))
    return 1 if failed or errors or (strict and warnings) else 0


def check_ignored(names: list[str]) -> list[str]:
    """The rules that --ignore names, commas allowed. Raises ConfigError for names that no rule has."""
    from megactl.cluster.lint import RULES

    known = [rule.id for rule in RULES]
    given = [name.strip() for item in names for name in item.split(",") if name.strip()]
    wrong = [name for name in given if name not in known]
    if wrong:
        hints = {name: nearest(name, known) for name in wrong}
        instead = {name: f"did you mean {close}?" if close else "`megactl slurm lint --rules` lists them" for name, close in hints.items()}
        raise ConfigError([Problem(f"--ignore {name}", "is no rule", instead[name]) for name in wrong])
    return given


def lint_files(names: list[str], ignore: list[str]) -> tuple[dict[str, list[Finding]], list[MegactlError]]:
    """(findings of each readable file, what went wrong with the others)."""
    # Here and not above: the rules take longer to load than all the other slurm commands need together.
    from megactl.cluster.lint import lint_text
    from megactl.cluster.lint.sources import read_source

    results: dict[str, list[Finding]] = {}
    failed: list[MegactlError] = []
    for name in names:
        try:
            results[name] = lint_text(read_source(name), folder=Path.cwd(), ignore=ignore)
        except MegactlError as error:
            failed.append(error)
    return results, failed


def show_findings(name: str, findings: list[Finding], *, to_stderr: bool = False) -> None:
    """A line a finding, as compilers print them, so that editors find the place."""
    stream = sys.stderr if to_stderr else sys.stdout
    colour = wants_colour(stream)
    for item in findings:
        severity = f"\x1b[{'1;31' if item.severity == 'error' else '1;33'}m{item.severity}\x1b[0m" if colour else item.severity
        print(f"{printable(name)}:{item.line}: {severity}: {printable(str(item))} [{item.rule}]", file=stream)


def _document(results: dict[str, list[Finding]], failed: list[MegactlError]) -> dict[str, Any]:
    files = [{"file": name, "findings": [dataclasses.asdict(item) for item in findings]} for name, findings in results.items()]
    return {
        "files": files,
        "errors": _count(results, "error"),
        "warnings": _count(results, "warning"),
        "unreadable": [{"message": error.message, "hint": error.hint} for error in failed],
    }


def _count(results: dict[str, list[Finding]], severity: str) -> int:
    return sum(item.severity == severity for findings in results.values() for item in findings)


def _summary(results: dict[str, list[Finding]]) -> str:
    numbers = [(_count(results, severity), severity) for severity in ("error", "warning")]
    found = ", ".join(f"{number} {severity}{'s' * (number != 1)}" for number, severity in numbers if number) or "nothing found"
    return f"{found} in {len(results)} file{'s' * (len(results) != 1)}"


def _list_rules(json_: bool) -> int:
    from megactl.cluster.lint import RULES

    if json_:
        emit_json([{"rule": rule.id, "severity": rule.severity, "summary": rule.summary} for rule in RULES])
        return 0
    from megactl.commands.tables import show_table

    show_table(("rule", "severity", "finds"), [(rule.id, rule.severity, rule.summary) for rule in RULES])
    return 0
