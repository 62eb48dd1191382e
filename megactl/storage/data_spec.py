"""What `--data` and `--split` mean: prefixes with optional weights, shares of the documents, and what is recorded beside the pairs."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from megactl.errors import DataError
from megactl.storage.dataset_metadata import DatasetMetadata, read_metadata
from megactl.storage.indexed_format import clean_prefix

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class DataSpec:
    """Prefixes of .bin/.idx pairs; `weights` are shares of the samples, or None: then in proportion to the data."""

    prefixes: tuple[Path, ...]
    weights: tuple[float, ...] | None


def parse_data(text: str) -> DataSpec:
    """Read "PREFIX ..." or "WEIGHT PREFIX WEIGHT PREFIX ...". Quotes inside the string keep a path with spaces together."""
    example = 'e.g. --data corpus_text_document or --data "0.7 web_text_document 0.3 books_text_document"'
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise DataError(f"--data {text!r}: {error}", example) from error
    if not words:
        raise DataError("--data is empty", example)
    numbers = [_number(word) for word in words]
    if len(words) % 2 == 0 and all(number is not None for number in numbers[::2]):
        weights = tuple(number for number in numbers[::2] if number is not None)
        bad = next((weight for weight in weights if not math.isfinite(weight) or weight <= 0), None)
        if bad is not None:
            raise DataError(f"--data {text!r}: weight {bad:g} must be a positive number", "leave the dataset out instead")
        return DataSpec(_prefixes(text, words[1::2]), weights)
    if any(number is not None for number in numbers):
        raise DataError(f"--data {text!r}: weights and prefixes must alternate, or there are no weights at all", example)
    return DataSpec(_prefixes(text, words), None)


def _prefixes(text: str, words: list[str]) -> tuple[Path, ...]:
    prefixes = tuple(clean_prefix(word) for word in words)
    if not all(prefix.name for prefix in prefixes):
        raise DataError(f"--data {text!r}: a prefix must end in a name, not in a folder", "give the path of the pair without .bin or .idx")
    return prefixes


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def parse_split(text: str) -> tuple[float, float, float]:
    """Shares of train, valid and test, summing to 1; shares left out at the end are 0."""
    example = "e.g. --split 969,30,1"
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise DataError(f"--split {text!r}: must be numbers with commas between", example) from error
    if not 1 <= len(shares) <= 3 or any(not math.isfinite(share) or share < 0 for share in shares) or sum(shares) <= 0:
        raise DataError(f"--split {text!r}: must be one to three shares of at least 0, not all of them 0", example)
    train, valid, test = (share / sum(shares) for share in [*shares, 0.0, 0.0][:3])
    return train, valid, test


def split_ranges(text: str, documents: int) -> dict[str, tuple[int, int]]:
    """Documents [first, last) of each split: consecutive, rounded as Megatron-Core rounds them."""
    ends = [0.0]
    for share in parse_split(text):
        ends.append(ends[-1] + share)
    bounds = [round(end * float(documents)) for end in ends]
    return {name: (bounds[i], bounds[i + 1]) for i, name in enumerate(SPLITS)}


def recorded_metadata(text: str) -> DatasetMetadata | None:
    """What is recorded beside the pairs of a `--data` string: the first one's metadata; None where any pair has none.

    Raises DataError where two of them were made with different tokenizers: their ids mean different things.
    """
    prefixes = parse_data(text).prefixes
    found = [(prefix, metadata) for prefix in prefixes if (metadata := read_metadata(prefix)) is not None]
    for prefix, metadata in found[1:]:
        first = found[0][1]
        if (metadata.tokenizer_sha256, metadata.vocab_size) != (first.tokenizer_sha256, first.vocab_size):
            other = f"{found[0][0]} with {first.tokenizer} ({first.vocab_size})"
            rule = f"was made with {metadata.tokenizer} ({metadata.vocab_size} tokens), {other}"
            raise DataError(f"{prefix}: {rule}", "preprocess them with one tokenizer")
    return found[0][1] if len(found) == len(prefixes) else None


def check_form(prefix: Path, architecture: str, *, sentences: bool) -> None:
    """Raise DataError where a pair's sequences are not what the model is trained on: sentences for BERT, documents for GPT."""
    if architecture == "bert" and not sentences:
        rule = "its sequences are whole documents, and BERT's samples are put together from sentences"
        raise DataError(f"{prefix}: {rule}", "preprocess the text with --split-sentences, which writes ..._sentence.bin and .idx")
    if architecture != "bert" and sentences:
        rule = "its sequences are sentences (it was made with --split-sentences), and GPT is trained on running text"
        raise DataError(f"{prefix}: {rule}", "preprocess the text without --split-sentences, or use --model bert")
