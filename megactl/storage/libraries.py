"""Tokenizer libraries that are not installed with `megactl` alone, imported where they are needed."""

from __future__ import annotations

from typing import Any

from megactl.errors import MegactlError


def tokenizers_library() -> Any:
    """The `tokenizers` module. Raises MegactlError that says how to install it."""
    try:
        import tokenizers
    except ImportError as error:
        raise MegactlError(
            f"the 'tokenizers' library is needed for this tokenizer ({error})", 'pip install "megactl[train]", or use --tokenizer byte'
        ) from error
    return tokenizers


def sentencepiece_library() -> Any:
    """The `sentencepiece` module. Raises MegactlError that says how to install it."""
    try:
        import sentencepiece
    except ImportError as error:
        raise MegactlError(
            f"the 'sentencepiece' library is needed for a .model file ({error})", 'pip install "megactl[sentencepiece]"'
        ) from error
    return sentencepiece
