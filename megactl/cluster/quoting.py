"""The one gate between a user's value and a script: text that has passed `quote` is `Safe`, and templates print nothing else.

`shlex.quote` alone is not enough: a shell reads an #SBATCH line as a comment, which a line break inside the value would end, so
that the rest of the value became a command or a directive of its own.
"""

from __future__ import annotations

import re
import shlex
from typing import Literal

from megactl.errors import ConfigError, Problem

Place = Literal["shell", "directive", "comment"]

# What sbatch takes as it stands: no space (ends the option), no quote, no #, nothing that a shell would expand.
_DIRECTIVE = re.compile(r"[A-Za-z0-9_./%\[(][A-Za-z0-9_.,:/@%+=~^\[\]()&|*-]*", re.ASCII)
_DIRECTIVE_CHARACTERS = "letters, digits and any of _ . , : / @ % + = ~ ^ [ ] ( ) & | * -"
# The kernel takes at most 128 KiB in one argument (MAX_ARG_STRLEN); sbatch cuts long directives without a word.
_MOST_BYTES: dict[Place, int] = {"shell": 100_000, "directive": 1_000, "comment": 1_000}


class Safe(str):
    """Text that may stand in a script as it is."""

    __slots__ = ()


def broken_rule(value: str, place: Place) -> str | None:
    """The rule that `value` breaks as a word of a shell command, the value of a directive or part of a comment; None where it may stand.

    One line of printable characters everywhere (spaces count, other white space and control characters do not).
    """
    odd = next((letter for letter in value if not letter.isprintable()), None)
    if odd is not None:
        return f"must be one line of printable text, and holds U+{ord(odd):04X}"
    if len(value.encode()) > _MOST_BYTES[place]:
        return f"must be at most {_MOST_BYTES[place]} bytes long, and has {len(value.encode())}"
    if place != "directive":
        return None
    if not value:
        return "must not be empty"
    if value.startswith("-"):
        return "must not begin with a dash, which would make it an option"
    if not _DIRECTIVE.fullmatch(value):
        return f"an #SBATCH line cannot be quoted, so it takes {_DIRECTIVE_CHARACTERS} only"
    return None


def quote(value: str | int, place: Place, *, name: str) -> Safe:
    """`value` as it may stand at `place`. Raises ConfigError that calls it `name` and says the rule."""
    if isinstance(value, int):
        return Safe(value)
    rule = broken_rule(value, place)
    if rule is not None:
        raise ConfigError([Problem(f"{name} {shown(value)}", rule, "use another value")])
    return Safe(shlex.quote(value) if place == "shell" else value)


def directive(option: str, value: str | int | None = None) -> Safe:
    """An option of sbatch (without dashes) as it stands in a directive; None for an option that takes no value."""
    assert re.fullmatch(r"[a-z][a-z-]*", option), option
    return Safe(f"--{option}" if value is None else f"--{option}={quote(value, 'directive', name=f'--{option}')}")


def words(*values: str) -> Safe:
    """Words of a command, each quoted for the shell."""
    return Safe(" ".join(quote(value, "shell", name="the command's word") for value in values))


def shown(value: str) -> str:
    """A value as a message names it: control characters visible, long ones cut."""
    text = value if value.isprintable() and value else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
