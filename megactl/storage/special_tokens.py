"""Tokens with a meaning of their own, by the names under which vocabularies carry them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from megactl.errors import DataError

EOD_NAMES = ("<|endoftext|>", "</s>")
# Role: names, BERT's first. RoBERTa's and ALBERT's follow.
ROLES: dict[str, tuple[str, ...]] = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}


class PairTokens(NamedTuple):
    """Ids that a BERT sample is put together with."""

    cls: int
    sep: int
    mask: int
    pad: int


class HasSpecialTokens(Protocol):
    """The part of a tokenizer that this module reads."""

    spec: str

    def special_tokens(self) -> dict[str, int]:
        """Ids of the roles (see ROLES) that the vocabulary has."""


def find_special_tokens(token_id: Callable[[str], int | None]) -> dict[str, int]:
    """The id of each role; `token_id` gives that of a token, or None. Roles that no name fits are left out."""
    found = {role: [number for name in names if (number := token_id(name)) is not None] for role, names in ROLES.items()}
    return {role: numbers[0] for role, numbers in found.items() if numbers}


def pair_tokens(tokenizer: HasSpecialTokens) -> PairTokens:
    """The ids BERT needs. Raises DataError naming those that the vocabulary lacks."""
    found = tokenizer.special_tokens()
    missing = [ROLES[role][0] for role in PairTokens._fields if role not in found]
    if missing:
        hint = "use a vocabulary made for BERT, or train one: megactl data tokenizer train --kind wordpiece"
        raise DataError(f"tokenizer {tokenizer.spec}: has no {', '.join(missing)}, which BERT's samples are put together with", hint)
    return PairTokens(**{role: found[role] for role in PairTokens._fields})


def continues_words(tokens: dict[str, int], size: int, *, prefix: str | None = None, word_start: str | None = None) -> np.ndarray:
    """bool [size]: the tokens that go on with a word, by a mark they carry (`prefix`) or by the mark of first ones that they lack.

    Special tokens, which carry neither, stand alone.
    """
    assert (prefix is None) != (word_start is None)
    flags = np.zeros(size, bool)
    special = {name for names in ROLES.values() for name in names}.union(EOD_NAMES)
    for token, number in tokens.items():
        if token not in special:
            flags[number] = token.startswith(prefix) if prefix is not None else not token.startswith(word_start or "")
    return flags
