"""Everything a report needs from a run directory, however little of it is there."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megactl.errors import DataError
from megactl.report.records import METRICS_FILE, SUMMARY_FILE, Records, final_loss, median_of, read_records, read_summary


@dataclass
class RunData:
    """A run directory as read. `missing` says, one sentence each, what is not there or damaged."""

    run_dir: Path
    records: Records
    summary: dict[str, Any]
    config: dict[str, Any]
    environment: dict[str, Any]
    missing: list[str] = field(default_factory=list)

    def setting(self, section: str, key: str) -> Any:
        """A setting as the user set it, else as it was derived, else None."""
        chosen = self.config.get(section, {})
        if isinstance(chosen, dict) and key in chosen:
            return chosen[key]
        derived = self.config.get("derived", {})
        return derived.get(f"{section}.{key}") if isinstance(derived, dict) else None


def read_run(run_dir: Path) -> RunData:
    """Read what is there. Raises DataError if the folder is missing or holds nothing of a run."""
    if not run_dir.is_dir():
        raise DataError(f"{run_dir}: no such folder", "give the run directory of a training run (--run-dir of megactl train)")
    missing: list[str] = []
    data = RunData(run_dir, _records(run_dir, missing), {}, _config(run_dir, missing), _environment(run_dir, missing), missing)
    data.summary = _summary(data)
    known = (METRICS_FILE, SUMMARY_FILE, "config.toml")
    if not any((run_dir / name).exists() for name in known):
        raise DataError(f"{run_dir}: not a run directory: it has none of {', '.join(known)}", "give the --run-dir of megactl train")
    return data


def _records(run_dir: Path, missing: list[str]) -> Records:
    path = run_dir / METRICS_FILE
    try:
        records = read_records(path)
    except OSError as error:
        missing.append(f"{METRICS_FILE} cannot be read ({error.strerror}): there are no curves.")
        return Records()
    if records.damaged:
        missing.append(f"{METRICS_FILE} has {records.damaged} damaged line(s), left out here: the run was probably killed while writing.")
    if not records.steps:
        missing.append(f"{METRICS_FILE} holds no iteration: there are no curves.")
    return records


def _config(run_dir: Path, missing: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads((run_dir / "config.toml").read_text())
    except OSError as error:
        missing.append(f"config.toml cannot be read ({error.strerror}): the settings are not known.")
    except ValueError as error:
        missing.append(f"config.toml is damaged ({error}): the settings are not known.")
    return {}


def _environment(run_dir: Path, missing: list[str]) -> dict[str, Any]:
    try:
        content = json.loads((run_dir / "environment.json").read_text())
    except (OSError, ValueError):
        missing.append("environment.json is missing or damaged: versions and hosts are not known.")
        return {}
    return content if isinstance(content, dict) else {}


def _summary(data: RunData) -> dict[str, Any]:
    """summary.json, or its figures from the iterations themselves, with status "unknown"."""
    summary = read_summary(data.run_dir)
    if summary is not None:
        return summary
    sentence = "is missing or damaged: the run is still going or was killed. The figures here are from its iterations."
    data.missing.append(f"{SUMMARY_FILE} {sentence}")
    steps = data.records.steps
    keys = {"median_s_per_iteration": "seconds"} | {key: key for key in ("tokens_per_s", "model_tflops_per_gpu", "mfu")}
    figures = {name: median_of(steps, key) for name, key in keys.items()}
    return {"status": "unknown", "iterations": steps[-1]["iteration"] if steps else 0, "final_loss": final_loss(steps), **figures}
