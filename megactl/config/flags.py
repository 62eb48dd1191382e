"""The command line's options for the settings, as plain data: which flags, what they show. `commands` turns them into Typer options."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megactl.config.settings import Setting, all_settings
from megactl.errors import ConfigError, Problem

PANELS = {
    "model": "Model",
    "parallel": "Parallelism",
    "memory": "Memory",
    "training": "Training",
    "optimizer": "Optimizer and learning rate",
    "data": "Data",
    "checkpoint": "Checkpoints",
    "logging": "Logging",
}


@dataclass(frozen=True)
class Flag:
    """One option: `parameter` is its Python name, `declaration` what Typer takes ("--x" or "--x/--no-x"). Aliases are hidden in help.

    `constant`: the option takes no value and stands for this one, such as Megatron's --swiglu for --activation swiglu.
    """

    setting: Setting
    parameter: str
    declaration: str
    hidden: bool
    constant: str | None = None

    @property
    def name(self) -> str:
        """The flag as a user types it."""
        return self.declaration.partition("/")[0]


def all_flags() -> Iterator[Flag]:
    """An option for each flag of each setting of a run."""
    return flags_of(all_settings().values())


def flags_of(settings: Iterable[Setting]) -> Iterator[Flag]:
    """An option for each flag of each setting. An alias is an option of its own, so that `--tp 2 --tensor-parallel 4` is seen."""
    for setting in settings:
        for index, declaration in enumerate(setting.flags):
            parameter = f"{setting.section}__{setting.key}__{index}"
            if setting.type is bool and index == 0 and "/" not in declaration:
                # The --no- form takes back what a file or a preset has set.
                declaration = f"{declaration}/--no-{declaration.removeprefix('--')}"
            # An alias that is the name of a choice is a switch.
            word = declaration.removeprefix("--")
            yield Flag(setting, parameter, declaration, hidden=index > 0, constant=word if index and word in setting.choices else None)


def metavar(setting: Setting) -> str | None:
    """What stands for the value in help."""
    if setting.type is bool:
        return None
    return setting.metavar or "|".join(setting.choices) or {int: "N", float: "X"}.get(setting.type, "TEXT")


def help_text(setting: Setting) -> str:
    """The setting's help with its default, unless the text says it already."""
    text = setting.help[0].upper() + setting.help[1:]
    if setting.default in (None, ()) or "(default" in text:
        return text
    if setting.type is bool:
        return f"{text} (default on)" if setting.default else text
    default = f"{setting.default:g}" if setting.type is float else setting.default
    return f"{text} (default {default})"


def given(values: Mapping[str, Any], flags: Iterable[Flag] | None = None) -> dict[str, tuple[str, Any]]:
    """Dotted name -> (flag as typed, value) of the options that were given; `values` by `Flag.parameter`, `flags` those of a run.

    Raises ConfigError where two spellings of one setting were given different values.
    """
    found: dict[str, tuple[str, Any]] = {}
    problems = []
    for flag in all_flags() if flags is None else flags:
        value = values.get(flag.parameter)
        # A repeatable option that was not given is an empty list in some versions of Typer.
        if value is None or value == []:
            continue
        name = flag.setting.name
        value = value if flag.constant is None else flag.constant
        typed = flag.name if value is not False else flag.declaration.partition("/")[2] or flag.name
        if name in found and found[name][1] != value:
            other = found[name]
            problems.append(Problem(f"{typed} {value}", f"is the same setting as {other[0]} {other[1]}", "leave one out"))
        found.setdefault(name, (typed, value))
    if problems:
        raise ConfigError(problems)
    return found


def reference() -> str:
    """Every setting as Markdown tables, one a section: the body of the configuration page's reference."""
    lines: list[str] = []
    for section, title in PANELS.items():
        rows = reference_table(setting for setting in all_settings().values() if setting.section == section)
        lines += [f"### [{section}] {title}", "", *rows, ""]
    return "\n".join(lines)


def reference_table(settings: Iterable[Setting]) -> list[str]:
    """Settings as the lines of one Markdown table."""
    header = ["| key | flags | values | default | meaning |", "| --- | --- | --- | --- | --- |"]
    return header + [_reference_row(setting) for setting in settings]


def _reference_row(setting: Setting) -> str:
    flags = " ".join(f"`{flag}`" for flag in setting.flags)
    values = (
        ", ".join(f"`{choice}`" for choice in setting.choices)
        or {bool: "true, false", int: "integer", float: "number", str: "text", tuple: "list of text"}[setting.type]
    )
    default = "" if setting.default in (None, ()) else f"`{str(setting.default).lower() if setting.type is bool else setting.default}`"
    return f"| `{setting.key}` | {flags} | {values} | {default} | {setting.help.replace('|', '/')} |"
