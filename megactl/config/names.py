"""Names as people type them: how two spellings are compared, and the nearest name to a misspelt one. Knows no setting."""

from __future__ import annotations

from collections.abc import Iterable


def normal(word: str) -> str:
    """A name as it is compared: lower case, underscores, no leading dashes."""
    return word.strip().lstrip("-").lower().replace("-", "_")


def nearest(word: str, candidates: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The candidate most like `word`, or None where none is close. Case and the kind of dash do not count."""
    import difflib

    spellings: dict[str, str] = {}
    for candidate in candidates:
        spellings.setdefault(normal(candidate), candidate)
    target = normal(word)
    if target in spellings:
        return spellings[target]
    # Of equally close names the one that starts alike is meant: people mistype the end of a word more often than its beginning.
    close = difflib.get_close_matches(target, spellings, n=4, cutoff=cutoff)
    if not close:
        return None
    best = difflib.SequenceMatcher(None, close[0], target).ratio()
    ties = [item for item in close if difflib.SequenceMatcher(None, item, target).ratio() > best - 1e-9]
    return spellings[max(ties, key=lambda item: len(_common_prefix(item, target)))]


def _common_prefix(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]
