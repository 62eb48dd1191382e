"""How far an interrupted preprocessing got: the state file beside its outputs, and when it can be trusted."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megactl.storage.durable import replace_file
from megactl.storage.indexed_writer import IndexedWriter, WriterPosition
from megactl.storage.text import Position


@dataclass(frozen=True)
class Counts:
    """What has gone through so far; `text_bytes` is UTF-8 before tokenizing, `disk_bytes` input behind us of `disk_total`."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    bad: int = 0
    first_bad: str | None = None
    empty: int = 0
    sentences: int = 0
    cut: int = 0
    disk_bytes: int = 0
    disk_total: int = 0


@dataclass(frozen=True)
class State:
    """How far a job has got, between two chunks. Replaced as a whole, so that an interruption cannot leave half a step in it.

    `done`: all text is tokenized, only the pairs may not be in place yet. `fresh`: nothing was there before.
    """

    position: Position
    writers: tuple[WriterPosition, ...]
    counts: Counts
    done: bool = False
    fresh: bool = True


def load_state(path: Path, fingerprint: str, outputs: Sequence[Path], disk_total: int, log: Callable[[str], None]) -> State:
    """The state of an interrupted run of the same job (`fingerprint`), else a fresh one; `log` hears why nothing can be continued."""
    fresh = State(Position(), (WriterPosition(),) * len(outputs), Counts(disk_total=disk_total))
    try:
        document = json.loads(path.read_text())
        if document["fingerprint"] != fingerprint:
            log("an interrupted run with other input or options was found: starting anew")
            return fresh
        writers = tuple(WriterPosition(**writer) for writer in document["writers"])
        state = State(Position(**document["position"]), writers, Counts(**document["counts"]), document["done"], fresh=False)
    except FileNotFoundError:
        return fresh
    except (ValueError, KeyError, TypeError) as error:
        log(f"{path}: cannot be read ({error}): starting anew")
        return fresh
    missing = None if state.done else _missing_partial(outputs, state)
    if missing is not None:
        log(f"{missing}: is shorter than the interrupted run left it: starting anew")
        return fresh
    log(f"continuing an interrupted run after {state.counts.documents} documents")
    return state


def _missing_partial(outputs: Sequence[Path], state: State) -> Path | None:
    """A partial file that is absent or shorter than the state file says."""
    for prefix, position in zip(outputs, state.writers, strict=True):
        sizes = {"bin": position.bytes, "lengths": 4 * position.sequences, "documents": 8 * position.documents}
        for name, path in IndexedWriter.partial_paths(prefix).items():
            if not path.exists() or path.stat().st_size < sizes[name]:
                return path
    return None


def save_state(path: Path, fingerprint: str, state: State, writers: Sequence[IndexedWriter]) -> None:
    """Put the outputs and then the state on disk: the state must never promise bytes that are not there."""
    for writer in writers:
        writer.flush()
    document = {
        "fingerprint": fingerprint,
        "position": dataclasses.asdict(state.position),
        "writers": [dataclasses.asdict(writer) for writer in state.writers],
        "counts": dataclasses.asdict(state.counts),
        "done": state.done,
    }
    replace_file(path, json.dumps(document).encode(), f"{os.getpid()}-{time.time_ns()}")
