"""How commands hang together: a Typer app with help pages in plain text, and groups that import only the command that was typed.

Typer draws a help page with rich: imports and a table a panel, which for the settings of a run take longer than everything else such a
command does. The pages here have the same parts in plain text, and their examples are never folded, so that they can be copied.
"""

from __future__ import annotations

import importlib
import inspect
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from megactl.commands.common import wants_colour

# Lines longer than this are hard to read; a name wider than _NAME stands on a line of its own.
_WIDEST, _NAME = 110, 34


@dataclass(frozen=True)
class Row:
    """One command: where it lives ("module:attribute": a function, an `App`, or the rows of a group) and its line in the help above it."""

    target: str
    help: str


class Command(TyperCommand):
    """A command whose help is plain text."""

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:
        """Write the page into `formatter`."""
        formatter.write(help_page(self, ctx))


class Group(TyperGroup):
    """Commands under one name. Its help is plain text, and stands before the error where no command was given."""

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:
        """Write the page into `formatter`."""
        formatter.write(help_page(self, ctx))

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """As Typer's. Without any word it shows the help and refuses."""
        if not args and not ctx.resilient_parsing:
            print(ctx.get_help(), end="\n\n", file=sys.stderr)
            ctx.fail(f"a command is missing: one of {', '.join(self.commands)}")
        return super().parse_args(ctx, args)


class App(typer.Typer):
    """A Typer app with the pages above, for itself and its commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=Group, rich_markup_mode=None, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Any:
        """A decorator, as Typer's."""
        return super().command(name, **{"cls": Command, **settings})

    def attach_rows(self, rows: Mapping[str, Row], words: Sequence[str]) -> None:
        """Every command of `rows`; only the one that `words` name is imported, the others are stand-ins that carry their help line."""
        chosen = next((index for index, word in enumerate(words) if not word.startswith("-")), len(words))
        for name, row in rows.items():
            if words[chosen : chosen + 1] == [name]:
                self._attach(name, row, words[chosen + 1 :])
            else:
                self.command(name, help=row.help)(_stand_in)

    def _attach(self, name: str, row: Row, words: Sequence[str]) -> None:
        target = load(row)
        if isinstance(target, Mapping):
            group = App(help=row.help)
            group.attach_rows(target, words)
            target = group
        if isinstance(target, typer.Typer):
            self.add_typer(target, name=name)
        else:
            # A command may carry Typer's own options for itself (its epilog, its context settings).
            self.command(name, **getattr(target, "command_options", {}))(target)


def load(row: Row) -> Any:
    """What a row names, imported."""
    module, _, attribute = row.target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _stand_in() -> None:
    raise AssertionError("a command that was not imported cannot run")


def help_page(command: Any, context: typer.Context) -> str:
    """The page of a command or group: usage, text, arguments, options by panel, commands, epilog. Bold and colour on a terminal only."""
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    bold, name_colour, plain = ("\x1b[1m", "\x1b[36m", "\x1b[0m") if wants_colour(sys.stdout) else ("", "", "")
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    parts = [f"{bold}Usage:{plain} {usage}", *_paragraphs(command.help, width)]
    sections = list(_sections(command, context))
    column = max((len(name) for _, rows in sections for name, _ in rows if len(name) <= _NAME), default=_NAME)
    for title, rows in sections:
        lines = [f"{bold}{title}:{plain}"]
        for name, text in rows:
            folded = _fold(text, width, indent=" " * (column + 4)) if text else ""
            lines += _row(name, folded, column, f"{name_colour}{name}{plain}")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *_paragraphs(command.epilog, width)])


def _sections(command: Any, context: typer.Context) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(title, rows of name and text): arguments first, then options in the order of their panels, then commands."""
    found: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for item in command.get_params(context):
        record = item.get_help_record(context)
        if record is not None:
            kind = "Arguments" if item.param_type_name == "argument" else "Options"
            found.setdefault(getattr(item, "rich_help_panel", None) or kind, []).append(record)
    subcommands = getattr(command, "commands", {}).items()
    found["Commands"] = [(name, _first_paragraph(item.help)) for name, item in subcommands if not item.hidden]
    yield from ((title, rows) for title, rows in found.items() if rows)


def _first_paragraph(text: str | None) -> str:
    return " ".join(inspect.cleandoc(text or "").partition("\n\n")[0].split())


def _paragraphs(text: str | None, width: int) -> Iterator[str]:
    """The paragraphs of a text, folded; what is indented or starts with a command is an example, and stays as it is."""
    for paragraph in inspect.cleandoc(text or "").split("\n\n"):
        if paragraph.startswith((" ", "megactl ")):
            yield paragraph if paragraph.startswith(" ") else f"  {paragraph}"
        elif paragraph:
            yield _fold(" ".join(paragraph.split()), width)


def _row(name: str, folded: str, column: int, shown: str) -> list[str]:
    """The lines of one option or command: its text begins beside the name where the name fits the column, else below it."""
    if len(name) > column or not folded:
        return [f"  {shown}", *([folded] if folded else [])]
    return [f"  {shown}{' ' * (column - len(name))}  {folded.lstrip()}"]


def _fold(text: str, width: int, indent: str = "") -> str:
    # Neither an option nor a path is cut in two.
    width = max(width, len(indent) + 20)
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
