"""Training a byte-level BPE tokenizer: GPT-2's kind, from the same source files that preprocessing reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megactl.errors import DataError
from megactl.storage.libraries import tokenizers_library
from megactl.storage.special_tokens import EOD_NAMES
from megactl.storage.text import find_sources
from megactl.storage.tokenizer import load_tokenizer
from megactl.storage.tokenizer_training import TextReader, TrainedTokenizer, check_output, write_output

# 256 bytes and the end-of-document token.
SMALLEST_VOCABULARY = 257


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
    check_output(out, overwrite=overwrite)
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
    reader = TextReader(sources, json_key, progress)
    inner.train_from_iterator(reader.texts(), trainer)
    write_output(out, inner.to_str(pretty=True))
    trained = load_tokenizer(out, eod_token=eod_token)
    seconds = time.monotonic() - started
    return TrainedTokenizer(str(out), trained.vocab_size, vocab_size, trained.eod, eod_token, reader.text_bytes / 1e6, seconds)
