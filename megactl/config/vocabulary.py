"""The size of the vocabulary, from what lies beside the data or from the tokenizer that was named. Torch is not needed."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from megactl.config.schema import Run
from megactl.errors import ConfigError, DataError, Problem

_SUFFIX = "_text_document"


@dataclass(frozen=True)
class Vocabulary:
    """`size` None: not known, `hint` says why. `eod`: the end-of-document token. `data`: --data with its prefixes as they are on disk."""

    size: int | None = None
    eod: int | None = None
    source: str = "the tokenizer"
    hint: str | None = None
    tokenizer: str | None = None
    data: str | None = None


def find_vocabulary(run: Run) -> Vocabulary:
    """What the run's data and tokenizer say. An explicit --tokenizer wins over the one recorded with the data.

    Raises ConfigError for a prefix without its .idx file, for a damaged file, and for datasets made with different tokenizers.
    """
    try:
        return _find(run)
    except DataError as error:
        raise ConfigError([Problem("", error.message, error.hint)]) from error


def _find(run: Run) -> Vocabulary:
    data = _on_disk(run.data.data) if run.data.data is not None else None
    if run.data.tokenizer is not None:
        size, eod = _of_tokenizer(run.data.tokenizer)
        return Vocabulary(size, eod, f"--tokenizer {run.data.tokenizer}", data=data)
    if data is None:
        return Vocabulary()
    from megactl.storage.data_spec import recorded_metadata

    record = recorded_metadata(data)
    if record is None:
        return Vocabulary(hint=f"there is no {shlex.split(data)[-1]}.json beside the data", data=data)
    return Vocabulary(record.vocab_size, record.eod, f"the data (tokenizer {record.tokenizer})", tokenizer=record.tokenizer, data=data)


def _of_tokenizer(spec: str) -> tuple[int, int | None]:
    from megactl.storage.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(spec)
    try:
        return tokenizer.vocab_size, tokenizer.eod
    except DataError:
        # A tokenizer without one is only a mistake for a run that needs it, which `resolve` checks.
        return tokenizer.vocab_size, None


def _on_disk(text: str) -> str | None:
    """--data with each prefix as its files are called; None where the text itself is wrong, which the checks word."""
    from megactl.storage.data_spec import parse_data

    try:
        spec = parse_data(text)
    except DataError:
        return None
    found = {prefix: _existing(prefix) for prefix in spec.prefixes}
    missing = [prefix for prefix, actual in found.items() if actual is None]
    if missing:
        instead = "give the prefix that `megactl data preprocess` wrote, without .bin or .idx"
        rules = {prefix: f"there is no {prefix}.idx and no {prefix}{_SUFFIX}.idx" for prefix in missing}
        raise ConfigError([Problem(f"--data {prefix}", rule, instead) for prefix, rule in rules.items()])
    names = [shlex.quote(str(found[prefix])) for prefix in spec.prefixes]
    if spec.weights is None:
        return " ".join(names)
    return " ".join(f"{weight:.17g} {name}" for weight, name in zip(spec.weights, names, strict=True))


def _existing(prefix: Path) -> Path | None:
    """The prefix whose .idx exists: as given, or with Megatron's ending."""
    for candidate in (prefix, prefix.with_name(prefix.name + _SUFFIX)):
        if candidate.with_name(candidate.name + ".idx").is_file():
            return candidate
    return None
