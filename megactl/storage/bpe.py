"""Training a byte-level BPE tokenizer: GPT-2's kind, from the same source files that preprocessing reads."""

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
from megactl.storage.libraries import tokenizers_library
from megactl.storage.special_tokens import EOD_NAMES
from megactl.storage.text import Position, Source, find_sources, read_chunks, read_text
from megactl.storage.tokenizer import load_tokenizer

# 256 bytes and the end-of-document token.
SMALLEST_VOCABULARY = 257
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class TrainedTokenizer:
    """What was trained. `vocab_size` is below `requested` where the text is too small for more merges."""

    path: str
    vocab_size: int
    requested: int
    eod: int
    eod_token: str
    text_mb: float
    seconds: float


def train_bpe(
    files: Sequence[str | Path],
    vocab_size: int,
    out_path: str | Path,
    *,
    json_key: str = "text",
    eod_token: str = EOD_NAMES[0],
    min_frequency: int = 2,
    as_text: bool = False,
    patterns: Sequence[str] = (),
    overwrite: bool = False,
    progress: Callable[[float], None] = lambda text_mb: None,
) -> TrainedTokenizer:
    """Train on the documents of `files` and write a tokenizer.json of at most `vocab_size` tokens, `eod_token` being id 0.

    A pair of symbols is merged where it occurs `min_frequency` times. Raises DataError for unreadable input and for a file that exists.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        rule = f"the 256 bytes and {eod_token} need {SMALLEST_VOCABULARY}"
        raise DataError(f"--vocab-size {vocab_size}: {rule}", f"set at least {SMALLEST_VOCABULARY}, or use --tokenizer byte")
    out = Path(out_path)
    if out.is_dir() or (out.exists() and not overwrite):
        raise DataError(f"{out}: exists", "choose another --output, or use --overwrite for a file")
    sources = find_sources(files, as_text=as_text, patterns=patterns)
    library = tokenizers_library()
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[eod_token],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    started = time.monotonic()
    reader = _Reader(sources, json_key, progress)
    inner.train_from_iterator(reader.texts(), trainer)
    if not reader.text_bytes:
        raise DataError(f"{', '.join(map(str, files))}: holds no text to train on", "name files with text")
    _write(out, inner)
    trained = load_tokenizer(out, eod_token=eod_token)
    seconds = time.monotonic() - started
    return TrainedTokenizer(str(out), trained.vocab_size, vocab_size, trained.eod, eod_token, reader.text_bytes / 1e6, seconds)


class _Reader:
    """The documents of some sources, counted as they pass."""

    def __init__(self, sources: Sequence[Source], json_key: str, progress: Callable[[float], None]) -> None:
        self._sources, self._json_key, self._progress = sources, json_key, progress
        self.text_bytes = 0

    def texts(self) -> Iterator[str]:
        """One document after another. Raises DataError with file and line for what cannot be read."""
        for chunk in read_chunks(self._sources, Position(), _CHUNK_BYTES):
            documents = self._lines(chunk.files[0], chunk.data, chunk.first_line) if chunk.kind == "jsonl" else self._files(chunk.files)
            for text, size in documents:
                self.text_bytes += size
                yield text
            self._progress(self.text_bytes / 1e6)

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


def _write(path: Path, inner: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, inner.to_str(pretty=True).encode("utf-8"), f"{os.getpid()}-{time.time_ns()}")
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror})", "choose another --output") from error
