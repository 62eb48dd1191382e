"""What only shows when nodes are seen together: one that differs, one that is missing, clocks apart, a folder that is not shared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megactl.machine.agreement import disagreement
from megactl.machine.check import Check, NodeReport
from megactl.machine.gather import Gathered, Place

_GROUP = "nodes"
_CLOCKS_APART = 1.0
_ABSENT = "nothing"
_SHOWN = 8


def node_checks(place: Place, gathered: Gathered, *, seconds: float) -> Iterator[Check]:
    """Checks over the reports of a step's nodes; `seconds` is how long they were waited for."""
    missing = [place.names[number] for number in range(place.nodes) if number not in gathered.reports]
    text = f"{len(gathered.reports)} of {place.nodes} answered"
    if missing:
        value, cure = (
            f"{text}; not {_names(missing)} within {seconds:.0f} s",
            "look at that node's output above, then at the node: scontrol show node NAME",
        )
        yield Check(_GROUP, "answers", value, "problem", cure)
    else:
        yield Check(_GROUP, "answers", text)
    yield from _differences([gathered.reports[number] for number in sorted(gathered.reports)])
    apart = {place.names[number]: ahead for number, ahead in gathered.clocks.items() if abs(ahead) > _CLOCKS_APART}
    if apart:
        text = ", ".join(f"{name} by {ahead:+.1f} s" for name, ahead in apart.items())
        yield Check(_GROUP, "clocks", f"differ from {place.name}'s: {text}", "warning", "start a time service on every node: chronyd")
    if gathered.apart:
        value = f"{_names([place.names[number] for number in gathered.apart])} has another folder of that name than {place.name}"
        yield Check(_GROUP, "run directory", value, "problem", "choose a --run-dir on a file system that all nodes share")


def _differences(reports: Sequence[NodeReport]) -> Iterator[Check]:
    """A check for each thing in which a node differs from most others, naming the node and both values."""
    kinds = {(check.group, check.name): check.alike for report in reports for check in report.checks if check.alike is not None}
    found = [{(check.group, check.name): check.compared for check in report.checks} for report in reports]
    for kind, status in kinds.items():
        values = [checks.get(kind, _ABSENT) for checks in found]
        difference = disagreement(values)
        if difference is None:
            continue
        odd = _names([f"{reports[index].node} has {values[index]}" for index in difference.odd])
        text = f"{odd}; {difference.count} of {len(reports)} nodes have {difference.common}"
        yield Check(_GROUP, kind[1], text, status, "make the nodes alike, or leave the odd one out: --exclude of srun and sbatch")


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
