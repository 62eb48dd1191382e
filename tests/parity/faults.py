"""What a fault is that the comparison must notice, and how one is built into the engine for a while."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from unittest import mock

from parity.cases import Case


@dataclass(frozen=True)
class Mutation:
    """A fault; the layout (tp, pp, dp) that suffers from it; what the deviation is called; other settings the case needs."""

    fault: Callable[[], AbstractContextManager]
    layout: tuple[int, int, int]
    seen_as: str
    settings: dict[str, object] = field(default_factory=dict)

    def case(self) -> Case:
        """The case that suffers from it."""
        tp, pp, dp = self.layout
        return Case(tp=tp, pp=pp, dp=dp, **self.settings)


def patched(owner: object, name: str, make: Callable) -> Callable[[], AbstractContextManager]:
    """A fault that replaces `owner.name` by make(original). The name must exist: a fault that no longer applies must not pass."""
    return lambda: mock.patch.object(owner, name, make(getattr(owner, name)))


def nothing(original: Callable) -> Callable:
    return lambda *arguments, **options: None


def changed(**values: object) -> Callable:
    """The original's result (a dataclass) with other values."""
    return lambda original: lambda *arguments, **options: replace(original(*arguments, **options), **values)


def no_gather(original: Callable) -> Callable:
    return lambda *arguments, **options: SimpleNamespace(wait=lambda: None)


def twice(original: Callable) -> Callable:
    """Done two times."""

    def mutated(*arguments, **options):
        original(*arguments, **options)
        return original(*arguments, **options)

    return mutated
