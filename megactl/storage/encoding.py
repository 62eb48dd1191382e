"""A chunk of source text to token arrays: the part of preprocessing that runs in worker processes."""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait

import numpy as np

from megactl.errors import DataError
from megactl.storage.indexed_format import token_dtype
from megactl.storage.sentence_index import LONG_SENTENCE
from megactl.storage.sentences import split_sentences
from megactl.storage.text import Chunk, Source, read_text
from megactl.storage.tokenizer import Tokenizer, load_tokenizer

# A batch goes to the tokenizer at once; more text than this only costs memory.
_BATCH_BYTES = 1 << 20
_LIBRARY_THREADS = "TOKENIZERS_PARALLELISM"
_LONGEST = np.iinfo(np.int32).max


@dataclass(frozen=True)
class EncoderConfig:
    """What a worker must know. `json_keys`: which strings of a line are tokenized, each into its own pair."""

    tokenizer: str
    eod_token: str | None
    json_keys: tuple[str, ...]
    append_eod: bool
    skip_bad: bool
    split_sentences: bool = False
    lower_case: bool | None = None


@dataclass
class Encoded:
    """The result of one chunk: for each key tokens [n], sequence lengths int32 [s] and sequences of each document int32 [d]; and counts.

    `cut`: sentences that were cut because they are too long for BERT's samples.
    """

    tokens: list[np.ndarray]
    lengths: list[np.ndarray]
    documents: list[np.ndarray]
    text_bytes: int = 0
    bad: int = 0
    first_bad: str | None = None
    empty: int = 0
    cut: int = 0


@dataclass
class _Column:
    """Documents of one key as they come in."""

    texts: list[str] = field(default_factory=list)
    arrays: list[np.ndarray] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)


def encode_chunk(config: EncoderConfig, chunk: Chunk) -> Encoded:
    """Tokenize a chunk. Raises DataError naming file and line for what cannot be read, unless `skip_bad` counts it."""
    tokenizer = _tokenizer(config.tokenizer, config.eod_token, config.lower_case)
    dtype = token_dtype(tokenizer.vocab_size)
    columns = [_Column() for _ in config.json_keys]
    result = Encoded([], [], [])
    pending = 0
    for where, document in _documents(config, chunk):
        try:
            texts = _texts(config, document)
        except DataError as error:
            problem = f"{where}: {error.message}"
            if not config.skip_bad:
                raise DataError(problem, error.hint) from error
            result.bad += 1
            result.first_bad = result.first_bad or problem
            continue
        for column, text in zip(columns, texts, strict=True):
            column.texts.append(text)
        pending += sum(map(len, texts))
        if pending >= _BATCH_BYTES:
            _encode(config, tokenizer, dtype, columns, result)
            pending = 0
    _encode(config, tokenizer, dtype, columns, result)
    result.tokens = [np.concatenate(column.arrays) if column.arrays else np.zeros(0, dtype) for column in columns]
    result.lengths = [np.array(column.lengths, np.int32) for column in columns]
    result.documents = [np.array(column.documents, np.int32) for column in columns]
    return result


def _documents(config: EncoderConfig, chunk: Chunk) -> Iterator[tuple[str, bytes | Source]]:
    """(place for messages, line or file) of each document; blank lines are none."""
    if chunk.kind == "text":
        for source in chunk.files:
            yield source.path, source
        return
    for number, line in enumerate(chunk.data.split(b"\n"), chunk.first_line + 1):
        if line.strip():
            yield f"{chunk.files[0].path}:{number}", line


def _texts(config: EncoderConfig, document: bytes | Source) -> list[str]:
    """The text of each key. Raises DataError without the place, which the caller knows."""
    skip = "correct it, or use --skip-bad to count and leave out such documents"
    try:
        if isinstance(document, Source):
            # Every key gets the text: a text file has no keys.
            return [read_text(document).decode("utf-8")] * len(config.json_keys)
        record = json.loads(document.decode("utf-8"))
        if not isinstance(record, dict):
            raise DataError(f"a line must be one JSON object, not a {type(record).__name__}", skip)
        texts = [_string(record, key, skip) for key in config.json_keys]
        for text in texts:
            text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"the text has a lone surrogate at character {error.start}; it is not Unicode text", skip) from error
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} is not valid UTF-8", skip) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not valid JSON ({error})", skip) from error
    return texts


def _string(record: dict[str, object], key: str, skip: str) -> str:
    value = record.get(key)
    if isinstance(value, str):
        return value
    if key in record:
        raise DataError(f"'{key}' is a {type(value).__name__}; it must be a string", skip)
    keys = ", ".join(sorted(record)[:8]) or "none"
    raise DataError(f"has no key '{key}' (its keys: {keys})", "name the key with --json-key, or use --skip-bad to leave out such documents")


def _encode(config: EncoderConfig, tokenizer: Tokenizer, dtype: np.dtype, columns: list[_Column], result: Encoded) -> None:
    """Tokenize the waiting texts of every column. A document without tokens would be a sample of nothing: it is counted and left out."""
    for column in columns:
        texts, column.texts = column.texts, []
        result.text_bytes += sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text in texts)
        for sequences in _sentences(tokenizer, texts, result) if config.split_sentences else _whole(tokenizer, texts):
            if not sequences:
                result.empty += 1
                continue
            if config.append_eod:
                sequences.append(np.array([tokenizer.eod], dtype))
            column.arrays += [ids.astype(dtype) for ids in sequences]
            column.lengths += [len(ids) for ids in sequences] if config.split_sentences else [sum(map(len, sequences))]
            column.documents.append(len(sequences) if config.split_sentences else 1)


def _whole(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[np.ndarray]]:
    """The tokens of each text; an empty list where it has none."""
    for ids in tokenizer.encode_batch(texts):
        if len(ids) >= _LONGEST:
            raise DataError(f"a document has {len(ids)} tokens; an index holds at most {_LONGEST} a document", "split the file")
        yield [ids] if len(ids) else []


def _sentences(tokenizer: Tokenizer, texts: list[str], result: Encoded) -> Iterator[list[np.ndarray]]:
    """The sentences of each text that have tokens. A longer one than a sample may hold is cut into equal parts: BERT's sample index leaves
    out documents that have one.
    """
    sentences = [split_sentences(text) for text in texts]
    encoded = iter(tokenizer.encode_batch([sentence for document in sentences for sentence in document]))
    for document in sentences:
        found = []
        for ids in itertools.islice(encoded, len(document)):
            parts = -(-len(ids) // LONG_SENTENCE)
            result.cut += parts > 1
            found += np.array_split(ids, parts) if parts > 1 else [ids] * parts
        yield found


@functools.lru_cache(maxsize=1)
def _tokenizer(spec: str, eod_token: str | None, lower_case: bool | None) -> Tokenizer:
    """Loaded once in each process: reading a large vocabulary costs more than a chunk."""
    return load_tokenizer(spec, eod_token=eod_token, lower_case=lower_case)


@contextmanager
def one_library_thread() -> Iterator[None]:
    """Keep the tokenizer library to one thread while this process is the only worker: `--workers` says how many cores are used."""
    before = os.environ.get(_LIBRARY_THREADS)
    os.environ[_LIBRARY_THREADS] = "false"
    try:
        yield
    finally:
        os.environ.pop(_LIBRARY_THREADS)
        if before is not None:
            os.environ[_LIBRARY_THREADS] = before


def start_worker() -> None:
    """Prepare a worker process: one thread of its own, and no life after its parent's."""
    os.environ[_LIBRARY_THREADS] = "false"
    # Ctrl-C reaches the whole process group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    # After kill -9 the parent closes nothing: workers would wait for work for ever.
    threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
