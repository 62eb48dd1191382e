"""`config.toml` in the run directory: what the user set, apart from what followed from it; and the hash that ranks compare."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megactl.config.load import Loaded, load
from megactl.config.presets import preset_values
from megactl.config.schema import SCHEMA_VERSION, SECTIONS, Run
from megactl.config.settings import all_settings
from megactl.config.toml_file import toml_key, toml_value
from megactl.config.validate import Derived, as_dict
from megactl.errors import ConfigError, Problem

FILE_NAME = "config.toml"


def render(loaded: Loaded, derived: Iterable[Derived] = ()) -> str:
    """The text of config.toml: schema_version, preset, each section's settings that the user set, then [derived] with reasons as comments.

    Reading it back with `read` gives the same Run; [derived] is a record for readers and is computed anew.
    """
    lines = [f"schema_version = {SCHEMA_VERSION}"]
    if loaded.run.preset is not None:
        lines.append(f"preset = {toml_value(loaded.run.preset)}")
    for section in SECTIONS:
        chosen = [setting for setting in all_settings().values() if setting.section == section and loaded.is_set(setting.name)]
        if chosen:
            lines += ["", f"[{section}]", *(f"{setting.key} = {_value(setting.read(loaded.run))}" for setting in chosen)]
    lines += ["", "# What follows from the settings above: a record, computed anew when this file is read.", "[derived]"]
    if loaded.run.preset is not None:
        preset = preset_values(loaded.run.preset)
        lines += [_derived_line(name, value, f"preset {loaded.run.preset}") for name, value in preset.items() if not loaded.is_set(name)]
    lines += [_derived_line(item.key, item.value, item.reason) for item in derived]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    # TOML has no null: the word clears an optional setting that a preset or a lower layer had set.
    return toml_value("none" if value is None else value)


def _derived_line(name: str, value: Any, reason: str) -> str:
    return f"{toml_key(name)} = {_value(value)}  # {' '.join(reason.split())}"


def write(run_dir: str | Path, loaded: Loaded, derived: Iterable[Derived] = ()) -> Path:
    """Write config.toml whole or not at all, and return its path. Raises ConfigError where the folder cannot be written."""
    path = Path(run_dir) / FILE_NAME
    temporary = path.with_name(f".{FILE_NAME}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(render(loaded, derived))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ConfigError([Problem(f"--run-dir {run_dir}", f"cannot be written: {error.strerror}", "choose another folder")]) from error
    return path


@contextmanager
def claim(run_dir: str | Path) -> Iterator[None]:
    """Hold a run directory for this process. Raises ConfigError where another run holds it, or where it cannot be written.

    A flock and not a file that means "taken": it goes when its holder dies, however it dies. Ranks forked meanwhile share it.
    """
    path = Path(run_dir) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError([Problem(f"--run-dir {run_dir}", f"cannot be written: {error.strerror}", "choose another folder")]) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            rule = f"is in use by process {holder}"
            raise ConfigError([Problem(f"--run-dir {run_dir}", rule, "choose another folder, or end that run")]) from error
        except OSError:
            # Some network file systems have no locks; the run is then as safe as its user is careful.
            warnings.warn(f"{run_dir}: this file system has no locks, so two runs in this folder would not be noticed", stacklevel=2)
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


def read(run_dir: str | Path) -> Loaded:
    """The run that a run directory's config.toml (or the file itself) describes. Raises ConfigError for a missing or changed file."""
    path = Path(run_dir)
    return load(config=str(path / FILE_NAME if path.is_dir() else path))


def config_hash(run: Run) -> str:
    """Hex SHA-256 of everything that decides a resolved run's numbers; ranks compare it at start.

    Left out: [logging] and training.nproc, which say where a run writes and how it was started, and may differ between machines.
    """
    document = as_dict(run)
    del document["logging"], document["training"]["nproc"]
    return hashlib.sha256(json.dumps(document, sort_keys=True, allow_nan=False).encode()).hexdigest()
