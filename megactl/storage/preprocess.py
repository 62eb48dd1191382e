"""Text files to .bin/.idx pairs: parallel, in order, in bounded memory, and continued after a kill.

The main process reads and cuts chunks, workers tokenize them, and the results are appended in the order of the input, so the bytes do not
depend on the number of workers. Every few seconds the outputs are flushed and a state file records how far they reach; a later call with
the same input, tokenizer and options cuts them back to that point and goes on.
"""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megactl.errors import DataError, RunError
from megactl.storage.dataset_metadata import DatasetMetadata, read_metadata, write_metadata
from megactl.storage.encoding import Encoded, EncoderConfig, encode_chunk, one_library_thread, start_worker
from megactl.storage.indexed import file_sha256
from megactl.storage.indexed_format import bin_path, idx_path, token_dtype
from megactl.storage.indexed_writer import IndexedWriter, complete_pair, remove_partials
from megactl.storage.preprocess_state import Counts, State, load_state, save_state
from megactl.storage.sentence_index import LONG_SENTENCE
from megactl.storage.text import Chunk, Position, Source, find_sources, read_chunks
from megactl.storage.tokenizer import Tokenizer, load_tokenizer

STATE_VERSION = 1
_SAVE_EVERY_S = 2.0
_REPORT_EVERY_S = 0.1


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """What to preprocess and how. `workers` None: one for each core this process may use.

    `split_sentences`: a sequence for each sentence, for BERT. `lower_case`: see `load_tokenizer`.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer: str
    json_keys: tuple[str, ...] = ("text",)
    workers: int | None = None
    append_eod: bool = False
    eod_token: str | None = None
    split_sentences: bool = False
    lower_case: bool | None = None
    as_text: bool = False
    patterns: tuple[str, ...] = ()
    skip_bad: bool = False
    overwrite: bool = False
    checksum: bool = True
    chunk_bytes: int = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PreprocessSummary:
    """The result. Rates are those of this call; `resumed_documents` were done by an earlier one.

    `sentences` None: text was not split. `cut_sentences`: those longer than `sentence_index.LONG_SENTENCE` tokens.
    """

    outputs: tuple[str, ...]
    documents: int
    tokens: int
    dtype: str
    vocab_size: int
    eod: int | None
    text_mb: float
    bad_documents: int
    first_bad: str | None
    empty_documents: int
    sentences: int | None
    cut_sentences: int
    resumed_documents: int
    already_done: bool
    workers: int
    seconds: float
    documents_per_s: float
    mb_per_s: float


@dataclass
class _Job:
    """Everything one call has settled before it starts to work."""

    options: PreprocessOptions
    sources: list[Source]
    tokenizer: Tokenizer
    description: dict[str, Any]
    outputs: list[Path]
    workers: int
    fingerprint: str
    state_path: Path
    log: Callable[[str], None]

    @property
    def dtype(self) -> np.dtype:
        return token_dtype(self.tokenizer.vocab_size)


def preprocess(
    options: PreprocessOptions,
    progress: Callable[[Counts], None] = lambda counts: None,
    log: Callable[[str], None] = lambda message: None,
) -> PreprocessSummary:
    """Write `<output_prefix>_<key>_document.bin/.idx/.json` (`_sentence` where text is split) for each JSON key.

    Repeated after success it finds the pairs done.

    Raises DataError for input that cannot be read, for outputs made from something else (unless `overwrite`) and for another run at work
    on the same prefix; RunError where a worker dies or the disk fills up.
    """
    job = _prepare(options, log)
    started = time.monotonic()
    with _exclusive(job):
        total = sum(source.size for source in job.sources)
        state = load_state(job.state_path, job.fingerprint, job.outputs, total, log)
        resumed = state.counts
        if not state.done and _finished_before(job):
            return _summary(job, _recorded_counts(job), resumed, started, already_done=True)
        try:
            if not state.done:
                state = _tokenize(job, state, progress)
            _complete(job, state)
        except OSError as error:
            raise RunError(
                f"{options.output_prefix}: writing failed ({error.strerror})", "free space, then run the same command: it continues"
            ) from error
    return _summary(job, state.counts, resumed, started)


def output_prefix(prefix: str, key: str, *, split_sentences: bool = False) -> Path:
    """Megatron's name of the pair for one JSON key."""
    return Path(f"{prefix}_{key}_{'sentence' if split_sentences else 'document'}")


def usable_cores() -> int:
    """Cores this process may run on: fewer than the machine's under a batch system or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare(options: PreprocessOptions, log: Callable[[str], None]) -> _Job:
    workers = options.workers if options.workers is not None else usable_cores()
    if workers < 1:
        raise DataError(f"--workers {workers}: must be at least 1", "leave it out for one worker a core")
    keys = options.json_keys
    if not keys or len(set(keys)) != len(keys) or any(not key or "/" in key for key in keys):
        raise DataError(
            f"--json-key {', '.join(keys) or 'of nothing'}: keys must be named, different, and usable in a file name",
            "e.g. --json-key text",
        )
    if options.split_sentences and options.append_eod:
        rule = "sentences are for BERT, whose samples end with [SEP]; a token at the end of a document means nothing to it"
        raise DataError(f"--append-eod with --split-sentences: {rule}", "leave --append-eod out")
    tokenizer = load_tokenizer(options.tokenizer, eod_token=options.eod_token, lower_case=options.lower_case)
    description = tokenizer.describe()
    if "cleaning" in description:
        cleaning = description["cleaning"]
        log(f"{options.tokenizer}: {'lower' if cleaning['lower_case'] else 'upper and lower'} case ({cleaning['source']})")
    if options.append_eod:
        _ = tokenizer.eod  # raises here rather than in a worker
    sources = find_sources(options.inputs, as_text=options.as_text, patterns=options.patterns)
    outputs = [output_prefix(options.output_prefix, key, split_sentences=options.split_sentences) for key in keys]
    identity = {
        "version": STATE_VERSION,
        "sources": [dataclasses.astuple(source) for source in sources],
        "tokenizer": [description["kind"], description["sha256"], description["eod"]],
        "options": [keys, options.append_eod, options.skip_bad],
        # Only where they are in use, so that what was done before they existed is still known as done.
        **({"sentences": LONG_SENTENCE} if options.split_sentences else {}),
        **({"cleaning": [value for key, value in description["cleaning"].items() if key != "source"]} if "cleaning" in description else {}),
    }
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    state_path = Path(f"{options.output_prefix}.preprocess-state.json")
    return _Job(options, sources, tokenizer, description, outputs, workers, fingerprint, state_path, log)


@contextmanager
def _exclusive(job: _Job) -> Iterator[None]:
    """One run at a time for a prefix. The kernel drops the lock with its process, so it cannot go stale."""
    path = job.state_path.with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise DataError(f"{path.parent}: cannot be written ({error.strerror})", "choose another --output-prefix") from error
    try:
        _lock(job, descriptor)
        try:
            yield
        finally:
            # While the lock is held, so that nobody's newer file is removed.
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _lock(job: _Job, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(descriptor, 20, 0).decode("ascii", "replace")
        raise DataError(
            f"{job.options.output_prefix}: is being written by pid {owner}", "wait, or choose another --output-prefix"
        ) from error
    except OSError as error:
        job.log(f"{job.state_path.parent}: this file system has no locks ({error.strerror}); run one preprocess at a time on this prefix")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)


def _finished_before(job: _Job) -> bool:
    """Whether the outputs are there already, from the same input and options. Others are not overwritten unasked."""
    existing = [prefix for prefix in job.outputs if idx_path(prefix).exists() or bin_path(prefix).exists()]
    if not existing or job.options.overwrite:
        return False
    if len(existing) == len(job.outputs) and all(_made_by(prefix) == job.fingerprint for prefix in job.outputs):
        job.log(f"{job.options.output_prefix}: already done from the same input and options")
        for prefix in job.outputs:
            remove_partials(prefix)
        return True
    raise DataError(
        f"{existing[0]}.bin/.idx: exists, made from other input or options", "choose another --output-prefix, or use --overwrite"
    )


def _made_by(prefix: Path) -> str | None:
    metadata = read_metadata(prefix)
    return metadata.made_by if metadata is not None else None


def _recorded_counts(job: _Job) -> Counts:
    recorded = [metadata for prefix in job.outputs if (metadata := read_metadata(prefix)) is not None]
    documents, tokens = max(item.documents for item in recorded), sum(item.tokens for item in recorded)
    return Counts(documents=documents, tokens=tokens, sentences=sum(item.sequences for item in recorded))


def _tokenize(job: _Job, state: State, progress: Callable[[Counts], None]) -> State:
    """Everything from the state's position to the end of the input; the state is saved on the way and at the end."""
    with ExitStack() as stack:
        writers = [
            stack.enter_context(IndexedWriter(prefix, job.dtype, resume=None if state.fresh else position))
            for prefix, position in zip(job.outputs, state.writers, strict=True)
        ]
        results = stack.enter_context(closing(_encoded_chunks(job, state.position)))
        saved = reported = time.monotonic()
        try:
            for chunk, encoded in results:
                state = _append(state, writers, chunk, encoded)
                now = time.monotonic()
                if now - saved >= _SAVE_EVERY_S:
                    save_state(job.state_path, job.fingerprint, state, writers)
                    saved = time.monotonic()
                if now - reported >= _REPORT_EVERY_S:
                    progress(state.counts)
                    reported = now
            state = dataclasses.replace(state, done=True)
        finally:
            # Also on an error: a later call goes on from here, once the interruption is over.
            save_state(job.state_path, job.fingerprint, state, writers)
        progress(state.counts)
    return state


def _append(state: State, writers: list[IndexedWriter], chunk: Chunk, encoded: Encoded) -> State:
    """Write one chunk's result; returns the state after it."""
    for writer, tokens, lengths, documents in zip(writers, encoded.tokens, encoded.lengths, encoded.documents, strict=True):
        writer.add_documents(tokens, lengths, documents)
    was = state.counts
    counts = Counts(
        documents=was.documents + max(len(documents) for documents in encoded.documents),
        tokens=was.tokens + sum(tokens.size for tokens in encoded.tokens),
        text_bytes=was.text_bytes + encoded.text_bytes,
        bad=was.bad + encoded.bad,
        first_bad=was.first_bad or encoded.first_bad,
        empty=was.empty + encoded.empty,
        sentences=was.sentences + sum(len(lengths) for lengths in encoded.lengths),
        cut=was.cut + encoded.cut,
        disk_bytes=chunk.disk_bytes,
        disk_total=was.disk_total,
    )
    return State(chunk.end, tuple(writer.position for writer in writers), counts)


def _encoded_chunks(job: _Job, start: Position) -> Iterator[tuple[Chunk, Encoded]]:
    """Chunks with their results, in the order of the input."""
    options = job.options
    spec = options.tokenizer if options.tokenizer == "byte" else os.path.abspath(options.tokenizer)
    config = EncoderConfig(
        tokenizer=spec,
        eod_token=options.eod_token,
        json_keys=options.json_keys,
        append_eod=options.append_eod,
        skip_bad=options.skip_bad,
        split_sentences=options.split_sentences,
        lower_case=options.lower_case,
    )
    chunks = read_chunks(job.sources, start, options.chunk_bytes)
    # A process takes a fifth of a second to start: not worth it for input that is encoded in less.
    if job.workers == 1 or sum(source.size for source in job.sources) <= 2 * options.chunk_bytes:
        return _inline(config, chunks)
    return _parallel(config, chunks, job.workers)


def _inline(config: EncoderConfig, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, Encoded]]:
    with one_library_thread():
        for chunk in chunks:
            yield chunk, encode_chunk(config, chunk)


def _parallel(config: EncoderConfig, chunks: Iterator[Chunk], workers: int) -> Iterator[tuple[Chunk, Encoded]]:
    """Keeps a few chunks a worker in flight: enough to hide the slowest, and a bound on memory."""
    # Not fork: the tokenizer library has threads, and a fork in the middle of one deadlocks.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    waiting: collections.deque[tuple[Chunk, Future[Encoded]]] = collections.deque()
    try:
        for chunk in itertools.islice(chunks, 2 * workers + 2):
            waiting.append((chunk, pool.submit(encode_chunk, config, chunk)))
        while waiting:
            chunk, future = waiting.popleft()
            encoded = future.result()
            following = next(chunks, None)
            if following is not None:
                waiting.append((following, pool.submit(encode_chunk, config, following)))
            yield dataclasses.replace(chunk, data=b""), encoded
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process was killed, perhaps for lack of memory", "use fewer --workers and run the same command: it continues"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _complete(job: _Job, state: State) -> None:
    """Put the pairs in place. Each step may be repeated, so a kill in the middle is repaired by the next call."""
    for prefix, position in zip(job.outputs, state.writers, strict=True):
        complete_pair(prefix, job.dtype, position)
        checksums = {"bin": file_sha256(bin_path(prefix)), "idx": file_sha256(idx_path(prefix))} if job.options.checksum else {}
        write_metadata(
            prefix,
            DatasetMetadata(
                tokenizer=job.description["path"],
                tokenizer_sha256=job.description["sha256"],
                vocab_size=job.tokenizer.vocab_size,
                eod=job.description["eod"],
                eod_token=job.description["eod_token"],
                append_eod=job.options.append_eod,
                dtype=job.dtype.name,
                documents=position.documents,
                sequences=position.sequences,
                tokens=position.bytes // job.dtype.itemsize,
                sources=_source_names(job),
                checksums=checksums,
                made_by=job.fingerprint,
                split_sentences=job.options.split_sentences,
                lower_case=job.description.get("cleaning", {}).get("lower_case"),
            ),
        )
    # Last, and the lists before the state: the lists are what a repeated completion reads.
    job.state_path.unlink(missing_ok=True)
    for prefix in job.outputs:
        remove_partials(prefix)


def _source_names(job: _Job) -> list[str]:
    """The files, or what was named on the command line where they are too many to read at every start of a training."""
    return [source.path for source in job.sources] if len(job.sources) <= 1000 else list(job.options.inputs)


def _summary(job: _Job, counts: Counts, resumed: Counts, started: float, *, already_done: bool = False) -> PreprocessSummary:
    seconds = time.monotonic() - started
    rate = 0.0 if already_done else 1.0 / max(seconds, 1e-9)
    return PreprocessSummary(
        outputs=tuple(str(prefix) for prefix in job.outputs),
        documents=counts.documents,
        tokens=counts.tokens,
        dtype=job.dtype.name,
        vocab_size=job.tokenizer.vocab_size,
        eod=job.description["eod"],
        text_mb=counts.text_bytes / 1e6,
        bad_documents=counts.bad,
        first_bad=counts.first_bad,
        empty_documents=counts.empty,
        sentences=counts.sentences if job.options.split_sentences else None,
        cut_sentences=counts.cut,
        resumed_documents=resumed.documents,
        already_done=already_done,
        workers=job.workers,
        seconds=seconds,
        documents_per_s=(counts.documents - resumed.documents) * rate,
        mb_per_s=(counts.text_bytes - resumed.text_bytes) / 1e6 * rate,
    )
