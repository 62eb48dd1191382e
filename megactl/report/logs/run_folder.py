"""What lies beside a run's metrics.jsonl: its settings, how it ended, what it ran on. The lines themselves do not repeat them."""

from __future__ import annotations

import os
from pathlib import Path

from megactl.report.logs.records import Run
from megactl.report.records import METRICS_FILE

# status of summary.json -> how runs end here; "saved" is a stop on request, and what requested it is not written down.
ENDS = {"completed": "completed", "saved": "cancelled", "interrupted": "cancelled", "failed": "crashed"}


def is_run_folder(folder: str) -> bool:
    """Whether a folder is a run directory of megactl: it then stands for one run, whatever other logs it holds."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in (METRICS_FILE, "config.toml"))


def named_after(file: str) -> str:
    """The name that tells a run from others: the file's, or its folder's where every run calls its file the same."""
    path = Path(file)
    return path.parent.name or path.name if path.name == METRICS_FILE else path.name


def add_settings(run: Run) -> None:
    """Give a run that was read from metrics.jsonl what its folder knows; what is missing there stays unknown."""
    path = Path(run.file)
    if path.name != METRICS_FILE or not is_run_folder(str(path.parent)):
        return
    from megactl.config.settings import all_settings
    from megactl.report.run_data import read_run

    data = read_run(path.parent)
    run.system = "megactl"
    for setting in all_settings().values():
        value = data.setting(setting.section, setting.key)
        value = setting.default if value is None else value
        if value is not None:
            run.arguments.setdefault(setting.key, str(value))
    run.world_size = run.world_size or data.summary.get("world_size")
    gpus = data.environment.get("gpus")
    if isinstance(gpus, list) and gpus:
        run.arguments.setdefault("gpu_name", str(gpus[0]))
    run.summary |= {"own_status": data.summary.get("status"), "own_error": data.summary.get("error")}
    peak = data.summary.get("peak_memory_gb")
    if isinstance(peak, int | float):
        # Without a GPU it is the memory of the process.
        setattr(run.memory, "allocated" if gpus else "host", peak * 1e9 / 2**30)
