"""`megactl slurm submit`: lint, ask Slurm with --test-only, then sbatch."""

from __future__ import annotations

import dataclasses
import os
from typing import Annotated

import typer

from megactl.cluster.submit import Submission, find_sbatch, overriding, scripts_in
from megactl.cluster.submit import submit as hand_over
from megactl.cluster.submit import test as ask
from megactl.commands.common import emit_json, printable, say
from megactl.commands.slurm_lint import lint_files, show_findings
from megactl.errors import ConfigError, MegactlError, Problem, RunError


def submit(
    files: Annotated[list[str] | None, typer.Argument(metavar="FILE...", help="Batch scripts.")] = None,
    experiment: Annotated[
        list[str] | None, typer.Option("--experiment", metavar="FOLDER", help="Every batch script of a folder; repeatable.")
    ] = None,
    dependency: Annotated[str | None, typer.Option("--dependency", metavar="afterok:JOB", help="When the jobs may start.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Lint and ask Slurm, but submit nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Submit although lint found errors.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Submit batch scripts: first lint, then sbatch --test-only, then sbatch.

    Nothing is submitted unless all scripts pass both. Prints each job's number and where its log will be.

    Examples:

      megactl slurm submit train.sh

      megactl slurm submit train.sh --dependency afterok:81234

      megactl slurm submit --experiment figure_13 --dry-run

      megactl slurm submit *.sbatch --json | jq -r '.jobs[].job_id'
    """
    scripts = _scripts(files or [], experiment or [], dependency)
    environ = dict(os.environ)
    find_sbatch(environ)
    _refuse_errors(scripts, force=force)
    arguments = [f"--dependency={dependency}"] if dependency else []
    for name in overriding(environ):
        say(f"{name}={printable(environ[name])} in your environment counts more than the script's own directive", label="warning")
    starts = _ask_all(scripts, arguments, environ)
    jobs: list[Submission] = []
    failed: RunError | None = None
    for script in scripts:
        later = starts[script]
        try:
            jobs.append(Submission(script, None, None, None, later) if dry_run else hand_over(script, arguments, environ, starts=later))
        except RunError as error:
            failed = error
            break
        if not json_:
            _show(jobs[-1])
    if failed is not None:
        say(failed.message, label="error")
        say(failed.hint or "", label="hint")
        say(f"{len(jobs)} of {len(scripts)} scripts were submitted, {len(scripts) - len(jobs)} not", label="warning")
    if json_:
        # What was submitted must be known also where a later script failed, so the error is part of the one document.
        error = {"error": {"message": failed.message, "hint": failed.hint}} if failed is not None else {}
        emit_json({"dry_run": dry_run, "jobs": [dataclasses.asdict(job) for job in jobs], **error})
    return 1 if failed is not None else 0


def _scripts(files: list[str], folders: list[str], dependency: str | None) -> list[str]:
    problems = []
    if not files and not folders:
        problems.append(Problem("no script is given", "submit needs at least one", "name batch scripts, or --experiment FOLDER"))
    if dependency is not None and (not dependency.strip() or not dependency.isprintable()):
        problems.append(Problem(f"--dependency {dependency!r}", "is no dependency", "write afterok:JOB, or singleton"))
    problems += [Problem(file, "is a folder", f"use --experiment {file}") for file in files if os.path.isdir(file)]
    if problems:
        raise ConfigError(problems)
    return list(dict.fromkeys([*files, *(script for folder in folders for script in scripts_in(folder))]))


def _refuse_errors(scripts: list[str], *, force: bool) -> None:
    results, failed = lint_files(scripts, [])
    if failed:
        raise failed[0] if len(failed) == 1 else ConfigError([Problem("", error.message, error.hint) for error in failed])
    errors = 0
    for name, findings in results.items():
        show_findings(name, findings, to_stderr=True)
        errors += sum(item.severity == "error" for item in findings)
    if errors and not force:
        error = MegactlError(f"lint found {errors} error{'s' * (errors != 1)}, and nothing was submitted", "correct them, or add --force")
        error.exit_code = 1
        raise error


def _ask_all(scripts: list[str], arguments: list[str], environ: dict[str, str]) -> dict[str, str | None]:
    """When each would start. Raises RunError with every script that Slurm refuses."""
    starts: dict[str, str | None] = {}
    refused: list[RunError] = []
    for script in scripts:
        try:
            starts[script] = ask(script, arguments, environ)
        except RunError as error:
            refused.append(error)
    if len(refused) == 1:
        raise refused[0]
    if refused:
        raise RunError("\n".join(error.message for error in refused), refused[0].hint)
    return starts


def _show(job: Submission) -> None:
    name = printable(job.file)
    if job.job_id is None:
        print(f"{name}: Slurm would take it{f' and start it at {job.starts}' if job.starts else ''}; not submitted (--dry-run)")
        return
    where = f" on {job.cluster}" if job.cluster else ""
    print(f"{name}: job {job.job_id}{where}; log: {printable(job.log or 'where --output says')}", flush=True)
