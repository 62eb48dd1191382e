"""`P.json`: what megactl records beside a .bin/.idx pair, so that training knows the vocabulary and the tokenizer by default."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megactl.errors import DataError
from megactl.storage.durable import replace_file
from megactl.storage.indexed_format import metadata_path

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class DatasetMetadata:
    """The content of `P.json`. `checksums`: sha256 of "bin" and "idx"; `made_by`: fingerprint of the preprocessing that wrote the pair.

    `split_sentences`: a sequence is a sentence, not a document; None in files older than that key. `lower_case`: whether a vocab.txt
    was used without capitals (None for other tokenizers, and in older files).
    """

    tokenizer: str
    tokenizer_sha256: str | None
    vocab_size: int
    eod: int | None
    eod_token: str | None = None
    append_eod: bool
    dtype: str
    documents: int
    sequences: int
    tokens: int
    sources: list[str] = field(default_factory=list)
    checksums: dict[str, str] = field(default_factory=dict)
    made_by: str | None = None
    split_sentences: bool | None = None
    lower_case: bool | None = None
    schema_version: int = SCHEMA_VERSION


def write_metadata(prefix: Path, metadata: DatasetMetadata) -> None:
    """Write `P.json` whole or not at all."""
    text = json.dumps(dataclasses.asdict(metadata), indent=2, ensure_ascii=False) + "\n"
    # Names on disk may hold bytes that are not UTF-8; the escape keeps them and the file stays valid.
    replace_file(metadata_path(prefix), text.encode("utf-8", "backslashreplace"), f"{os.getpid()}-{time.time_ns()}")


def read_metadata(prefix: Path) -> DatasetMetadata | None:
    """The metadata of a pair; None where there is none (a pair made by Megatron). A damaged file raises DataError."""
    path = metadata_path(prefix)
    try:
        document = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: cannot be read ({error})", "restore it, or delete it: the pair is then read as one made by Megatron"
        ) from error
    return _checked(document, path)


def _checked(document: Any, path: Path) -> DatasetMetadata:
    """Types are checked one by one: a wrong vocabulary size must not surface as an index error on a GPU."""
    hint = "restore it, or delete it: the pair is then read as one made by Megatron"
    if not isinstance(document, dict):
        raise DataError(f"{path}: must hold one JSON object", hint)
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path}: schema_version {version!r}; this megactl reads version {SCHEMA_VERSION}",
            "use the megactl that wrote it, or delete it",
        )
    whole = {"vocab_size": 1, "documents": 0, "sequences": 0, "tokens": 0}
    for key, least in whole.items():
        value = document.get(key)
        if type(value) is not int or value < least:
            raise DataError(f"{path}: {key} = {value!r}; must be a whole number of at least {least}", hint)
    eod = document.get("eod")
    if eod is not None and (type(eod) is not int or not 0 <= eod < document["vocab_size"]):
        raise DataError(f"{path}: eod = {eod!r}; must be null or a token below vocab_size {document['vocab_size']}", hint)
    kinds = {"tokenizer": str, "dtype": str, "append_eod": bool, "sources": list, "checksums": dict}
    for key, kind in kinds.items():
        if not isinstance(document.get(key), kind):
            raise DataError(f"{path}: {key} = {document.get(key)!r}; must be a {kind.__name__}", hint)
    for key in ("split_sentences", "lower_case"):
        if not isinstance(document.get(key), bool | None):
            raise DataError(f"{path}: {key} = {document[key]!r}; must be true, false or null", hint)
    # Keys added by later versions of the same schema are left alone.
    known = {item.name for item in dataclasses.fields(DatasetMetadata)}
    return DatasetMetadata(**{"tokenizer_sha256": None, "eod": None, **{key: value for key, value in document.items() if key in known}})
