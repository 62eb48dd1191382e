"""#SBATCH lines as sbatch itself reads them, and options of srun, as getopt splits them. Rules and messages are elsewhere.

Source: `get_argument` and `next_line` of Slurm's src/sbatch/xlate.c and opt.c; what is written here was tried on Slurm 22.05: a comment
may stand behind an option, a # inside an unquoted value cuts it, quotes and backslashes work as in a shell, an option's name may be
shortened, nothing is expanded, and reading ends at the first line that is neither blank nor a comment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from megactl.cluster.slurm_options import PYXIS, Tool, letters, options

Fault = Literal["unknown", "ambiguous", "no-value", "unwanted-value", "stray", "unmatched", "colon"]


@dataclass(frozen=True, slots=True)
class Option:
    """One option as written. `name` is the long name; `fault` says why the tool refuses it (then `name` is as written)."""

    line: int
    name: str
    value: str | None
    written: str
    fault: Fault | None = None
    cut: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """A word of a directive. `cut` is what a # inside it cut off."""

    text: str
    cut: str | None = None


def is_code(line: str) -> bool:
    """Whether sbatch stops reading directives at this line: it is neither blank nor a comment."""
    return bool(line.strip()) and not line.lstrip().startswith("#")


def first_code_line(lines: Sequence[str]) -> int | None:
    """Number (from 1) of the first line that is code; None where there is none."""
    return next((number for number, line in enumerate(lines, start=1) if is_code(line)), None)


def read_directives(lines: Sequence[str]) -> tuple[list[Option], list[int]]:
    """(options of the directives that sbatch reads, in order; numbers of the #SBATCH lines behind the first command, which it ignores)."""
    found: list[Option] = []
    ignored: list[int] = []
    last = first_code_line(lines) or len(lines) + 1
    for number, line in enumerate(lines, start=1):
        if line.startswith("#SBATCH"):
            if number > last:
                ignored.append(number)
            else:
                found += directive(line.removeprefix("#SBATCH"), number)
    return found, ignored


def directive(text: str, line: int) -> Iterator[Option]:
    """The options of one directive; `text` is what stands behind #SBATCH."""
    if text.startswith(":"):
        yield Option(line, "", None, text.strip(), "colon")
        return
    pieces = split(text)
    if pieces is None:
        yield Option(line, "", None, text.strip(), "unmatched")
        return
    yield from take_options(pieces, line, "sbatch", stray=True)[0]


def split(text: str) -> list[Piece] | None:
    """The words of a directive; None where a quote is not closed."""
    pieces: list[Piece] = []
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
        elif text[at] == "#":
            break
        else:
            word, at = _one_word(text, at)
            if word is None:
                return None
            if at < len(text) and text[at] == "#":
                return [*pieces, Piece(word, text[at:].strip())]
            # A lone backslash, which looks like a continuation, is swallowed.
            pieces += [Piece(word)] if word else []
    return pieces


def _one_word(text: str, at: int) -> tuple[str | None, int]:
    """(the word that begins at `at`, or None where its quote is not closed; where it ends)."""
    parts: list[str] = []
    quote = ""
    while at < len(text) and (quote or not (text[at].isspace() or text[at] == "#")):
        letter = text[at]
        if letter == "\\":
            at += 1
            parts.append(text[at : at + 1])
        elif letter == quote:
            quote = ""
        elif not quote and letter in "'\"":
            quote = letter
        else:
            parts.append(letter)
        at += 1
    return (None if quote else "".join(parts)), at


def take_options(pieces: Sequence[Piece], line: int, tool: Tool, *, stray: bool) -> tuple[list[Option], int]:
    """(options among words, as getopt_long takes them; index of the first word behind them).

    With `stray`, words between options are faults; without, the first of them, the program, ends the options.
    """
    queue, found = list(reversed(pieces)), []
    while queue:
        piece = queue[-1]
        if piece.text.startswith("-") and len(piece.text) > 1:
            queue.pop()
            if piece.text == "--" and not stray:
                break
            found += [_long(piece, queue, line, tool)] if piece.text.startswith("--") else _letters(piece, queue, line, tool)
        elif stray:
            queue.pop()
            found.append(Option(line, piece.text, None, piece.text, "stray", piece.cut))
        else:
            break
    return found, len(pieces) - len(queue)


def _long(piece: Piece, queue: list[Piece], line: int, tool: Tool) -> Option:
    written, equals, value = piece.text[2:].partition("=")
    name, known = written, {**options(tool), **dict.fromkeys(PYXIS, "optional")}
    if written not in known:
        close = [candidate for candidate in known if written and candidate.startswith(written)]
        if len(close) != 1:
            return Option(line, written, value if equals else None, piece.text, "ambiguous" if close else "unknown", piece.cut)
        name = close[0]
    takes = known[name]
    if takes == "nothing":
        return Option(line, name, None, piece.text, "unwanted-value" if equals else None, piece.cut)
    if takes == "optional" or equals:
        return Option(line, name, value if equals else None, piece.text, None, piece.cut)
    if not queue:
        return Option(line, name, None, piece.text, "no-value", piece.cut)
    following = queue.pop()
    return Option(line, name, following.text, f"{piece.text} {following.text}", None, following.cut)


def _letters(piece: Piece, queue: list[Piece], line: int, tool: Tool) -> Iterator[Option]:
    known, takes = letters(tool), options(tool)
    rest = piece.text[1:]
    while rest:
        letter, rest = rest[0], rest[1:]
        name = known.get(letter)
        if name is None:
            yield Option(line, f"-{letter}", None, piece.text, "unknown", piece.cut)
            return
        kind = takes[name]
        if kind == "nothing":
            yield Option(line, name, None, f"-{letter}", None, piece.cut)
            continue
        if kind == "optional" or rest:
            yield Option(line, name, rest or None, f"-{letter}{rest}", None, piece.cut)
        elif queue:
            following = queue.pop()
            yield Option(line, name, following.text, f"-{letter} {following.text}", None, following.cut)
        else:
            yield Option(line, name, None, piece.text, "no-value", piece.cut)
        return
