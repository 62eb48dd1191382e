"""`megactl doctor`: whether this machine, or every node of a Slurm step, is fit to train."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megactl.commands.common import emit_json, printable, wants_colour

if TYPE_CHECKING:
    from megactl.machine.check import Check, NodeReport

_COLOURS = {"ok": "32", "warning": "1;33", "problem": "1;31"}


def doctor(
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", metavar="DIR", help="Where the run will write (default: look at the current folder).")
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=1, help="How long other nodes may take to answer; torch half of it.")
    ] = 120.0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Look at versions, compiled modules, GPUs and driver, memory, disk, limits, network and variables, and say what to mend.

    A problem would break a run: exit code 1. A warning costs speed, or breaks some runs. Under srun (one task a node, or one a GPU) every
    node looks at itself, and the first one says which node differs, and which did not answer.

    Examples:

      megactl doctor

      megactl doctor --run-dir runs/gpt --json | jq '.nodes[].checks[] | select(.status != "ok")'

      srun --nodes 4 --ntasks-per-node 1 megactl doctor --run-dir /shared/runs/gpt
    """
    import os

    from megactl.machine.check import worst
    from megactl.machine.examine import examine
    from megactl.machine.gather import Collector, place_of, tell
    from megactl.machine.nodes import node_checks
    from megactl.machine.system import System

    system, place = System(), place_of(os.environ)
    alone = place is None or place.nodes == 1
    if place is not None and place.task > 0 and (alone or place.local_task > 0):
        # Another task of this node looks at it.
        return 0
    name, nodes = (os.uname().nodename, 1) if place is None else (place.name, place.nodes)
    if place is not None and place.task > 0:
        tell(place, examine(system, name, nodes=nodes, run_dir=run_dir, seconds=timeout / 2), run_dir, timeout)
        return 0
    collector = None if place is None or alone else Collector(place, run_dir)
    own = examine(system, name, nodes=nodes, run_dir=run_dir, seconds=timeout / 2)
    if collector is None or place is None:
        reports, together = [own], []
    else:
        gathered = collector.gather(own, timeout)
        reports = [gathered.reports[number] for number in sorted(gathered.reports)]
        together = [*node_checks(place, gathered, seconds=timeout)]
    status = worst([*together, *(check for report in reports for check in report.checks)])
    if json_:
        emit_json({"status": status, "nodes": [report.as_dict() for report in reports], "together": [vars(check) for check in together]})
    else:
        _print(reports, together)
    return int(status == "problem")


def _print(reports: Sequence[NodeReport], together: Sequence[Check]) -> None:
    """The first node in full, of the others what is not ok and not the first one's too, what shows in all of them together, a count."""
    for number, report in enumerate(reports):
        shown = [check for check in report.checks if number == 0 or (check.status != "ok" and check not in reports[0].checks)]
        if shown:
            typer.echo(report.node)
            _print_checks(shown)
    if together:
        typer.echo("all nodes")
        _print_checks(together)
    every = [*together, *(check for report in reports for check in report.checks)]
    counts = {status: sum(check.status == status for check in every) for status in ("problem", "warning")}
    words = [f"{number} {status}{'s' if number != 1 else ''}" for status, number in counts.items() if number]
    where = f" on {len(reports)} nodes" if len(reports) > 1 else ""
    typer.echo((", ".join(words) if words else "everything is fine") + where)


def _print_checks(checks: Iterable[Check]) -> None:
    import sys

    group, colour = None, wants_colour(sys.stdout)
    for check in checks:
        if check.group != group:
            group = check.group
            typer.echo(f"  {group}")
        status = f"{check.status:8}"
        mark = f"\x1b[{_COLOURS[check.status]}m{status}\x1b[0m" if colour else status
        typer.echo(f"    {mark} {check.name:22} {printable(check.value)}")
        if check.cure is not None:
            typer.echo(f"{'':13} {'':22} -> {printable(check.cure)}")
