"""One run as one row: the keys that `megactl parse-logs --json` promises, and nothing that the log does not support."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megactl.config.schema import Model
from megactl.costmodel.flops import seed_tflops, utilization
from megactl.costmodel.hardware import peak_tflops
from megactl.costmodel.parameters import total_parameters
from megactl.report.logs.architecture import architecture_of
from megactl.report.logs.filename import facts
from megactl.report.logs.layout import FIELDS, Layout, layout_of, switch, text
from megactl.report.logs.records import Run
from megactl.report.logs.run_folder import add_settings
from megactl.report.logs.speed import Speed, is_time, speed_of
from megactl.report.logs.status import status_of

# The timers that a row is made of: of save_s, and of load_s.
TIMERS = ("save-checkpoint", "load-checkpoint")
# What is beyond it is damage, and sums of such overflow.
_MOST = 1e15

KEYS = (
    "file", "run", "system", "status", "evidence", "iterations", "mean_s", "median_s", "steady_mean_s", "p95_s", "model_b", "gpus", "nodes",
    "dp", "tp", "pp", "vpp", "sp", "recompute", "zero", "bucket", "offload", "partition_activations", "scattered_embeddings", "mbs", "gas",
    "gbs", "seq", "tflops_per_gpu", "tflops_logged", "mfu", "tokens_per_s", "allocated_gib", "reserved_gib", "host_memory_gib", "save_s",
    "load_s", "final_loss", "nan_iterations", "skipped_iterations", "started_at", "exact", "derived", "warnings",
)  # fmt: skip
"""Names and order of a row's keys. The last three are dictionaries and lists, and have no column."""


@dataclass(frozen=True)
class Given:
    """What the user states beside the logs; it goes before what a log says. ng: GPUs; ms: 10^9 parameters; seq: tokens a sequence.

    gpu: its name, for the share of its peak; from_filename: ask the file's name where the log is silent.
    """

    ng: int | None = None
    ms: float | None = None
    seq: int | None = None
    gpu: str | None = None
    from_filename: bool = False


@dataclass
class Row:
    """A run with what follows from it. `values` has the keys of KEYS. `missing` names what TFLOPs still need, in words."""

    source: Run
    layout: Layout
    speed: Speed
    values: dict[str, Any]
    missing: list[str] = field(default_factory=list)


def row_of(run: Run, given: Given) -> Row:
    """The row of one run."""
    add_settings(run)
    layout = layout_of(run, from_filename=given.from_filename)
    for name, value, flag in (("gpus", given.ng, "--ng"), ("seq", given.seq, "--seq")):
        if value is not None and getattr(layout, name) != value:
            stated = getattr(layout, name)
            setattr(layout, name, value)
            layout.derived[name] = f"given with {flag}" + (f"; the log says {stated}" if stated is not None else "")
    speed = _speed(run, layout)
    model = architecture_of(run.arguments, layout.seq)
    values: dict[str, Any] = dict.fromkeys(KEYS)
    ended = status_of(run)
    values |= {"file": run.file, "run": run.run, "system": run.system, "status": ended.status, "evidence": ended.evidence}
    values |= {"iterations": len(run.iterations), "mean_s": speed.mean, "median_s": speed.median}
    values |= {"steady_mean_s": speed.steady_mean, "p95_s": speed.p95}
    values |= {name: getattr(layout, name) for name in FIELDS if name in KEYS}
    values["model_b"] = _billions(run, layout, given, model.model)
    values |= _memory(run) | _losses(run) | {"started_at": run.started_at, "derived": layout.derived, "warnings": list(run.warnings)}
    row = Row(run, layout, speed, values)
    _work(row, given, model.model, model.problem)
    return row


def _speed(run: Run, layout: Layout) -> Speed:
    """From the iteration lines; a Hugging Face log states only samples a second, over all of them."""
    speed = speed_of(run.iterations.seconds, run.iterations.interrupted)
    rate = _number(run.summary.get("train_samples_per_second"))
    if run.system == "hf-trainer" and rate and layout.gbs:
        # The last batch may be a partial one, so that the time by steps is too short for a whole batch.
        layout.derived["mean_s"] = "gbs / train_samples_per_second"
        return Speed(speed.lines, speed.steady_lines, layout.gbs / rate, speed.median, speed.steady_mean, speed.p95)
    return speed


def _billions(run: Run, layout: Layout, given: Given, model: Model | None) -> float | None:
    """Parameters in 10^9: as given, as the log prints them for the whole model, as its architecture has them, as its name says."""
    if given.ms is not None:
        layout.derived["model_b"] = "given with --ms"
        return given.ms
    if run.model_parameters:
        return run.model_parameters / 1e9
    if model is not None:
        layout.derived["model_b"] = "counted from the architecture"
        return total_parameters(model, seq_length=layout.seq) / 1e9
    named = facts(run.file).get("model_b") if given.from_filename else None
    if named is not None:
        layout.derived["model_b"] = "in the file's name"
    return named


def _memory(run: Run) -> dict[str, Any]:
    saved, loaded = (_seconds(run, timer) for timer in TIMERS)
    memory = {"allocated_gib": run.memory.allocated, "reserved_gib": run.memory.reserved, "host_memory_gib": run.memory.host}
    return {**memory, "save_s": saved, "load_s": loaded}


def _seconds(run: Run, timer: str) -> float | None:
    """Mean of a timer in seconds; None where it was never printed."""
    times = [value for value in run.timers.get(timer, ()) if is_time(value)]
    return math.fsum(times) / len(times) / 1e3 if times else None


def _losses(run: Run) -> dict[str, Any]:
    columns = run.iterations
    losses = [value for value in columns.loss if math.isfinite(value)]
    logged = [value for value in columns.tflops_logged if is_time(value)]
    return {
        # Not the last number there is: a run whose loss was lost has none.
        "final_loss": columns.loss[-1] if losses and math.isfinite(columns.loss[-1]) else None,
        "nan_iterations": _sum(columns.nan),
        "skipped_iterations": _sum(columns.skipped),
        "tflops_logged": math.fsum(logged) / len(logged) if logged else _number(run.summary.get("effective_tflops")),
    }


def _sum(values: Sequence[float]) -> int | None:
    counted = [value for value in values if 0 <= value < _MOST]
    return int(math.fsum(counted)) if counted else None


def _number(value: Any) -> float | None:
    """A figure of a summary, which may be text; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if abs(number) < _MOST else None


def _work(row: Row, given: Given, model: Model | None, problem: str | None) -> None:
    """Speed in tokens and FLOPs, from the mean time over every line, as the notes do."""
    values, layout = row.values, row.layout
    seconds, recompute = row.speed.mean, layout.recompute
    if seconds is None:
        return
    if layout.gbs and layout.seq:
        values["tokens_per_s"] = layout.gbs * layout.seq / seconds
    needed = {"model size (--ms)": values["model_b"], "GPUs (--ng)": layout.gpus}
    needed |= {"global batch": layout.gbs, "sequence length (--seq)": layout.seq}
    row.missing = [name for name, value in needed.items() if not value]
    if row.missing:
        return
    factor = 3 if recompute in ("none", "selective") else 4
    layout.derived["tflops_per_gpu"] = f"model_b x {factor} x 2 x seq x gbs / (mean_s x gpus x 1000)" + (
        ", full recomputation assumed" if recompute is None else ""
    )
    batch = {"seconds": seconds, "gpus": layout.gpus, "global_batch": layout.gbs, "seq_length": layout.seq}
    values["tflops_per_gpu"] = seed_tflops(billions=values["model_b"], factor=factor, **batch)
    if model is None:
        layout.derived["exact"] = problem or ""
        return
    exact = utilization(
        model,
        peak_tflops=_peak(row.source.arguments, given.gpu or row.source.arguments.get("gpu_name")),
        recompute=recompute or "full",
        **batch,
    )
    values["exact"] = exact.as_dict()
    if recompute is None:
        values["exact"] |= {"hfu_tflops": None, "hfu": None}
        layout.derived["exact"] = "hardware FLOPs are not known, since the log does not say what is recomputed"
    values["mfu"] = exact.mfu
    if exact.mfu is not None and max(exact.mfu, values["tflops_per_gpu"] / (exact.peak_tflops or 1)) > 1:
        fastest = max(exact.mfu_tflops, values["tflops_per_gpu"])
        values["warnings"].append(f"{fastest:.0f} TFLOP/s a GPU is above the peak of {exact.peak_tflops:g}: an option or the log is wrong")


def _peak(arguments: Mapping[str, str], gpu: str | None) -> float | None:
    """Dense peak of `gpu` in the arithmetic of the run: fp16 where it is half precision of either kind and the GPU has no other."""
    if gpu is None:
        return None
    precision = text(arguments, "precision", "params_dtype") or ""
    if switch(arguments, "fp16") is False and switch(arguments, "bf16") is False and not precision.endswith(("16", "8")):
        return peak_tflops(gpu, "fp32")
    wanted = "bf16" if switch(arguments, "bf16") or precision.endswith("bf16") else "fp16"
    return peak_tflops(gpu, wanted)
