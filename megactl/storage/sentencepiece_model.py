"""SentencePiece .model files (unigram or BPE), through the optional `sentencepiece` library."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megactl.errors import DataError
from megactl.storage.libraries import sentencepiece_library
from megactl.storage.special_tokens import EOD_NAMES, continues_words, find_special_tokens

# SentencePiece writes a space, which starts a word, as this character.
WORD_START = "\u2581"


class SentencePieceTokenizer:
    """A .model file. Its end-of-document token is the model's own end of sequence, usually `</s>`."""

    def __init__(self, spec: str, path: Path, *, eod_token: str | None = None) -> None:
        self.spec, self._path = spec, path
        library = sentencepiece_library()
        try:
            self._data = path.read_bytes()
            # Checked first: of nothing, the library makes a processor that fails at its first use.
            if not self._data:
                raise DataError(f"{path}: is empty", "copy the file again")
            self._inner = library.SentencePieceProcessor(model_proto=self._data)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path}: is not a SentencePiece model ({error})", "copy the file again") from error
        self.vocab_size = self._inner.get_piece_size()
        if eod_token is not None and self._token_id(eod_token) is None:
            raise DataError(f"--eod-token {eod_token!r}: is not in the vocabulary of {spec}", "name a token that is")
        self._eod = self._token_id(eod_token) if eod_token is not None else self._own_eod()

    @property
    def eod(self) -> int:
        """See Tokenizer.eod."""
        if self._eod is None:
            raise DataError(f"{self.spec}: has no end-of-sequence token of its own", "name the end-of-document token with --eod-token")
        return self._eod

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode."""
        return self._inner.encode(text.encode("utf-8"), out_type=int)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See Tokenizer.encode_batch; int32."""
        # As bytes: Python then says what is not Unicode text, as it does for the other tokenizers.
        encoded = self._inner.encode([text.encode("utf-8") for text in texts], out_type=int, num_threads=1)
        return [np.array(ids, np.int32) for ids in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer.decode. Control tokens become their names, which the library would drop."""
        parts: list[str] = []
        run: list[int] = []
        for token in map(int, ids):
            if not 0 <= token < self.vocab_size:
                rule = f"{self.spec} has ids 0 to {self.vocab_size - 1}"
                raise DataError(f"token {token}: {rule}", "use the tokenizer that made these tokens")
            if self._inner.is_control(token):
                parts += [self._inner.decode(run), self._inner.id_to_piece(token)]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self._inner.decode(run)])

    def special_tokens(self) -> dict[str, int]:
        """See Tokenizer.special_tokens."""
        return find_special_tokens(self._token_id)

    def continues(self) -> np.ndarray:
        """See Tokenizer.continues: the pieces without the mark of a word's start."""
        plain = [n for n in range(self.vocab_size) if not self._inner.is_control(n) and not self._inner.is_unknown(n)]
        return continues_words({self._inner.id_to_piece(n): n for n in plain}, self.vocab_size, word_start=WORD_START)

    def describe(self) -> dict[str, Any]:
        """See Tokenizer.describe."""
        return {
            "kind": "sentencepiece",
            "path": os.path.abspath(self._path),
            "sha256": hashlib.sha256(self._data).hexdigest(),
            "vocab_size": self.vocab_size,
            "eod": self._eod,
            "eod_token": self._inner.id_to_piece(self._eod) if self._eod is not None else None,
            "special_tokens": self.special_tokens(),
        }

    def files(self) -> dict[str, bytes]:
        """See Tokenizer.files."""
        return {"tokenizer.model": self._data}

    def _token_id(self, token: str) -> int | None:
        number = self._inner.piece_to_id(token)
        # The library answers the unknown token's id for what it does not have.
        return number if self._inner.id_to_piece(number) == token else None

    def _own_eod(self) -> int | None:
        number = self._inner.eos_id()
        if number >= 0:
            return number
        return next((found for name in EOD_NAMES if (found := self._token_id(name)) is not None), None)
