"""Defaults < preset < TOML file < environment < flags and --set: one Run, where every value came from, and every mistake at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megactl.config.absent import absent
from megactl.config.coerce import CoercionError, coerce
from megactl.config.names import nearest, normal
from megactl.config.presets import preset_problem, preset_values
from megactl.config.schema import SCHEMA_VERSION, SECTIONS, Run
from megactl.config.settings import Setting, all_settings, names_by_alias, replace
from megactl.config.toml_file import TomlFile, read_toml
from megactl.errors import ConfigError, Problem

# Top-level keys of a TOML file that are no section of a run. [derived] is the record of a finished run: it is computed anew, never read
# back. [slurm] says how a job is asked for, and `megactl slurm render` checks it; one file serves both commands.
_TOP_LEVEL = ("preset", "schema_version", "derived", "slurm")


@dataclass(frozen=True)
class Loaded:
    """A Run as the user set it. `origins` says of every setting where its value came from: "default", "preset NAME", "FILE:LINE",
    "env NAME", "flag --x" or "--set NAME"."""

    run: Run
    origins: dict[str, str]

    def is_set(self, name: str) -> bool:
        """True where the user set `name` (not its default, not the preset)."""
        return not self.origins[name].startswith(("default", "preset "))


@dataclass
class Layers:
    """Values and origins gathered from the lowest layer to the highest, and the mistakes found on the way."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def put(self, setting: Setting, value: Any, origin: str, shown: str, *, typed: bool = False) -> None:
        """Add one value, or the problem with it; `shown` is how the message names it."""
        try:
            self.values[setting.name] = coerce(setting, value, typed=typed)
            self.origins[setting.name] = origin
        except CoercionError as error:
            self.problems.append(Problem(shown, error.rule, error.instead))

    def unknown(self, where: str, rule: str, instead: str | None) -> None:
        self.problems.append(Problem(where, rule, instead))


def load(
    *,
    preset: str | None = None,
    config: str | None = None,
    assignments: Sequence[str] = (),
    flags: Mapping[str, tuple[str, Any]] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """Build a Run.

    `config`: path of a TOML file. `assignments`: "section.key=value" as given to --set. `flags`: dotted name -> (flag as typed, value).
    `environ`: where MEGACTL_<SECTION>_<KEY> is looked up. Raises ConfigError holding every mistake of every layer.
    """
    layers = Layers(origins={name: "default" for name in all_settings()})
    environ = environ or {}
    file = _read(config, layers)
    chosen = _preset(preset, file, environ, layers)
    if chosen is not None:
        layers.values.update(preset_values(chosen))
        layers.origins.update({name: f"preset {chosen}" for name in preset_values(chosen)})
    if file is not None:
        _from_file(file, layers)
    _from_environment(environ, layers)
    for name, (flag, value) in (flags or {}).items():
        layers.put(all_settings()[name], value, f"flag {flag}", f"{flag} {value}")
    for assignment in assignments:
        _from_assignment(assignment, layers)
    if layers.problems:
        raise ConfigError(layers.problems)
    run = replace(Run(preset=chosen), layers.values)
    return Loaded(run, layers.origins)


def _read(config: str | None, layers: Layers) -> TomlFile | None:
    if config is None:
        return None
    try:
        return read_toml(config)
    except ConfigError as error:
        layers.problems.extend(error.problems)
        return None


def _preset(flag: str | None, file: TomlFile | None, environ: Mapping[str, str], layers: Layers) -> str | None:
    """The preset's name from the highest layer that names one; an unknown name is a problem and counts as none."""
    from_file = file.document.get("preset") if file is not None else None
    if flag is not None:
        name, where = flag, f"--preset {flag}"
    elif environ.get("MEGACTL_PRESET"):
        name, where = environ["MEGACTL_PRESET"], f"MEGACTL_PRESET={environ['MEGACTL_PRESET']}"
    elif from_file is not None:
        assert file is not None
        name, where = from_file, f"{file.where('preset')}: preset = {shown_value(from_file)}"
    else:
        return None
    problem = preset_problem(name, where) if isinstance(name, str) else Problem(where, "must be text, the name of a preset")
    if problem is not None:
        layers.problems.append(problem)
        return None
    return name


def _from_file(file: TomlFile, layers: Layers) -> None:
    version = file.document.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION or isinstance(version, bool):
        rule = f"this megactl reads schema_version {SCHEMA_VERSION}"
        layers.unknown(
            f"{file.where('schema_version')}: schema_version = {shown_value(version)}", rule, "use the megactl that wrote the file"
        )
        return
    for section, content in file.document.items():
        if section in _TOP_LEVEL:
            continue
        where = file.where(section)
        if section not in SECTIONS:
            layers.unknown(f"{where}: [{section}]" if isinstance(content, dict) else f"{where}: {section}", *_unknown_section(section))
        elif not isinstance(content, dict):
            layers.unknown(f"{where}: {section} = {shown_value(content)}", "must be a table", f"write [{section}] and its keys below")
        else:
            _from_section(file, section, content, layers)


def _from_section(file: TomlFile, section: str, content: Mapping[str, Any], layers: Layers) -> None:
    for key, value in content.items():
        name = f"{section}.{key}"
        setting = all_settings().get(name)
        where = file.where(name)
        if setting is None:
            layers.unknown(f"{where}: {name}", *_unknown_key(section, key))
        else:
            layers.put(setting, value, where, f"{where}: {name} = {shown_value(value)}", typed=True)


def _from_environment(environ: Mapping[str, str], layers: Layers) -> None:
    variables = {setting.variable: setting for setting in all_settings().values()}
    for variable in sorted(environ):
        value = environ[variable]
        # An empty variable counts as one that is not set, as in the shell.
        if not variable.startswith("MEGACTL_") or not value:
            continue
        if variable in variables:
            layers.put(variables[variable], value, f"env {variable}", f"{variable}={value}")
        elif (meant := _misspelt_variable(variable, variables)) is not None:
            layers.unknown(f"{variable}={value}", "no such setting", f"did you mean {meant}?")


def _misspelt_variable(variable: str, variables: Iterable[str]) -> str | None:
    """The setting that `variable` seems to mean, or None: MEGACTL_ is also the prefix of switches (MEGACTL_OPS) that are no settings."""
    rest = normal(variable.removeprefix("MEGACTL_"))
    if rest in names_by_alias():
        return all_settings()[names_by_alias()[rest]].variable
    section, _, key = rest.partition("_")
    close = nearest(section, SECTIONS, cutoff=0.8)
    if close is None:
        return None
    meant = names_by_alias().get(key)
    return all_settings()[meant].variable if meant else nearest(f"MEGACTL_{close}_{key}", variables, cutoff=0.0)


def _from_assignment(text: str, layers: Layers) -> None:
    name, equals, value = text.partition("=")
    name = name.strip()
    setting = all_settings().get(name)
    if not equals:
        layers.unknown(f"--set {text}", "must be section.key=value", _assignment_hint(name))
    elif setting is not None:
        layers.put(setting, value, f"--set {name}", f"--set {text}")
    elif name == "preset":
        layers.unknown(f"--set {text}", "a preset is no setting of a section", f"use --preset {value}")
    elif "." not in name:
        layers.unknown(f"--set {text}", "must be section.key=value", _assignment_hint(name))
    else:
        section, _, key = name.partition(".")
        layers.unknown(f"--set {text}", *(_unknown_key(section, key) if section in SECTIONS else _unknown_dotted(section, key)))


def _assignment_hint(name: str) -> str:
    if name in all_settings():
        return f"write {name}=VALUE"
    meant = names_by_alias().get(normal(name)) or nearest(name, all_settings())
    return f"did you mean {meant}=VALUE?" if meant else "such as --set optimizer.lr=3e-4"


def _unknown_section(section: str) -> tuple[str, str | None]:
    if (meant := names_by_alias().get(normal(section))) is not None:
        table, _, key = meant.partition(".")
        return "no such section", f"write it as {key} below [{table}]"
    if (found := absent(section)) is not None:
        return found
    close = nearest(section, SECTIONS)
    return "no such section", f"did you mean [{close}]?" if close else f"use one of {', '.join(SECTIONS)}"


def _unknown_dotted(section: str, key: str) -> tuple[str, str | None]:
    """--set with an unknown section: a key that exists settles which section is meant."""
    meant = names_by_alias().get(normal(key))
    close = nearest(section, SECTIONS)
    if meant is None and close is not None:
        meant = nearest(f"{close}.{key}", all_settings())
    return f"no section {section}", f"did you mean {meant}?" if meant else f"use one of {', '.join(SECTIONS)}"


def _unknown_key(section: str, key: str) -> tuple[str, str | None]:
    """Rule and suggestion for a key that `section` has not: another spelling, another section, another system's name, or the nearest."""
    rule = f"[{section}] has no such setting"
    aliases = names_by_alias()
    meant = aliases.get(normal(key))
    if meant is not None:
        return rule, f"did you mean {meant}?"
    if (found := absent(key)) is not None:
        return found
    here = [spelling for spelling, name in aliases.items() if name.startswith(f"{section}.")]
    close = nearest(key, here) or nearest(key, aliases, cutoff=0.75)
    if close is not None:
        return rule, f"did you mean {aliases[close]}?"
    return rule, f"it has {', '.join(item.key for item in all_settings().values() if item.section == section)}"


def unknown_flag(flag: str, known: Iterable[str]) -> tuple[str, str | None]:
    """Rule and suggestion for an option that a command has not; `known` are the options it has."""
    found = absent(flag)
    close = nearest(flag, known)
    if found is not None and (close is None or normal(close) != normal(flag)):
        return found
    return "no such option", f"did you mean {close}?" if close else None


def shown_value(value: Any) -> str:
    """A value of a TOML file as a message repeats it."""
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
