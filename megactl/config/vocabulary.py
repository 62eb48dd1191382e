"""The size of the vocabulary, from what lies beside the data or from the tokenizer that was named. Torch is not needed."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from megactl.config.schema import Run
from megactl.errors import ConfigError, DataError, Problem

# Megatron's endings of what GPT and BERT are trained on.
_SUFFIXES = {"gpt": "_text_document", "bert": "_text_sentence"}


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
    architecture = run.model.architecture
    # First, so that a wrong --tokenizer is named even where the record beside the data cannot be read.
    named = _of_tokenizer(run.data.tokenizer, architecture) if run.data.tokenizer is not None else None
    data = _on_disk(run.data.data, architecture) if run.data.data is not None else None
    if named is not None:
        size, eod = named
        return Vocabulary(size, eod, f"--tokenizer {run.data.tokenizer}", data=data)
    if data is None:
        return Vocabulary()
    from megactl.storage.data_spec import recorded_metadata

    record = recorded_metadata(data)
    if record is None and architecture == "bert":
        rule = "BERT needs the vocabulary's [CLS], [SEP] and [MASK], and no tokenizer is recorded with the data"
        raise ConfigError([Problem("--tokenizer", rule, "name the one the data was made with, such as --tokenizer vocab.txt")])
    if record is None:
        return Vocabulary(hint=f"there is no {shlex.split(data)[-1]}.json beside the data", data=data)
    if architecture == "bert":
        _check_pair_tokens(record.tokenizer)
    return Vocabulary(record.vocab_size, record.eod, f"the data (tokenizer {record.tokenizer})", tokenizer=record.tokenizer, data=data)


def _check_pair_tokens(spec: str) -> None:
    """Raise where the tokenizer that is recorded with the data is gone, or is not one for BERT."""
    from megactl.storage.special_tokens import pair_tokens
    from megactl.storage.tokenizer import load_tokenizer

    if spec != "byte" and not Path(spec).exists():
        rule = f"{spec}, which is recorded with the data, does not exist here, and BERT needs its [CLS], [SEP] and [MASK]"
        raise ConfigError([Problem("--tokenizer", rule, "say where it is now: --tokenizer PATH")])
    pair_tokens(load_tokenizer(spec))


def _of_tokenizer(spec: str, architecture: str) -> tuple[int, int | None]:
    from megactl.storage.special_tokens import pair_tokens
    from megactl.storage.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(spec)
    if architecture == "bert":
        pair_tokens(tokenizer)
    try:
        return tokenizer.vocab_size, tokenizer.eod
    except DataError:
        # A tokenizer without one is only a mistake for a run that needs it, which `resolve` checks.
        return tokenizer.vocab_size, None


def _on_disk(text: str, architecture: str) -> str | None:
    """--data with each prefix as its files are called; None where the text itself is wrong, which the checks word."""
    from megactl.storage.data_spec import check_form, parse_data
    from megactl.storage.dataset_metadata import read_metadata

    try:
        spec = parse_data(text)
    except DataError:
        return None
    found = {prefix: _existing(prefix, architecture) for prefix in spec.prefixes}
    missing = [prefix for prefix, actual in found.items() if actual is None]
    if missing:
        raise ConfigError([_missing(prefix, architecture) for prefix in missing])
    for actual in found.values():
        metadata = read_metadata(actual) if actual is not None else None
        # Where nothing is recorded, the lengths tell; they are read when the run starts.
        if actual is not None and metadata is not None and metadata.split_sentences is not None:
            check_form(actual, architecture, sentences=metadata.split_sentences)
    names = [shlex.quote(str(found[prefix])) for prefix in spec.prefixes]
    if spec.weights is None:
        return " ".join(names)
    return " ".join(f"{weight:.17g} {name}" for weight, name in zip(spec.weights, names, strict=True))


def _missing(prefix: Path, architecture: str) -> Problem:
    """What to say of a prefix without files: that the other model's are there, where they are."""
    rule = f"there is no {prefix}.idx and no {prefix}{_SUFFIXES[architecture]}.idx"
    other = next(name for name in _SUFFIXES if name != architecture)
    if _existing(prefix, other) is not None:
        flag = "with" if architecture == "bert" else "without"
        rule += f" ({prefix}{_SUFFIXES[other]}.idx is for --model {other})"
        return Problem(f"--data {prefix}", rule, f"preprocess the text {flag} --split-sentences, or use --model {other}")
    return Problem(f"--data {prefix}", rule, "give the prefix that `megactl data preprocess` wrote, without .bin or .idx")


def _existing(prefix: Path, architecture: str) -> Path | None:
    """The prefix whose .idx exists: as given, or with Megatron's ending."""
    for candidate in (prefix, prefix.with_name(prefix.name + _SUFFIXES[architecture])):
        if candidate.with_name(candidate.name + ".idx").is_file():
            return candidate
    return None
