"""Training BERT's kind of vocabulary, a vocab.txt, from the same source files that preprocessing reads."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megactl.errors import DataError
from megactl.storage.libraries import tokenizers_library
from megactl.storage.special_tokens import ROLES
from megactl.storage.text import find_sources
from megactl.storage.tokenizer import load_tokenizer
from megactl.storage.tokenizer_training import TextReader, TrainedTokenizer, check_output, write_output
from megactl.storage.wordpiece import CONFIG_NAME, PREFIX, UNKNOWN, Cleaning, build_wordpiece

# [PAD], [UNK], [CLS], [SEP], [MASK]: ids 0 to 4.
SPECIAL_TOKENS = tuple(names[0] for names in ROLES.values())
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 2
# Characters beyond these become [UNK]: without a bound, a corpus of many scripts spends its vocabulary on single characters.
_LARGEST_ALPHABET = 1000


def train_wordpiece(
    files: Sequence[str | Path],
    vocab_size: int,
    out_path: str | Path,
    *,
    lower_case: bool = True,
    json_key: str = "text",
    min_frequency: int = 2,
    as_text: bool = False,
    patterns: Sequence[str] = (),
    overwrite: bool = False,
    progress: Callable[[float], None] = lambda text_mb: None,
) -> TrainedTokenizer:
    """Train on the documents of `files`; writes a vocab.txt of at most `vocab_size` tokens, and beside it the tokenizer_config.json that
    says how text is cleaned.

    Pieces are joined where they occur `min_frequency` times. Raises DataError for unreadable input and for files that exist.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        rule = f"{', '.join(SPECIAL_TOKENS)} alone are {len(SPECIAL_TOKENS)}"
        raise DataError(f"--vocab-size {vocab_size}: {rule}", f"set at least {SMALLEST_VOCABULARY}; 30522 is usual for a large corpus")
    out = Path(out_path)
    if out.suffix != ".txt":
        raise DataError(f"--output {out}: a WordPiece vocabulary is known by its name", f"name it {out.with_suffix('.txt')}")
    for path in (out, out.with_name(CONFIG_NAME)):
        check_output(path, overwrite=overwrite)
    started = time.monotonic()
    sources = find_sources(files, as_text=as_text, patterns=patterns)
    counting, reader = TextReader(sources, json_key, lambda text_mb: None), TextReader(sources, json_key, progress)
    alphabet = _alphabet(counting, lower_case, (vocab_size - len(SPECIAL_TOKENS)) // 2)
    tokens = _train(reader.texts(), lower_case, alphabet, vocab_size=vocab_size, min_frequency=min_frequency)
    write_output(out.with_name(CONFIG_NAME), json.dumps({"do_lower_case": lower_case}, indent=2) + "\n")
    write_output(out, "".join(f"{token}\n" for token in tokens))
    trained = load_tokenizer(out)
    seconds = time.monotonic() - started
    return TrainedTokenizer(str(out), trained.vocab_size, vocab_size, None, None, reader.text_bytes / 1e6, seconds)


def _alphabet(reader: TextReader, lower_case: bool, most: int) -> list[str]:
    """Single characters, the frequent ones first, and behind them those of them that occur inside words, as `##` pieces.

    The library's trainer would number them in the order of a hash table, and its merges would then differ from run to run.
    """
    counts: Counter[str] = Counter()
    normalizer = _plain(lower_case).normalizer

    def counted() -> Iterator[str]:
        for text in reader.texts():
            counts.update(normalizer.normalize_str(text))
            yield text

    found = set(_train(counted(), lower_case, [], vocab_size=1, min_frequency=1))
    frequent = sorted((char for char in counts if char in found), key=lambda char: (-counts[char], char))
    kept = frequent[: min(most, _LARGEST_ALPHABET)]
    return [*kept, *(PREFIX + char for char in kept if PREFIX + char in found)]


def _train(texts: Iterable[str], lower_case: bool, alphabet: Sequence[str], *, vocab_size: int, min_frequency: int) -> list[str]:
    """The tokens in the order of their ids; the alphabet follows the special tokens, and is taken from the text where it is empty."""
    inner = _plain(lower_case)
    single = [token for token in alphabet if not token.startswith(PREFIX) or len(token) == 1]
    trainer = tokenizers_library().trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        # Tokens given here get their ids first and in this order.
        special_tokens=[*SPECIAL_TOKENS, *alphabet],
        initial_alphabet=single,
        limit_alphabet=len(single) or sys.maxunicode,
        continuing_subword_prefix=PREFIX,
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    vocabulary: dict[str, int] = inner.get_vocab(with_added_tokens=False)
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _plain(lower_case: bool) -> Any:
    """A tokenizer that cleans text and knows no words yet."""
    return build_wordpiece({UNKNOWN: 0}, Cleaning(lower_case, None, True, "training"))
