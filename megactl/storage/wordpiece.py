"""BERT's WordPiece: a vocab.txt, one token a line, the line number being its id. Encoding is the `tokenizers` library's.

What the vocabulary is (size, special tokens, continued words) is read without the library, so that training needs the file alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megactl.errors import DataError
from megactl.storage.libraries import tokenizers_library
from megactl.storage.special_tokens import continues_words, find_special_tokens

CONFIG_NAME = "tokenizer_config.json"
PREFIX = "##"
UNKNOWN = "[UNK]"
# Google's BERT gives up on longer words.
_LONGEST_WORD = 100
_AGAIN = "copy the file again, or train one: megactl data tokenizer train --kind wordpiece"


@dataclass(frozen=True)
class Cleaning:
    """How text is cleaned before it is cut. `strip_accents` None: where `lower_case` is on. `source`: what says so."""

    lower_case: bool
    strip_accents: bool | None
    space_chinese: bool
    source: str


class WordPieceTokenizer:
    """A vocab.txt: clean-up, spaces around Chinese characters and punctuation, then the longest piece that fits, `##` inside words."""

    def __init__(self, spec: str, path: Path, *, lower_case: bool | None = None, eod_token: str | None = None) -> None:
        self.spec, self._path = spec, path
        self._data = _read(path)
        tokens = _tokens(self._data, path)
        # A token twice: the later line counts, as in Hugging Face's reader.
        self._vocabulary = {token: number for number, token in enumerate(tokens)}
        self.vocab_size = len(tokens)
        if UNKNOWN not in self._vocabulary:
            raise DataError(f"{path}: has no {UNKNOWN}, the token for words that no pieces make up", _AGAIN)
        if eod_token is not None and eod_token not in self._vocabulary:
            raise DataError(f"--eod-token {eod_token!r}: is not in the vocabulary of {spec}", "name a token that is, or leave it out")
        self._eod_token = eod_token
        self.cleaning = _cleaning(path, tokens, lower_case)
        self._library: Any = None

    @property
    def eod(self) -> int:
        """See Tokenizer.eod. BERT's vocabularies have none of their own."""
        if self._eod_token is None:
            raise DataError(f"{self.spec}: a WordPiece vocabulary has no end-of-document token", "name one of its tokens with --eod-token")
        return self._vocabulary[self._eod_token]

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode."""
        return list(self._inner().encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See Tokenizer.encode_batch; int32."""
        encoded = self._inner().encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(item.ids, np.int32) for item in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer.decode. What cleaning took away (case, accents, line ends) is not in the tokens."""
        values = [int(token) for token in ids]
        bad = next((token for token in values if not 0 <= token < self.vocab_size), None)
        if bad is not None:
            raise DataError(f"token {bad}: {self.spec} has ids 0 to {self.vocab_size - 1}", "use the tokenizer that made these tokens")
        return self._inner().decode(values, skip_special_tokens=False)

    def special_tokens(self) -> dict[str, int]:
        """See Tokenizer.special_tokens."""
        return find_special_tokens(self._vocabulary.get)

    def continues(self) -> np.ndarray:
        """See Tokenizer.continues: the pieces that begin with `##`."""
        return continues_words(self._vocabulary, self.vocab_size, prefix=PREFIX)

    def describe(self) -> dict[str, Any]:
        """See Tokenizer.describe; `cleaning` is how text is cleaned (see Cleaning)."""
        return {
            "kind": "vocab.txt",
            "path": os.path.abspath(self._path),
            "sha256": hashlib.sha256(self._data).hexdigest(),
            "vocab_size": self.vocab_size,
            "eod": self._vocabulary[self._eod_token] if self._eod_token is not None else None,
            "eod_token": self._eod_token,
            "special_tokens": self.special_tokens(),
            "cleaning": asdict(self.cleaning),
        }

    def files(self) -> dict[str, bytes]:
        """See Tokenizer.files: the vocabulary, and how text is cleaned, whatever said so here."""
        cleaning = self.cleaning
        switches = {
            "do_lower_case": cleaning.lower_case,
            "strip_accents": cleaning.strip_accents,
            "tokenize_chinese_chars": cleaning.space_chinese,
        }
        return {"vocab.txt": self._data, CONFIG_NAME: f"{json.dumps(switches, indent=2)}\n".encode()}

    def _inner(self) -> Any:
        if self._library is None:
            self._library = build_wordpiece(self._vocabulary, self.cleaning)
        return self._library


def build_wordpiece(vocabulary: dict[str, int], cleaning: Cleaning) -> Any:
    """A `tokenizers.Tokenizer` that cuts as Google's BERT and Hugging Face's BertTokenizer do."""
    library = tokenizers_library()
    model = library.models.WordPiece(
        vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=_LONGEST_WORD, continuing_subword_prefix=PREFIX
    )
    inner = library.Tokenizer(model)
    inner.normalizer = library.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=cleaning.space_chinese,
        strip_accents=cleaning.strip_accents,
        lowercase=cleaning.lower_case,
    )
    inner.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    inner.decoder = library.decoders.WordPiece(prefix=PREFIX, cleanup=False)
    found = find_special_tokens(vocabulary.get)
    inner.add_special_tokens([token for token, number in vocabulary.items() if number in found.values()])
    return inner


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", "name a vocab.txt") from error


def _tokens(data: bytes, path: Path) -> list[str]:
    """One token a line. Only real line ends count: vocabularies hold characters that Python also takes for one."""
    try:
        lines = data.decode("utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not valid UTF-8", _AGAIN) from error
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise DataError(f"{path}: is empty", _AGAIN)
    if "" in lines:
        raise DataError(f"{path}:{lines.index('') + 1}: an empty line is no token, and the ids of all that follow would shift", _AGAIN)
    return lines


def _cleaning(path: Path, tokens: Sequence[str], lower_case: bool | None) -> Cleaning:
    """The flag, else the tokenizer_config.json beside the file, else what the vocabulary shows."""
    config = _config(path.with_name(CONFIG_NAME))
    strip, chinese = config.get("strip_accents"), config.get("tokenize_chinese_chars", True)
    recorded = config.get("do_lower_case")
    if lower_case is not None:
        return Cleaning(lower_case, strip, chinese, "--lower-case" if lower_case else "--no-lower-case")
    if recorded is not None:
        return Cleaning(recorded, strip, chinese, CONFIG_NAME)
    # Cleaned to lower case, text has no capitals: tokens with one could never be used.
    cased = next((token for token in tokens if token != token.lower() and not (token.startswith("[") and token.endswith("]"))), None)
    source = f"the vocabulary has capitals, e.g. {cased!r}" if cased is not None else "the vocabulary has no capitals"
    return Cleaning(cased is None, strip, chinese, source)


def _config(path: Path) -> dict[str, Any]:
    """The switches of a tokenizer_config.json; empty where there is none. Raises DataError for one that does not read."""
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_bytes().decode("utf-8"))
        switches = {key: document.get(key) for key in ("do_lower_case", "strip_accents", "tokenize_chinese_chars")}
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read ({error})", "restore it, or delete it") from error
    for key, value in switches.items():
        if not isinstance(value, bool | None):
            raise DataError(f"{path}: {key} = {value!r}; must be true, false or null", "restore it, or delete it")
    return {key: value for key, value in switches.items() if value is not None}
