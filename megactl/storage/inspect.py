"""What a .bin/.idx pair holds, for a person to look at; and the checks that are too slow to make at every start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megactl.errors import DataError
from megactl.storage.dataset_metadata import DatasetMetadata
from megactl.storage.indexed import IndexedDataset, file_sha256
from megactl.storage.indexed_format import bin_path, idx_path
from megactl.storage.sentence_index import LONG_SENTENCE
from megactl.storage.tokenizer import Tokenizer, load_recorded, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class PairReport:
    """Facts of a pair. Lengths are in tokens; `recorded` is False for a pair without `P.json`, whose tokenizer is unknown (None).

    `sentences`: a sequence is a sentence; the two counts after it are None where it is not. `long_sentences` are longer than BERT's
    samples may hold: documents with one are left out of them.
    """

    prefix: str
    documents: int
    sequences: int
    tokens: int
    dtype: str
    bin_bytes: int
    longest: int
    mean: float
    empty_sequences: int
    sentences: bool
    single_sentence_documents: int | None
    long_sentences: int | None
    recorded: bool
    tokenizer: str | None
    vocab_size: int | None
    eod: int | None
    sources: list[str]
    largest_token: int | None
    checked: list[str]


def report_pair(prefix: str | Path, *, deep: bool = False, progress: Callable[[str], None] = lambda message: None) -> PairReport:
    """Open a pair, which checks every size and pointer, and summarise it. `deep` also reads all tokens and compares recorded checksums.

    Raises DataError for the first damage found.
    """
    data = IndexedDataset(prefix)
    metadata = data.metadata
    checked = ["header", "sizes", "lengths", "offsets", "document index"]
    largest = None
    if metadata is not None:
        checked.append("metadata")
    if deep:
        progress("reading every token")
        largest = _largest_token(data)
        checked.append("token ids")
        if metadata is not None and metadata.checksums:
            progress("comparing checksums")
            _compare_checksums(data.prefix, metadata)
            checked.append("checksums")
    return PairReport(
        prefix=str(data.prefix),
        documents=data.num_documents,
        sequences=len(data),
        tokens=data.num_tokens,
        dtype=data.dtype.name,
        bin_bytes=data.num_tokens * data.dtype.itemsize,
        longest=int(data.lengths.max()) if len(data) else 0,
        mean=data.num_tokens / len(data) if len(data) else 0.0,
        empty_sequences=len(data) - int(np.count_nonzero(data.lengths)),
        sentences=data.holds_sentences,
        single_sentence_documents=int(np.count_nonzero(np.diff(data.documents) == 1)) if data.holds_sentences else None,
        long_sentences=int(np.count_nonzero(data.lengths > LONG_SENTENCE)) if data.holds_sentences else None,
        recorded=metadata is not None,
        tokenizer=metadata.tokenizer if metadata else None,
        vocab_size=metadata.vocab_size if metadata else None,
        eod=metadata.eod if metadata else None,
        sources=metadata.sources if metadata else [],
        largest_token=largest,
        checked=checked,
    )


def first_documents(prefix: str | Path, count: int, tokenizer: str | None = None, *, longest: int = 2000) -> list[str]:
    """The text of the first documents, at most `longest` tokens of each, by the recorded tokenizer or the one given; a line a sentence."""
    data = IndexedDataset(prefix)
    decoder = recorded_tokenizer(data, tokenizer)
    if not data.holds_sentences:
        return [decoder.decode(data.document(i)[:longest].tolist()) for i in range(min(count, data.num_documents))]
    return [_sentence_lines(data, i, decoder, longest) for i in range(min(count, data.num_documents))]


def _sentence_lines(data: IndexedDataset, document: int, decoder: Tokenizer, longest: int) -> str:
    lines, shown = [], 0
    for sentence in range(int(data.documents[document]), int(data.documents[document + 1])):
        tokens = data.sequence(sentence)[: longest - shown]
        if not len(tokens):
            break
        lines.append(decoder.decode(tokens.tolist()))
        shown += len(tokens)
    return "\n".join(lines)


def recorded_tokenizer(data: IndexedDataset, spec: str | None = None) -> Tokenizer:
    """The tokenizer a pair was made with; `spec` replaces the recorded path. Raises DataError where its files have changed since."""
    metadata = data.metadata
    if metadata is None:
        if spec is None:
            raise DataError(f"{data.prefix}: no tokenizer is recorded with it", "name the tokenizer with --tokenizer")
        return load_tokenizer(spec)
    tokenizer = load_recorded(spec or metadata.tokenizer, eod_token=metadata.eod_token, lower_case=metadata.lower_case)
    if tokenizer.describe()["sha256"] != metadata.tokenizer_sha256:
        name = spec or metadata.tokenizer
        raise DataError(f"{data.prefix}: was made with another tokenizer than {name} is now", "name the one it was made with: --tokenizer")
    return tokenizer


def _largest_token(data: IndexedDataset) -> int | None:
    largest = None
    for start, stop in data.blocks():
        block = data.token_range(start, stop)
        low, high = block.min(), block.max()
        largest = int(high) if largest is None else max(largest, int(high))
        limit = data.metadata.vocab_size if data.metadata is not None else None
        if low < 0 or (limit is not None and high >= limit):
            rule = f"must be in [0, {limit})" if limit is not None else "must not be negative"
            raise DataError(f"{bin_path(data.prefix)}: token {low if low < 0 else high}: {rule}", "preprocess the data again")
    return largest


def _compare_checksums(prefix: Path, metadata: DatasetMetadata) -> None:
    for name, path in (("bin", bin_path(prefix)), ("idx", idx_path(prefix))):
        recorded = metadata.checksums.get(name)
        if recorded is not None and recorded != (found := file_sha256(path)):
            raise DataError(
                f"{path}: its sha256 is {found[:12]}..., recorded is {recorded[:12]}...", "copy the pair again, or preprocess again"
            )
