"""Text to token ids: a built-in byte tokenizer, and files of the kinds in use, through the libraries that read them. Local files only."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megactl.errors import DataError
from megactl.storage.libraries import tokenizers_library
from megactl.storage.sentencepiece_model import WORD_START, SentencePieceTokenizer
from megactl.storage.special_tokens import EOD_NAMES, continues_words, find_special_tokens
from megactl.storage.wordpiece import WordPieceTokenizer

_SPECS = "use 'byte', a tokenizer.json, vocab.txt or SentencePiece .model, or a folder with one of them or with vocab.json and merges.txt"
# Byte-level BPE writes the space that starts a word as this character.
_BYTE_LEVEL_SPACE = "\u0120"


class Tokenizer(Protocol):
    """What the rest of megactl asks of a tokenizer. Ids are in [0, vocab_size)."""

    spec: str

    @property
    def vocab_size(self) -> int:
        """Largest id + 1."""

    @property
    def eod(self) -> int:
        """Id of the end-of-document token. Raises DataError where none is known."""

    def encode(self, text: str) -> list[int]:
        """Token ids, without any token the text does not contain."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One array of ids (an unsigned or 32-bit integer type) a text. Raises UnicodeEncodeError for lone surrogates."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD, end-of-document tokens their name."""

    def special_tokens(self) -> dict[str, int]:
        """Ids of the roles pad, unk, cls, sep, mask, as far as the vocabulary has them (see `special_tokens.ROLES`)."""

    def continues(self) -> np.ndarray | None:
        """bool [vocab_size], True where a token goes on with the word before it; None where tokens do not show words."""

    def describe(self) -> dict[str, Any]:
        """kind, path, sha256 of the files, vocab_size, eod (None where unknown), eod_token and special_tokens."""

    def files(self) -> dict[str, bytes]:
        """The files that make it up, by the names under which `load_tokenizer` finds them in a folder; see `tokenizer_copy`."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 as the end-of-document token."""

    spec = "byte"
    vocab_size = 257
    eod = 256

    def encode(self, text: str) -> list[int]:
        """The text's UTF-8 bytes."""
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The texts' UTF-8 bytes, uint8."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the bytes. Raises DataError for an id above 256."""
        parts: list[str] = []
        run = bytearray()
        for token in ids:
            if not 0 <= token <= self.eod:
                raise DataError(f"token {token}: the byte tokenizer has ids 0 to 256", "use the tokenizer that made these tokens")
            if token < 256:
                run.append(token)
            else:
                parts += [run.decode("utf-8", "replace"), EOD_NAMES[0]]
                run.clear()
        return "".join([*parts, run.decode("utf-8", "replace")])

    def special_tokens(self) -> dict[str, int]:
        """See Tokenizer.special_tokens: there are none."""
        return {}

    def continues(self) -> None:
        """See Tokenizer.continues: a byte says nothing of words."""
        return None

    def describe(self) -> dict[str, Any]:
        """See Tokenizer.describe."""
        facts = {"kind": "byte", "path": "byte", "sha256": None, "vocab_size": 257, "eod": 256, "eod_token": EOD_NAMES[0]}
        return {**facts, "special_tokens": {}}

    def files(self) -> dict[str, bytes]:
        """See Tokenizer.files: there are none."""
        return {}


class FileTokenizer:
    """A tokenizer of the `tokenizers` library, read from `files`."""

    def __init__(self, spec: str, inner: Any, files: Sequence[Path], eod_token: str | None) -> None:
        # What the file asks for truncation and padding is for fine-tuning; here it would cut documents in silence.
        inner.no_truncation()
        inner.no_padding()
        self.spec, self._inner, self._files = spec, inner, tuple(files)
        vocabulary: dict[str, int] = inner.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"{spec}: the vocabulary is empty", "train a tokenizer with: megactl data tokenizer train")
        # Ids may have gaps, so the count of tokens is not the size the embedding needs.
        self.vocab_size = max(vocabulary.values()) + 1
        if eod_token is not None and eod_token not in vocabulary:
            raise DataError(f"--eod-token {eod_token!r}: is not in the vocabulary of {spec}", "name a token that is")
        self._eod_token = eod_token or next((name for name in EOD_NAMES if name in vocabulary), None)
        self._eod = vocabulary[self._eod_token] if self._eod_token is not None else None

    @property
    def eod(self) -> int:
        """See Tokenizer.eod."""
        if self._eod is None:
            raise DataError(
                f"{self.spec}: has neither {' nor '.join(EOD_NAMES)}, so the end-of-document token is unknown", "name it with --eod-token"
            )
        return self._eod

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See Tokenizer.encode_batch; int32."""
        # The fast form leaves out character offsets, which cost a third of the time and are not used.
        encoded = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(item.ids, np.int32) for item in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer.decode."""
        values = [int(token) for token in ids]
        bad = next((token for token in values if not 0 <= token < self.vocab_size), None)
        if bad is not None:
            raise DataError(f"token {bad}: {self.spec} has ids 0 to {self.vocab_size - 1}", "use the tokenizer that made these tokens")
        return self._inner.decode(values, skip_special_tokens=False)

    def special_tokens(self) -> dict[str, int]:
        """See Tokenizer.special_tokens."""
        return find_special_tokens(self._inner.token_to_id)

    def continues(self) -> np.ndarray | None:
        """See Tokenizer.continues, by the mark that the file's kind of model sets on tokens."""
        vocabulary: dict[str, int] = self._inner.get_vocab(with_added_tokens=True)
        document = json.loads(self._inner.to_str())
        model = document["model"]
        if model["type"] == "WordPiece":
            return continues_words(vocabulary, self.vocab_size, prefix=model["continuing_subword_prefix"])
        before = json.dumps([document["pre_tokenizer"], document["normalizer"]])
        marks = [mark for name, mark in (("ByteLevel", _BYTE_LEVEL_SPACE), ("Metaspace", WORD_START)) if f'"{name}"' in before]
        return continues_words(vocabulary, self.vocab_size, word_start=marks[0]) if marks else None

    def describe(self) -> dict[str, Any]:
        """See Tokenizer.describe."""
        digest = hashlib.sha256()
        for path in self._files:
            digest.update(path.read_bytes())
        kind = "tokenizer.json" if len(self._files) == 1 else "vocab.json + merges.txt"
        path = os.path.abspath(self.spec)
        return {
            "kind": kind,
            "path": path,
            "sha256": digest.hexdigest(),
            "vocab_size": self.vocab_size,
            "eod": self._eod,
            "eod_token": self._eod_token,
            "special_tokens": self.special_tokens(),
        }

    def files(self) -> dict[str, bytes]:
        """See Tokenizer.files: tokenizer.json, or GPT-2's two without the prefix their names may have."""
        names = ("tokenizer.json",) if len(self._files) == 1 else ("vocab.json", "merges.txt")
        return {name: path.read_bytes() for name, path in zip(names, self._files, strict=True)}


def load_tokenizer(spec: str | Path, *, eod_token: str | None = None, lower_case: bool | None = None) -> Tokenizer:
    """The tokenizer named `byte`, or read from a file or folder. `eod_token` names the end-of-document token where it cannot be guessed.

    `lower_case`: whether a vocab.txt is for text without capitals, where neither it nor a tokenizer_config.json beside it says so.
    Raises DataError for files that are missing, empty, truncated or damaged, MegactlError where the library they need is missing.
    """
    text = str(spec)
    if lower_case is not None and not _is_wordpiece(text):
        flag = "--lower-case" if lower_case else "--no-lower-case"
        raise DataError(f"{flag}: {text} says itself how it treats capitals; only a vocab.txt does not", f"leave {flag} out")
    if text == "byte":
        if eod_token is not None:
            raise DataError(
                f"--eod-token {eod_token!r}: the byte tokenizer has its own end-of-document token (256)", "leave --eod-token out"
            )
        return ByteTokenizer()
    path = Path(text)
    if path.is_dir():
        path = _file_in_folder(path)
    if not path.exists():
        raise DataError(f"tokenizer {text!r}: does not exist", _SPECS)
    if path.suffix == ".txt" and not path.name.endswith("merges.txt"):
        return WordPieceTokenizer(text, path, lower_case=lower_case, eod_token=eod_token)
    if path.suffix == ".model":
        return SentencePieceTokenizer(text, path, eod_token=eod_token)
    if path.name.endswith("vocab.json") or path.name.endswith("merges.txt"):
        return _load_gpt2(text, path, eod_token)
    document = _json_object(path)
    if not isinstance(document.get("model"), dict):
        raise DataError(f"{path}: has no 'model' object, so it is not a tokenizer.json", _SPECS)
    inner = _guarded(path, lambda library: library.Tokenizer.from_file(str(path)))
    return FileTokenizer(text, inner, [path], eod_token)


def load_recorded(spec: str | Path, *, eod_token: str | None, lower_case: bool | None = None) -> Tokenizer:
    """The tokenizer `spec` with what was recorded of its use, as far as its kind leaves that open (`byte` has its own end of document,
    only a vocab.txt does not say how it treats capitals). Raises as `load_tokenizer` does."""
    spec = str(spec)
    wordpiece = spec != "byte" and Path(spec).exists() and _is_wordpiece(spec)
    return load_tokenizer(spec, eod_token=eod_token if spec != "byte" else None, lower_case=lower_case if wordpiece else None)


def _is_wordpiece(spec: str) -> bool:
    path = Path(spec)
    return spec != "byte" and (_file_in_folder(path) if path.is_dir() else path).suffix == ".txt"


def _file_in_folder(folder: Path) -> Path:
    for name in ("tokenizer.json", "vocab.json", "vocab.txt"):
        if (folder / name).exists():
            return folder / name
    models = sorted(folder.glob("*.model"))
    if len(models) == 1:
        return models[0]
    found = f"several .model files ({', '.join(path.name for path in models)})" if models else "no tokenizer file"
    raise DataError(f"{folder}: holds {found}", _SPECS)


def _load_gpt2(spec: str, path: Path, eod_token: str | None) -> FileTokenizer:
    """GPT-2's two files. Their names may share a prefix (gpt2-vocab.json, gpt2-merges.txt)."""
    stem = path.name.removesuffix("vocab.json").removesuffix("merges.txt")
    vocab, merges = path.with_name(stem + "vocab.json"), path.with_name(stem + "merges.txt")
    for file in (vocab, merges):
        if not file.exists():
            raise DataError(f"{file}: does not exist; vocab.json and merges.txt go together", _SPECS)
    vocabulary = _json_object(vocab)
    if any(type(value) is not int or value < 0 for value in vocabulary.values()):
        raise DataError(f"{vocab}: every value must be a token id (a whole number)", "copy the file again")
    _check_merges(merges, vocabulary)
    return FileTokenizer(spec, _guarded(vocab, lambda library: _byte_level(library, vocab, merges)), [vocab, merges], eod_token)


def _check_merges(path: Path, vocabulary: dict[str, Any]) -> None:
    """A truncated merges.txt is still valid line by line; it shows in tokens of the vocabulary that no merge makes."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})", "copy the file again") from error
    made = set()
    for number, line in enumerate(lines, 1):
        if line.startswith("#version") or not line.strip():
            continue
        parts = line.split(" ")
        if len(parts) != 2 or any(part not in vocabulary for part in (*parts, "".join(parts))):
            raise DataError(
                f"{path}:{number}: {line[:60]!r} is not a merge of two tokens of the vocabulary into a third", "copy both files again"
            )
        made.add("".join(parts))
    # Special tokens are made by no merge; all others longer than one symbol are.
    orphans = [
        token for token in vocabulary if len(token) > 1 and token not in made and not (token.startswith("<") and token.endswith(">"))
    ]
    if orphans:
        raise DataError(
            f"{path}: no merge makes {len(orphans)} tokens of the vocabulary, e.g. {orphans[0]!r}: it is truncated", "copy the file again"
        )


def _byte_level(library: Any, vocab: Path, merges: Path) -> Any:
    inner = library.Tokenizer(library.models.BPE.from_file(str(vocab), str(merges)))
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = library.decoders.ByteLevel()
    inner.add_special_tokens([name for name in EOD_NAMES if inner.token_to_id(name) is not None])
    return inner


def _json_object(path: Path) -> dict[str, Any]:
    """A JSON object, parsed here first: the library's own messages for a truncated file name neither file nor reason."""
    try:
        data = path.read_bytes()
        if not data.strip():
            raise DataError(f"{path}: is empty", "copy the file again")
        document = json.loads(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not valid JSON, perhaps truncated ({error})", "copy the file again") from error
    if not isinstance(document, dict):
        raise DataError(f"{path}: must hold one JSON object", _SPECS)
    return document


def _guarded(path: Path, load: Any) -> Any:
    """Run a loader of the library; whatever a damaged file makes it raise becomes a DataError."""
    library = tokenizers_library()
    try:
        return load(library)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # The library's Rust panics derive from BaseException, so that `except Exception` would let them through.
        raise DataError(f"{path}: is not a tokenizer this library can read ({error})", _SPECS) from error
