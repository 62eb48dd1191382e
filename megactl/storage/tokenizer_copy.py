"""A run directory's own copy of its tokenizer, so that its tokens can be read when the original has moved or is gone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megactl.errors import DataError
from megactl.storage.data_spec import recorded_metadata
from megactl.storage.durable import replace_file
from megactl.storage.tokenizer import Tokenizer, load_recorded, load_tokenizer

# Of each kind (see Tokenizer.describe) the file that is named to load it; the others it needs lie beside it.
_MAIN_FILES = {
    "tokenizer.json": "tokenizer.json",
    "vocab.json + merges.txt": "vocab.json",
    "vocab.txt": "vocab.txt",
    "sentencepiece": "tokenizer.model",
}


def keep_tokenizer(spec: str, data: str | None, folder: Path) -> dict[str, Any]:
    """Copy the tokenizer `spec` of a run on `data` (the text of --data; None for generated tokens) into `folder`; returns its facts.

    Its end-of-document token and its treatment of capitals are those the data was made with. Where `spec` is gone, the copy of an earlier
    attempt takes its place. Raises DataError or MegactlError where neither can be read, OSError where the copy cannot be written.
    """
    record = recorded_metadata(data) if data is not None else None
    source = spec
    if spec != "byte" and not Path(spec).exists() and (copy := find_copy(folder, None)) is not None:
        source = str(copy)
    tokenizer = load_tokenizer(source)
    same = record is not None and tokenizer.describe()["sha256"] == record.tokenizer_sha256
    if source != spec and record is not None and not same:
        raise DataError(f"tokenizer {spec!r}: does not exist, and {source} is another one", "name it with --tokenizer")
    if record is not None and same:
        tokenizer = load_recorded(source, eod_token=record.eod_token, lower_case=record.lower_case)
    _write(tokenizer, folder)
    return tokenizer.describe()


def find_copy(folder: Path, kind: str | None) -> Path | None:
    """What to load the copy in `folder` from, None where there is none. `kind`: as recorded with a checkpoint; None: whichever it is."""
    names = _MAIN_FILES.values() if kind is None else [_MAIN_FILES[kind]] if kind in _MAIN_FILES else []
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _write(tokenizer: Tokenizer, folder: Path) -> None:
    for name, content in tokenizer.files().items():
        path = folder / name
        # A run that goes on finds its own copy: what is the same already is not written again, whoever reads it meanwhile.
        if not path.is_file() or path.read_bytes() != content:
            replace_file(path, content, str(os.getpid()))
