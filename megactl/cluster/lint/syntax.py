"""What the reader of bash finds: commands, words, assignments, here-documents, comments."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Expansion:
    """What the shell would replace: `name` for `$NAME` and `${NAME...}`, None for `$(...)` and backticks; `text` as it is written."""

    text: str
    name: str | None
    line: int
    quoted: bool


@dataclass(frozen=True, slots=True)
class Word:
    """One word. `text` is what remains after quotes are removed, expansions as written; `expansions` are those that are alive
    (neither escaped nor in single quotes)."""

    raw: str
    text: str
    line: int
    expansions: tuple[Expansion, ...] = ()

    @property
    def quoted(self) -> bool:
        """Whether any part of it stands in quotes."""
        return "'" in self.raw or '"' in self.raw


@dataclass(frozen=True, slots=True)
class Assignment:
    """NAME=value, or NAME+=value with `append`; an array's elements are in `elements`, `value` is then their texts joined by spaces."""

    name: str
    value: Word
    elements: tuple[Word, ...] = ()
    append: bool = False

    @property
    def line(self) -> int:
        """Line of the name."""
        return self.value.line

    @property
    def words(self) -> tuple[Word, ...]:
        """The value's words: the elements of an array, or the one word."""
        return self.elements or (self.value,)


@dataclass(slots=True)
class Heredoc:
    """A here-document. `line` is that of its first body line; `quoted` bodies are not expanded."""

    delimiter: str
    quoted: bool
    strip_tabs: bool
    body: str = ""
    line: int = 0
    expansions: tuple[Expansion, ...] = ()


@dataclass(slots=True)
class Command:
    """A simple command. `before` is the keyword or operator in front of it, `after` the operator behind it, `depth` how many
    compound commands (if, loops, braces, parentheses) it stands in."""

    line: int
    before: str
    depth: int
    words: list[Word] = field(default_factory=list)
    assignments: list[Assignment] = field(default_factory=list)
    redirections: list[tuple[str, Word]] = field(default_factory=list)
    heredocs: list[Heredoc] = field(default_factory=list)
    after: str = ""

    @property
    def text(self) -> str:
        """Its words, quotes removed, separated by spaces."""
        return " ".join(word.text for word in self.words)


@dataclass(frozen=True, slots=True)
class Comment:
    """A comment. `continued` where the line above ended in a backslash, so that the comment cuts that command in two."""

    line: int
    text: str
    continued: bool


@dataclass(frozen=True, slots=True)
class Parsed:
    """What `parse` found. `unclosed` are (line, what was opened and never closed)."""

    commands: tuple[Command, ...]
    comments: tuple[Comment, ...]
    unclosed: tuple[tuple[int, str], ...]
