"""Defaults < cluster file < TOML file < environment < flags and --set: one Slurm, each value's origin, and all mistakes at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megactl.cluster.quoting import shown
from megactl.cluster.settings import PAIRS, SECTION, Slurm, defaults, is_list, slurm_settings
from megactl.cluster.slurm_options import options
from megactl.config.coerce import CoercionError, coerce
from megactl.config.load import Layers, shown_value
from megactl.config.names import nearest, normal
from megactl.config.settings import Setting
from megactl.config.toml_file import TomlFile, read_toml
from megactl.errors import ConfigError, Problem


@dataclass(frozen=True)
class LoadedCluster:
    """Cluster settings as the user set them. `origins`: key -> "default", "FILE:LINE", "env NAME", "flag --x" or "--set NAME"."""

    slurm: Slurm
    origins: dict[str, str]

    def show(self, key: str, value: Any = None) -> str:
        """A setting as a message names it: "--time 25h", with where it came from when that was not the command line."""
        item, origin = slurm_settings()[f"{SECTION}.{key}"], self.origins[key]
        value = getattr(self.slurm, key) if value is None else value
        if item.type is bool:
            text = item.flag if value else f"--no-{item.flag.removeprefix('--')}"
        else:
            text = f"{item.flag} {value}" if value not in (None, ()) else item.flag
        text = shown(text)
        return text if origin.startswith(("flag ", "--set ", "default")) else f"{text} ({origin})"


def load_cluster(
    *,
    cluster: str | None = None,
    config: str | None = None,
    assignments: Sequence[str] = (),
    flags: Mapping[str, tuple[str, Any]] | None = None,
    environ: Mapping[str, str] | None = None,
    layer_defaults: Mapping[str, Any] | None = None,
) -> LoadedCluster:
    """Read the cluster settings.

    `cluster`: a TOML file that holds [slurm] alone. `config`: a TOML file of a run, whose [slurm] is read. `assignments`: those of
    --set that begin with "slurm.". `flags`: key -> (flag as typed, value; a list for a repeatable one). `layer_defaults`: key -> value
    below everything the user set. Raises ConfigError holding every mistake.
    """
    layers = Layers()
    layers.values.update(layer_defaults or {})
    for path in filter(None, (cluster, config)):
        _from_file(path, layers, alone=path == cluster)
    for item in slurm_settings().values():
        text = (environ or {}).get(item.variable)
        if text:
            _put(item, text, f"env {item.variable}", f"{item.variable} =", layers)
    for key, (flag, value) in (flags or {}).items():
        _put(slurm_settings()[f"{SECTION}.{key}"], value, f"flag {flag}", flag, layers)
    for text in assignments:
        _from_assignment(text, layers)
    if layers.problems:
        raise ConfigError(layers.problems)
    origins = {key: layers.origins.get(f"{SECTION}.{key}", "default") for key in defaults()}
    return LoadedCluster(dataclasses.replace(Slurm(), **layers.values), origins)


def _put(item: Setting, value: Any, origin: str, where: str, layers: Layers, *, typed: bool = False) -> None:
    """Add one value, or the problem with it; `where` is how the message names its place, "--account" or "FILE:LINE: slurm.account ="."""
    try:
        found = _several(item, value, typed) if is_list(item) else coerce(item, value, typed=typed)
    except CoercionError as error:
        layers.problems.append(Problem(f"{where} {shown(_culprit(item, value, typed))}", error.rule, error.instead))
        return
    if item.key in PAIRS:
        found = _merged(layers.values.get(item.key, ()), found)
    layers.values[item.key] = found
    layers.origins[item.name] = origin


def _culprit(item: Setting, value: Any, typed: bool) -> str:
    """The value that cannot be taken, as text: of several the first one."""
    if is_list(item) and isinstance(value, (list, tuple)):
        for entry in value:
            try:
                coerce(dataclasses.replace(item, type=str), entry, typed=typed)
            except CoercionError:
                return str(entry)
    return value if isinstance(value, str) else shown_value(value)


def _several(item: Setting, value: Any, typed: bool) -> tuple[str, ...]:
    """The values of a repeatable setting: a list, one text, or for KEY=VALUE settings a table."""
    if isinstance(value, Mapping) and item.key in PAIRS:
        value = [key if entry is True else f"{key}={entry}" for key, entry in value.items()]
    entries = list(value) if isinstance(value, (list, tuple)) else [value]
    one = dataclasses.replace(item, type=str)
    found = tuple(coerce(one, entry, typed=typed) for entry in entries)
    keys = [entry.partition("=")[0] for entry in found]
    twice = next((key for key in keys if item.key in PAIRS and keys.count(key) > 1), None)
    if twice is not None:
        raise CoercionError(f"gives {twice} twice", "leave one out")
    return found


def _merged(lower: Sequence[str], upper: Sequence[str]) -> tuple[str, ...]:
    """KEY=VALUE entries of two layers: the upper one's value for each key."""
    return tuple({entry.partition("=")[0]: entry for entry in (*lower, *upper)}.values())


def _from_file(path: str, layers: Layers, *, alone: bool) -> None:
    try:
        file = read_toml(path)
    except ConfigError as error:
        # The run's own loader reads --config as well, and says what is wrong with it.
        layers.problems += error.problems if alone else ()
        return
    content = file.document.get(SECTION)
    if alone:
        others = [name for name in file.document if name not in (SECTION, "schema_version")]
        layers.problems += [
            Problem(f"{file.where(name)}: {name}", "a cluster file holds [slurm] alone", "use --config for a run") for name in others
        ]
    if content is None and alone:
        layers.problems.append(Problem(f"--cluster {path}", "has no [slurm] section", "put its settings below a line [slurm]"))
    elif content is not None and not isinstance(content, dict):
        layers.problems.append(Problem(f"{file.where(SECTION)}: slurm = {shown_value(content)}", "must be a table", "write [slurm]"))
    elif content is not None:
        _from_section(file, content, layers)


def _from_section(file: TomlFile, content: Mapping[str, Any], layers: Layers) -> None:
    for key, value in content.items():
        name = f"{SECTION}.{key}"
        where = file.where(name)
        if name in slurm_settings():
            _put(slurm_settings()[name], value, where, f"{where}: {name} =", layers, typed=True)
        else:
            layers.unknown(f"{where}: {name}", *_unknown_key(key))


def _from_assignment(text: str, layers: Layers) -> None:
    name, equals, value = text.partition("=")
    item = slurm_settings().get(name.strip())
    if not equals:
        layers.unknown(f"--set {text}", "must be section.key=value", "such as --set slurm.account=physics")
    elif item is None:
        layers.unknown(f"--set {text}", *_unknown_key(name.strip().partition(".")[2]))
    else:
        _put(item, value, f"--set {name}", f"--set {name} =", layers)


def _unknown_key(key: str) -> tuple[str, str | None]:
    """Rule and suggestion for a key that [slurm] has not: sbatch's own name for it, or the nearest."""
    spellings = {normal(name): item.key for item in slurm_settings().values() for name in (item.key, *item.flags)}
    close = spellings.get(normal(key)) or spellings.get(nearest(key, spellings) or "")
    if close is None and key.replace("_", "-") in options("sbatch"):
        return "[slurm] has no such setting", f'pass it through: sbatch = ["{key.replace("_", "-")}=VALUE"]'
    return "[slurm] has no such setting", f"did you mean {close}?" if close else "see megactl slurm render --help"
