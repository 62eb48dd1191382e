"""JSON from a file nobody vouches for: every departure from what is expected is one CheckpointError, never a KeyError later."""

from __future__ import annotations

import json
from typing import Any

from megactl.errors import CheckpointError

DAMAGED = "the file was damaged or edited by hand; use another checkpoint (megactl checkpoint verify says which are good)"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key given twice: Python keeps the last one, other readers the first, so the two would disagree on the content."""
    document = dict(pairs)
    if len(document) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return document


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def loads(data: bytes, source: str) -> Any:
    """Parse UTF-8 JSON strictly. `source` names the file in messages. Raises CheckpointError, also for absurd nesting or digits."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: not valid JSON ({error})", DAMAGED) from None


class Fields:
    """One JSON object being read: each `take` removes a key, `done` refuses what is left over."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise CheckpointError(f"{where} = {_short(value)}: must be an object", DAMAGED)
        self.values = dict(value)
        self.where = where

    def error(self, key: str, value: Any, rule: str) -> CheckpointError:
        """The error for `key`, in the house's pattern; returned, so that the caller's `raise` is visible."""
        return CheckpointError(f"{self.where}.{key} = {_short(value)}: {rule}", DAMAGED)

    def take(self, key: str) -> Any:
        """The value of a required key."""
        if key not in self.values:
            raise CheckpointError(f"{self.where}: has no '{key}', which is required", DAMAGED)
        return self.values.pop(key)

    def integer(self, key: str, minimum: int = 0) -> int:
        """A whole number of at least `minimum`; true and 1.0 are not whole numbers."""
        value = self.take(key)
        if type(value) is not int or value < minimum:
            raise self.error(key, value, f"must be a whole number of at least {minimum}")
        return value

    def text(self, key: str) -> str:
        """A string."""
        value = self.take(key)
        if not isinstance(value, str):
            raise self.error(key, value, "must be a string")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        """A string out of a closed list."""
        value = self.text(key)
        if value not in choices:
            raise self.error(key, value, f"must be one of {', '.join(choices)}")
        return value

    def items(self, key: str) -> list[Any]:
        """A list."""
        value = self.take(key)
        if not isinstance(value, list):
            raise self.error(key, value, "must be a list")
        return value

    def integers(self, key: str, minimum: int = 1) -> tuple[int, ...]:
        """A list of whole numbers of at least `minimum`: a shape."""
        value = self.items(key)
        if any(type(item) is not int or item < minimum for item in value):
            raise self.error(key, value, f"must be a list of whole numbers of at least {minimum}")
        return tuple(value)

    def mapping(self, key: str) -> dict[str, Any]:
        """An object whose content belongs to someone else."""
        value = self.take(key)
        if not isinstance(value, dict):
            raise self.error(key, value, "must be an object")
        return value

    def section(self, key: str) -> Fields:
        """An object to be read in turn."""
        return Fields(self.take(key), f"{self.where}.{key}")

    def done(self) -> None:
        """Refuse keys nobody took: a reader that skips what it does not know cannot promise a faithful load."""
        if self.values:
            raise CheckpointError(f"{self.where}: unknown key '{next(iter(self.values))}'", DAMAGED)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
