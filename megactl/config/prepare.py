"""From what the user set to a run that can start: devices, how this process was started, the vocabulary, the run directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from megactl.config.checks import machine_independent
from megactl.config.devices import count_gpus, cpu_only_torch
from megactl.config.load import Loaded
from megactl.config.schema import Run
from megactl.config.start import StartInfo, start_info
from megactl.config.validate import Resolved, device_of, resolve
from megactl.config.vocabulary import Vocabulary, find_vocabulary
from megactl.errors import ConfigError, Problem

T = TypeVar("T")


class Problems:
    """Mistakes gathered from steps that may each raise a ConfigError."""

    def __init__(self, found: list[Problem] | None = None) -> None:
        self.found = found or []

    def catch(self, step: Callable[[], T]) -> T | None:
        """The result of `step`; where it raises ConfigError, keep its problems (each once) and return None."""
        try:
            return step()
        except ConfigError as error:
            self.found += [problem for problem in error.problems if problem not in self.found]
            return None

    def raise_all(self) -> None:
        """Raise one ConfigError with everything gathered, if anything was."""
        if self.found:
            raise ConfigError(self.found)


def prepare(loaded: Loaded, environ: Mapping[str, str], *, dry_run: bool = False) -> tuple[Resolved, StartInfo]:
    """The resolved run and how it is started. Raises ConfigError holding every mistake, DataError for damaged data or tokenizer files."""
    run, problems = loaded.run, Problems()
    gpus = 0 if run.training.device == "cpu" else count_gpus(environ)
    cpu_torch = cpu_only_torch() if gpus or run.training.device == "cuda" else None
    device = device_of(run, gpus=gpus, cpu_torch=cpu_torch)[0]
    start = problems.catch(lambda: start_info(run, environ, gpus=gpus if device == "cuda" else 0))
    vocabulary = problems.catch(lambda: find_vocabulary(run))
    if start is None:
        problems.found += machine_independent(run, loaded.origins)
        problems.raise_all()
        raise AssertionError("start_info failed without a problem")
    facts = {
        "world_size": start.world_size,
        "visible": None if start.kind != "self" else gpus if device == "cuda" else start.world_size,
        "spawns": start.spawns,
        "gpus": gpus,
        "cpu_torch": cpu_torch,
        "local_world_size": start.local_world_size,
        "run_dir": run_directory(run, start, environ),
        **_vocabulary_facts(run, vocabulary),
    }
    resolved = problems.catch(lambda: resolve(run, origins=loaded.origins, **facts))
    if resolved is not None and not dry_run:
        problems.found += _refuse_crowd(resolved, loaded, start)
    problems.raise_all()
    assert resolved is not None
    return resolved, start


def _vocabulary_facts(run: Run, vocabulary: Vocabulary | None) -> dict[str, Any]:
    if vocabulary is None:
        # The mistake is noted already; a stand-in keeps "the vocabulary is not known" from being reported beside it.
        return {"vocab_size": run.model.vocab_size or 2, "eod": 0}
    found = vocabulary
    return {
        "vocab_size": found.size,
        "vocab_source": found.source,
        "eod": found.eod,
        "vocab_hint": found.hint,
        "tokenizer": found.tokenizer,
        "data": found.data,
    }


def _refuse_crowd(resolved: Resolved, loaded: Loaded, start: StartInfo) -> list[Problem]:
    """A large layout typed on a login node must not fork hundreds of processes there, unless the number was spelt out."""
    cores = os.cpu_count() or 1
    if start.kind != "self" or resolved.run.training.device != "cpu" or loaded.run.training.nproc is not None:
        return []
    if start.world_size <= max(16, 4 * cores):
        return []
    rule = f"would start {start.world_size} processes on this machine's {cores} cores"
    instead = f"add --dry-run to look at the layout only, or --nproc {start.world_size} if you mean it"
    return [Problem("the layout", rule, instead)]


def run_directory(run: Run, start: StartInfo, environ: Mapping[str, str]) -> str:
    """--run-dir, or a name that every process of the run finds alike. Under srun it is the job's, so a requeued job finds its checkpoints.

    Raises ConfigError under torchrun without a run id, where each process would choose another name.
    """
    if run.logging.run_dir is not None:
        return run.logging.run_dir
    name = run.preset or run.model.architecture
    if start.kind in ("srun", "srun-node"):
        step = environ.get("SLURM_STEP_ID", "0")
        return f"runs/{name}-job{environ.get('SLURM_JOB_ID', '0')}" + (f".{step}" if step != "0" else "")
    if start.kind == "torchrun":
        run_id = environ.get("TORCHELASTIC_RUN_ID", "none")
        if run_id == "none":
            rule = "is not set, and torchrun gave its processes no common name for a new folder"
            raise ConfigError([Problem("--run-dir", rule, "give --run-dir DIR, or start torchrun with --rdzv-id NAME")])
        return f"runs/{name}-{run_id}"
    return _new_directory(name)


def _new_directory(name: str) -> str:
    import time

    base = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidates = [base, *(f"{base}-{number}" for number in range(2, 100))]
    return next((path for path in candidates if not Path(path).exists()), base)
