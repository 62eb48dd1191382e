"""Saving: every rank writes its own file beside the others, rank 0 describes them, and one rename makes the checkpoint exist."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from megactl import __version__
from megactl.engine.checkpoint.group import RankGroup
from megactl.engine.checkpoint.piece import Piece, check, host_bytes
from megactl.errors import CheckpointError
from megactl.storage import checkpoint_folder as folder
from megactl.storage import durable, manifest, tensor_file
from megactl.storage.manifest import Entry, FileRecord, Header, Manifest

_SHARED = "put the run directory on a file system that all nodes share"
# What a caller puts into `header`; save adds the rest.
HEADER_KEYS = ("consumed_samples", "layout", "precision", "model", "tokenizer", "state")


def save(
    root: Path,
    *,
    step: int,
    pieces: Sequence[Piece],
    header: dict[str, Any],
    group: RankGroup,
    keep: int,
    protect: Path | None,
    log: folder.Log = folder.warn,
) -> Path:
    """Save `pieces` of all ranks of `group` as `root/step-NNNNNNNN` and return its path. Collective.

    Over all ranks the pieces must cover each tensor exactly once (replicas are saved by one of them). `header` has the keys of
    HEADER_KEYS. Then all but the newest `keep` checkpoints are deleted (0: none), never `protect`. If any rank fails, all raise
    CheckpointError with exit code 1, and the checkpoints that were there still are.
    """
    unique = uuid.uuid4().hex[:8]
    temporary = root / folder.hidden_name("tmp", step, unique)
    attempt = _Attempt(group)
    temporary = group.broadcast(temporary)
    attempt.run(lambda: _make_folder(temporary) if group.rank == 0 else None)
    record, entries = attempt.run(lambda: _write_rank(temporary, group.rank, pieces), cleanup=temporary) or (None, [])
    gathered = group.gather((record, entries))
    attempt.run(lambda: _write_manifest(temporary, step, header, gathered) if gathered is not None else None, cleanup=temporary)
    attempt.run(lambda: folder.commit(temporary, step, unique) if group.rank == 0 else None, cleanup=temporary)
    if group.rank == 0:
        folder.retain(root, step, keep, protect, unique, log)
    group.barrier()
    return root / folder.folder_name(step)


class _Attempt:
    """One step of a save after another, each agreed on: either all ranks go on, or all raise."""

    def __init__(self, group: RankGroup) -> None:
        self.group = group

    def run(self, work: Callable[[], Any], cleanup: Path | None = None) -> Any:
        """The result of `work` on this rank. Where it fails on any rank, rank 0 removes `cleanup` and all ranks raise."""
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            # Everything is caught, and raised again below: a rank that left here would leave the others waiting.
            error = caught
        failures = self.group.all_ok(error is None, _explain(error))
        if not failures:
            return result
        if cleanup is not None and self.group.rank == 0:
            _try_remove(cleanup)
        shown = "; ".join(failures[:4]) + (f"; and {len(failures) - 4} more ranks" if len(failures) > 4 else "")
        raise folder.failed(f"the checkpoint was not saved: {shown}", _hint(error)) from error


def _explain(error: Exception | None) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    return error.message if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _hint(error: Exception | None) -> str:
    if isinstance(error, CheckpointError) and error.hint:
        return error.hint
    return "earlier checkpoints are intact; free disk space or correct permissions, then run again"


def _try_remove(temporary: Path) -> None:
    try:
        durable.remove_tree(temporary)
    except OSError as error:
        # The save has failed already, with its own reason; `sweep` takes what is left at the next start.
        folder.warn(f"{temporary} could not be removed ({error.strerror}); the next start will try again")


def _make_folder(temporary: Path) -> None:
    durable.make_folders(temporary.parent)
    temporary.mkdir()


def _write_rank(temporary: Path, rank: int, pieces: Sequence[Piece]) -> tuple[FileRecord | None, list[Entry]]:
    """Write this rank's tensor file. A rank without pieces writes none."""
    check(list(pieces))
    if not pieces:
        return None, []
    if not temporary.is_dir():
        raise CheckpointError(f"{temporary}: made by rank 0 but not seen here", _SHARED)
    name = f"rank-{rank:05d}.safetensors"
    # The number keeps keys apart where a rank holds two ranges of one tensor (a bucket's edge can fall inside it).
    keys = [f"{piece.kind}/{piece.name}/{number}" for number, piece in enumerate(pieces)]
    keyed = list(zip(keys, pieces, strict=True))
    parts = [tensor_file.Part(key, piece.dtype, piece.region.shape, partial(host_bytes, piece.tensor)) for key, piece in keyed]
    written = tensor_file.write(temporary / name, parts)
    durable.sync_folder(temporary)
    entries = [
        Entry(piece.name, piece.kind, tuple(piece.logical_shape), piece.region, piece.dtype, name, key, written.tensors[key])
        for key, piece in keyed
    ]
    return FileRecord(name, written.size, written.header), entries


def _write_manifest(temporary: Path, step: int, header: dict[str, Any], gathered: list[tuple[FileRecord | None, list[Entry]]]) -> None:
    """Rank 0: put the ranks' entries together, check that they make whole tensors, write manifest.json."""
    if set(header) != set(HEADER_KEYS):
        raise CheckpointError(f"checkpoint header {sorted(header)}: must have exactly {', '.join(HEADER_KEYS)}", "correct the call of save")
    files = [record for record, _ in gathered if record is not None]
    for record in files:
        path = temporary / record.file
        if not path.is_file() or path.stat().st_size != record.size:
            raise CheckpointError(f"{path}: written by its rank but not seen by rank 0", _SHARED)
    entries = [entry for _, part in gathered for entry in part]
    if not entries:
        raise CheckpointError("no rank gave anything to save", "correct the call of save")
    run = Header(
        schema_version=manifest.SCHEMA_VERSION,
        megactl=__version__,
        step=step,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        host=socket.gethostname(),
        **header,
    )
    durable.write_file(temporary / manifest.FILE_NAME, manifest.render(Manifest(run, tuple(files), tuple(entries))))
