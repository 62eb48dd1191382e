"""Finding where to continue: the newest checkpoint that proves good, agreed on by all ranks."""

from __future__ import annotations

from pathlib import Path

from megactl.engine.checkpoint.group import RankGroup, SingleProcess
from megactl.storage import checkpoint_folder as folder
from megactl.storage.manifest import verify


def find(root: Path, log: folder.Log, *, group: RankGroup | None = None) -> Path | None:
    """The newest checkpoint under `root` whose every byte is as it was written; None where there is none at all.

    Damaged ones are passed over and logged with the reason. With a `group` the call is collective: ranks share the reading, rank 0
    logs. Raises CheckpointError (on all ranks) where there are checkpoints and none is good, or the folder cannot be read.
    """
    ranks = group or SingleProcess()
    # All ranks must try the same folders in the same order, or their collectives would not match: rank 0's listing counts.
    found, pointed, problem = ranks.broadcast(_listing(root) if ranks.rank == 0 else None)
    if problem is not None:
        raise folder.failed(problem, "check the path and its permissions")

    def problems(path: Path) -> list[str]:
        mine = verify(path, share=(ranks.rank, ranks.size)).problems
        return ranks.all_ok(not mine, "; ".join(mine[:4]))

    return folder.newest_good(found, pointed, log if ranks.rank == 0 else _silent, problems)


def _listing(root: Path) -> tuple[list[folder.Candidate], str | None, str | None]:
    try:
        return folder.candidates(root), folder.latest(root), None
    except OSError as error:
        return [], None, f"{root}: cannot be read ({error.strerror})"


def _silent(message: str) -> None:
    """Rank 0 says it for all."""
