"""The schema seen as a flat list of settings: names, types, flags."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megactl.config.names import normal
from megactl.config.schema import SECTIONS, Run


@dataclass(frozen=True)
class Setting:
    """One field of the schema. `name` is "section.key"; `type` is bool, int, float, str or tuple (of texts).

    `optional` where None means "derive it".
    """

    section: str
    key: str
    type: type
    optional: bool
    default: Any
    help: str
    flags: tuple[str, ...]
    choices: tuple[str, ...]
    metavar: str | None

    @property
    def name(self) -> str:
        """The dotted name, as in `--set section.key=value`."""
        return f"{self.section}.{self.key}"

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return f"MEGACTL_{self.section}_{self.key}".upper()

    @property
    def flag(self) -> str:
        """The flag shown to users, without the --no- form."""
        return self.flags[0].partition("/")[0]

    def read(self, run: Run) -> Any:
        """This setting's value in `run`."""
        return getattr(getattr(run, self.section), self.key)


@functools.cache
def all_settings() -> dict[str, Setting]:
    """Every setting by its dotted name, in the order of the schema."""
    return {setting.name: setting for section, cls in SECTIONS.items() for setting in settings_of(section, cls)}


def settings_of(section: str, cls: type) -> Iterable[Setting]:
    """The settings of one dataclass made with `schema.setting`. A field of tuple[str, ...] has the type tuple."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        hint, optional = hints[item.name], False
        if isinstance(hint, types.UnionType):
            (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
            optional = True
        hint = typing.get_origin(hint) or hint
        meta = item.metadata
        yield Setting(section, item.name, hint, optional, item.default, meta["help"], meta["flags"], meta["choices"], meta["metavar"])


@functools.cache
def names_by_alias() -> dict[str, str]:
    """Every spelling of a setting (key, flag without dashes, Megatron's name) in lower case with underscores -> its dotted name."""
    found: dict[str, str] = {}
    for setting in all_settings().values():
        spellings = [setting.key, *(flag for flags in setting.flags for flag in flags.split("/"))]
        found.update((normal(spelling), setting.name) for spelling in spellings)
    return found


def replace(run: Run, values: dict[str, Any]) -> Run:
    """`run` with the given dotted settings changed ("model.hidden_size": 64); the values must be of the right type already."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    changed = {section: dataclasses.replace(getattr(run, section), **keys) for section, keys in sections.items()}
    return dataclasses.replace(run, **changed)
