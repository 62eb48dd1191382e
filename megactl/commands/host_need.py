"""Host memory that a run would take on this machine, beside what the machine can give: looked at before a start, shown by --dry-run.

A machine that runs out of memory ends a process without a word, usually in the first optimizer step, hours after the job was queued.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megactl.commands.common import size
from megactl.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megactl.config.start import StartInfo
    from megactl.config.validate import Resolved
    from megactl.machine.system import System

# The rest is for the processes themselves: Python, torch, the context of a GPU, the data.
_MOST = 0.95


@dataclass(frozen=True)
class HostNeed:
    """Predicted bytes of the `ranks` of this machine, in all; what it can give (None: unknown) and what that is a limit of."""

    ranks: int
    needed: int
    usable: int | None
    limited_by: str

    @property
    def fits(self) -> bool:
        """Whether a start here is sensible. What cannot be known is not refused."""
        return self.usable is None or self.needed <= _MOST * self.usable

    def as_dict(self) -> dict[str, Any]:
        """The part of --dry-run's document."""
        return {"ranks": self.ranks, "bytes": self.needed, "usable_bytes": self.usable, "limited_by": self.limited_by, "fits": self.fits}


def host_need(resolved: Resolved, start: StartInfo, stages: Sequence[Mapping[str, int]], system: System | None = None) -> HostNeed | None:
    """What the ranks of this machine take, by the predictions `stages` of each pipeline rank; None for a run that offloads nothing.

    On CPUs what would be the device's is the host's as well.
    """
    from megactl.machine.host import host_memory
    from megactl.machine.system import System

    if not any(stage["host"] for stage in stages):
        return None
    on_cpu = resolved.run.training.device == "cpu"
    first = start.rank - start.local_rank
    per_stage = start.world_size // len(stages)
    held = [stages[rank // per_stage] for rank in range(first, first + start.local_world_size)]
    needed = sum(stage["host"] + (stage["total"] if on_cpu else 0) for stage in held)
    found = host_memory(system or System())
    if found is None:
        return HostNeed(len(held), needed, None, "unknown")
    by_group = found.limit is not None and found.limit < found.available
    return HostNeed(len(held), needed, found.usable, "the limit of its control group" if by_group else "what is available")


def refuse_host_need(need: HostNeed | None, resolved: Resolved) -> None:
    """Raise ConfigError where this machine cannot give what its ranks would take."""
    if need is None or need.fits or need.usable is None:
        return
    run = resolved.run
    rule = (
        f"{need.ranks} rank{'s' * (need.ranks != 1)} on this machine would take {size(need.needed)} of host memory, "
        f"and it can give {size(_MOST * need.usable)} (95 % of {need.limited_by}, {size(need.usable)})"
    )
    shared = run.parallel.zero or (run.parallel.data_parallel or 1) * run.parallel.context_parallel == 1
    instead = "spread the run over more machines, or offload less" if shared else "use --zero 1: each replica then keeps a share"
    raise ConfigError([Problem(f"--offload {run.memory.offload}", rule, instead)])


def host_text(need: Mapping[str, Any] | None, largest: int) -> list[tuple[str, str]]:
    """The line of --dry-run, from the document; none for a run that offloads nothing. `largest`: bytes of the fullest rank."""
    if need is None:
        return []
    ranks = f"the {need['ranks']} ranks" if need["ranks"] != 1 else "the rank"
    here = "" if need["usable_bytes"] is None else f", which can give {size(need['usable_bytes'])} ({need['limited_by']})"
    refused = "" if need["fits"] else "; too much: a start here would be refused"
    return [("host memory", f"at most {size(largest)} a rank, predicted; {size(need['bytes'])} for {ranks} on this machine{here}{refused}")]
