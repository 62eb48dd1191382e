"""Options made from a schema: Typer's parameters for each flag of each setting, for the commands that take a whole run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from megactl.config.flags import PANELS, Flag, all_flags, help_text, metavar
from megactl.errors import Problem


def parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """One parameter of a command, as Typer reads it from a signature."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def setting_parameters() -> list[inspect.Parameter]:
    """A parameter for each flag of each setting of a run, in panels by section."""
    return [parameter(flag.parameter, flag_annotation(flag, PANELS[flag.setting.section]), None) for flag in all_flags()]


def flag_annotation(flag: Flag, panel: str, help: str | None = None) -> Any:
    """What Typer shows of a flag (`help`: instead of the schema's) and takes for it: None where it was not given."""
    setting = flag.setting
    shown = {"help": help or help_text(setting), "hidden": flag.hidden, "rich_help_panel": panel, "metavar": metavar(setting)}
    if flag.constant is not None:
        return Annotated[bool | None, typer.Option(flag.declaration, **{**shown, "metavar": None})]
    # Numbers arrive as text, so that the loader words every mistake and all of them are reported together.
    kind = {bool: bool | None, tuple: list[str] | None}.get(setting.type, str | None)
    return Annotated[kind, typer.Option(flag.declaration, **shown)]


def dressed(parameters: list[inspect.Parameter], *, help: str, epilog: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """A decorator: the function gets the signature that Typer reads its options from, and `command_options`, which the command takes."""

    def dress(function: Callable[..., int]) -> Callable[..., int]:
        function.__annotations__ = {**{item.name: item.annotation for item in parameters}, "return": int}
        function.__doc__ = help
        vars(function).update(
            __signature__=inspect.Signature(parameters, return_annotation=int),
            # Unknown options are collected and not refused by Typer one at a time.
            command_options={"epilog": epilog, "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True}},
        )
        return function

    return dress


def unknown_options(context: typer.Context, command: str) -> list[Problem]:
    """Words that no option of `command` took. A word after an unknown option is that option's value and no mistake of its own."""
    from megactl.config.load import unknown_flag

    known = [flag for item in context.command.params for flag in (*item.opts, *item.secondary_opts) if flag.startswith("--")]
    problems, after_option = [], False
    for word in context.args:
        is_option = word.startswith("-") and not word[1:2].isdigit()
        if is_option:
            name = word.partition("=")[0]
            problems.append(Problem(name, *unknown_flag(name, known)))
        elif not after_option:
            problems.append(Problem(word, f"{command} takes options only", "put text with spaces in quotes"))
        after_option = is_option and "=" not in word
    return problems
