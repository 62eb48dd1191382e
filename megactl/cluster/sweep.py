"""Sweeps: `--sweep lr=1e-4,3e-4` (every combination where there are several) or a CSV file with a row a point, as runs that are checked."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from megactl.cluster.job import Point
from megactl.cluster.quoting import broken_rule, shown
from megactl.config.coerce import CoercionError, coerce
from megactl.config.load import Loaded
from megactl.config.names import nearest, normal
from megactl.config.settings import Setting, all_settings, names_by_alias, replace
from megactl.errors import ConfigError, Problem

# Slurm's own bound is MaxArraySize, 1001 unless a site sets another.
MOST_POINTS = 1000
# Each point has a folder of its own inside the sweep's.
_NOT_SWEPT = ("logging.run_dir", "training.nproc")


def sweep_points(loaded: Loaded, sweeps: Sequence[str], file: str | None) -> list[tuple[Point, Loaded]]:
    """The points of a sweep, each with the run that it makes. Raises ConfigError holding every mistake."""
    problems: list[Problem] = []
    rows = [*_from_file(file, problems), *_from_options(sweeps, problems)] if file else _from_options(sweeps, problems)
    if file and sweeps:
        problems.append(Problem("--sweep with --sweep-file", "the points come from one place", "leave one out"))
    if not problems and not rows:
        problems.append(Problem(f"--sweep-file {file}", "has no points", "write a row a point below the header"))
    if len(rows) > MOST_POINTS:
        problems.append(Problem(f"{len(rows)} points", f"a job array has at most {MOST_POINTS}", "split the sweep"))
        rows = []
    found = [_point(loaded, row, where, problems) for where, row in rows]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    labels = [point.label for point, _ in found]
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if repeated:
        raise ConfigError([Problem(f"point {label}", "is there twice", "leave one out") for label in repeated])
    return found


def _from_options(sweeps: Sequence[str], problems: list[Problem]) -> list[tuple[str, dict[str, str]]]:
    axes: list[tuple[str, list[str]]] = []
    for text in sweeps:
        name, equals, values = text.partition("=")
        listed = [value.strip() for value in values.split(",")]
        if not equals or not all(listed):
            problems.append(Problem(f"--sweep {shown(text)}", "must be SETTING=VALUE,VALUE,...", "such as --sweep optimizer.lr=1e-4,3e-4"))
        elif any(other == name for other, _ in axes):
            problems.append(Problem(f"--sweep {shown(text)}", f"{name} is swept already", "put its values into one --sweep"))
        else:
            axes.append((name, listed))
    names = [name for name, _ in axes]
    return [("--sweep", dict(zip(names, row, strict=True))) for row in itertools.product(*(values for _, values in axes))] if axes else []


def _from_file(file: str, problems: list[Problem]) -> list[tuple[str, dict[str, str]]]:
    """Rows of a CSV file whose header names settings; an empty cell leaves the setting as it is."""
    try:
        text = Path(file).read_bytes().decode("utf-8-sig")
    except OSError as error:
        problems.append(Problem(f"--sweep-file {file}", f"cannot be read: {error.strerror}", "give the path of a CSV file"))
        return []
    except UnicodeDecodeError as error:
        problems.append(Problem(f"--sweep-file {file}", f"is not UTF-8 text (byte {error.start})", "give the path of a CSV file"))
        return []
    lines = [(number, line) for number, line in enumerate(csv.reader(text.splitlines()), 1) if any(cell.strip() for cell in line)]
    if not lines:
        return []
    header, found = [cell.strip() for cell in lines[0][1]], []
    for number, line in lines[1:]:
        where = f"{file}:{number}"
        if len(line) != len(header):
            problems.append(Problem(where, f"has {len(line)} cells, the header has {len(header)}", "write a cell for each column"))
            continue
        found.append((where, {name: cell.strip() for name, cell in zip(header, line, strict=True) if cell.strip()}))
    return found


def _point(loaded: Loaded, row: Mapping[str, str], where: str, problems: list[Problem]) -> tuple[Point, Loaded]:
    """One point; its mistakes go to `problems`."""
    values, parsed = {}, {}
    for name, text in row.items():
        item, problem = _setting(name, f"{where} {name}={shown(text)}")
        if item is None:
            problems += [problem] if problem else []
            continue
        rule = broken_rule(text, "shell")
        try:
            parsed[item.name] = coerce(item, text)
            values[item.name] = text
        except CoercionError as error:
            problems.append(Problem(f"{where} {name}={shown(text)}", error.rule, error.instead))
        if rule is not None:
            problems.append(Problem(f"{where} {name}={shown(text)}", rule, "use another value"))
    origins = {**loaded.origins, **{name: f"flag {all_settings()[name].flag}" for name in values}}
    return Point(_label(values), values), Loaded(replace(loaded.run, parsed), origins)


def _setting(name: str, where: str) -> tuple[Setting | None, Problem | None]:
    full = name if name in all_settings() else names_by_alias().get(normal(name))
    if full is None:
        close = nearest(name, [*all_settings(), *names_by_alias()])
        meant = names_by_alias().get(close, close) if close else None
        return None, Problem(where, "no such setting", f"did you mean {meant}?" if meant else "such as optimizer.lr")
    if full in _NOT_SWEPT:
        return None, Problem(where, "every point of a sweep has its own", "leave it out")
    return all_settings()[full], None


def _label(values: Mapping[str, str]) -> str:
    """A point's folder: "lr-1e-4_seed-2"."""
    parts = (f"{name.partition('.')[2].replace('_', '-')}-{re.sub(r'[^A-Za-z0-9.+-]+', '-', text)}" for name, text in values.items())
    return "_".join(parts) or "base"
