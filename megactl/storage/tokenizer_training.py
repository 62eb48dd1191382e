"""What training a tokenizer of any kind needs: the text of some files, and a place for the result."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megactl.errors import DataError, RunError
from megactl.storage.durable import replace_file
from megactl.storage.text import Position, Source, read_chunks, read_text

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class TrainedTokenizer:
    """What was trained. `vocab_size` is below `requested` where the text is too small for more tokens. `eod` None: it has none."""

    path: str
    vocab_size: int
    requested: int
    eod: int | None
    eod_token: str | None
    text_mb: float
    seconds: float


class TextReader:
    """The documents of some sources, counted as they pass."""

    def __init__(self, sources: Sequence[Source], json_key: str, progress: Callable[[float], None]) -> None:
        self._sources, self._json_key, self._progress = sources, json_key, progress
        self.text_bytes = 0

    def texts(self) -> Iterator[str]:
        """One document after another. Raises DataError with file and line for what cannot be read, and where there is no text at all."""
        for chunk in read_chunks(self._sources, Position(), _CHUNK_BYTES):
            documents = self._lines(chunk.files[0], chunk.data, chunk.first_line) if chunk.kind == "jsonl" else self._files(chunk.files)
            for text, size in documents:
                self.text_bytes += size
                yield text
            self._progress(self.text_bytes / 1e6)
        if not self.text_bytes:
            names = ", ".join(source.path for source in self._sources[:3])
            raise DataError(f"{names}: holds no text to train on", "name files with text")

    def _files(self, files: Sequence[Source]) -> Iterator[tuple[str, int]]:
        for source in files:
            data = read_text(source)
            try:
                yield data.decode("utf-8"), len(data)
            except UnicodeDecodeError as error:
                raise DataError(f"{source.path}: byte {error.start} is not valid UTF-8", "leave the file out") from error

    def _lines(self, source: Source, data: bytes, first_line: int) -> Iterator[tuple[str, int]]:
        for number, line in enumerate(data.split(b"\n"), first_line + 1):
            if not line.strip():
                continue
            try:
                record: Any = json.loads(line.decode("utf-8"))
                text = record[self._json_key]
                yield text, len(text.encode("utf-8"))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                rule = f"must be a JSON object with a string '{self._json_key}' ({error!r})"
                raise DataError(f"{source.path}:{number}: {rule}", "correct the line, or name another --json-key") from error


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise DataError where a result would replace something unasked."""
    if path.is_dir() or (path.exists() and not overwrite):
        raise DataError(f"{path}: exists", "choose another --output, or use --overwrite for a file")


def write_output(path: Path, text: str) -> None:
    """Write a result whole or not at all. Raises RunError where the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode("utf-8"), f"{os.getpid()}-{time.time_ns()}")
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror})", "choose another --output") from error
