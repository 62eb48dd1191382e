"""What a run says while it goes on: metrics.jsonl, Megatron's console line, a live line on a terminal, TensorBoard, W&B, summary.json.

Only the printing rank (rank 0) makes a MetricsWriter. `summary.json` is computed from `metrics.jsonl` alone, so the launcher can
write it for a run whose ranks are gone.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from megactl.errors import MegactlError, RunError
from megactl.report.records import METRICS_FILE, SUMMARY_FILE, final_loss, iterate_lines, median_of, read_records, read_summary

if TYPE_CHECKING:
    from megactl.config.schema import Run

__all__ = ["MetricsWriter", "Step", "check_loggers", "read_summary", "write_summary"]

# The first steps after a (re)start compile, allocate and fill caches; they say nothing about the ones to come.
_WARM_UP_STEPS = 2
_LIVE_SECONDS = 0.1
# Megatron calls the sentence loss by the task of its own data, sentence order; its parsers look for that name.
_LOG_NAMES = {"lm_loss": "lm loss", "sentence_loss": "sop loss"}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One finished iteration. `seconds` is the step alone, without evaluation and saving.

    `losses`: the parts that `loss` is the sum of, by name (lm_loss, sentence_loss), where a model has several; empty where it has one.

    `skipped`: the optimizer did not step (overflow). `loss_scale`: the one this step was computed with.
    A loss that is not finite is kept as such here and written as null with "nan": true.
    """

    iteration: int
    consumed_samples: int
    loss: float
    learning_rate: float
    global_batch_size: int
    seconds: float
    grad_norm: float | None = None
    loss_scale: float = 1.0
    skipped: bool = False
    losses: Mapping[str, float] = field(default_factory=dict)


class _Logger(Protocol):
    def log(self, values: Mapping[str, float], iteration: int) -> None: ...
    def close(self) -> None: ...


class MetricsWriter:
    """Writes everything about the iterations after `start_iteration` (the last one that is done: 0 for a fresh run).

    run_dir, run: the run's directory and its resolved configuration.
    total_iterations: the run's last iteration; total_samples: samples consumed by then, for an ETA that knows batch ramp-up.
    world_size: ranks; flops_per_iteration: model FLOPs of one iteration by global batch size (None: unknown, no throughput is claimed).
    peak_tflops: the device's peak for mfu (None: unknown, mfu is null).
    is_terminal: draw a live line on `terminal` (default stderr). console: where the log lines go (default stdout).
    Raises MegactlError if a requested logger is not installed, RunError if metrics.jsonl cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        run: Run,
        *,
        start_iteration: int,
        total_iterations: int,
        is_terminal: bool,
        world_size: int = 1,
        flops_per_iteration: Callable[[int], float] | None = None,
        peak_tflops: float | None = None,
        total_samples: int | None = None,
        console: IO[str] | None = None,
        terminal: IO[str] | None = None,
    ) -> None:
        self._run_dir, self._run, self._world_size = run_dir, run, world_size
        self._flops, self._peak = flops_per_iteration, peak_tflops
        self._total, self._total_samples = total_iterations, total_samples
        self._last_iteration, self._consumed = start_iteration, 0
        self._is_first = True
        self._interval: list[Step] = []
        self._recent: deque[tuple[float, int]] = deque(maxlen=50)
        self._warming_up = _WARM_UP_STEPS
        self._console = _Console(console or sys.stdout, (terminal or sys.stderr) if is_terminal else None)
        self._file = _JsonLines(run_dir / METRICS_FILE, start_iteration)
        self._loggers = _open_loggers(run_dir, run, start_iteration)

    def step(self, step: Step) -> None:
        """Record one iteration; prints a line every log_interval iterations, for the first one after a start, and for the last one."""
        if self._warming_up:
            self._warming_up -= 1
        else:
            self._recent.append((step.seconds, step.global_batch_size))
        self._file.append(self._record(step))
        first, self._is_first = self._is_first, False
        self._last_iteration, self._consumed = step.iteration, step.consumed_samples
        self._interval.append(step)
        if first or step.iteration % max(1, self._run.logging.log_interval) == 0 or step.iteration == self._total:
            self._report_interval()
        self._console.live(lambda: self._live_text(step))

    def evaluation(
        self,
        iteration: int,
        loss: float,
        *,
        losses: Mapping[str, float] | None = None,
        seconds: float | None = None,
        name: str = "validation",
    ) -> None:
        """Record an evaluation: its own line in metrics.jsonl and Megatron's block on the console.

        `loss` is the mean, in nats; `losses` are its parts as in `Step`. The perplexity is that of the tokens.
        """
        shown = _by_log_name(loss, losses or {})
        ppl = _ppl(shown["lm loss"])
        parts = {part: _finite(value) for part, value in (losses or {}).items()}
        record = {"kind": "eval", "iteration": iteration, "name": name, **_number("loss", loss), **parts, "ppl": _finite(ppl)}
        self._file.append(record | {"seconds": seconds})
        values = "".join(f"{key} value: {_scientific(value)} | {key} PPL: {_scientific(_ppl(value))} | " for key, value in shown.items())
        line = f" {name} loss at iteration {iteration} | {values}"
        rule = "-" * (len(line) + 1)
        self._console.line(f"{rule}\n{line}\n{rule}")
        extra = {f"{name} {key}": value for key, value in shown.items()} if losses else {}
        for logger in self._loggers:
            logger.log({f"{name} loss": loss, f"{name} perplexity": ppl, **extra}, iteration)

    def finish(self, status: str, *, peak_memory_gb: Sequence[float] = ()) -> dict[str, Any]:
        """Print the rest of the interval, close everything, write summary.json and return it.

        `status`: completed, saved, failed or interrupted. `peak_memory_gb`: of each rank, empty where it is not known.
        """
        if self._interval:
            self._report_interval()
        self.close()
        return write_summary(self._run_dir, self._run, status=status, world_size=self._world_size, peak_memory_gb=peak_memory_gb)

    def close(self) -> None:
        """Release files and loggers; safe to call twice."""
        self._console.clear()
        self._file.close()
        for logger in self._loggers:
            logger.close()
        self._loggers = []

    def eta_seconds(self) -> float | None:
        """Seconds to the end from the median of recent steps, None before there is one to go by."""
        if not self._recent:
            return None
        if self._total_samples is not None:
            per_sample = statistics.median(seconds / batch for seconds, batch in self._recent)
            return per_sample * max(0, self._total_samples - self._consumed)
        return statistics.median(seconds for seconds, _ in self._recent) * max(0, self._total - self._last_iteration)

    def _rates(self, seconds: float, batch: int) -> tuple[float, float | None, float | None]:
        tokens = batch * self._run.training.seq_length / seconds if seconds > 0 else 0.0
        tflops = self._flops(batch) / (seconds * self._world_size * 1e12) if self._flops and seconds > 0 else None
        return tokens, tflops, tflops / self._peak if tflops is not None and self._peak else None

    def _record(self, step: Step) -> dict[str, Any]:
        tokens, tflops, mfu = self._rates(step.seconds, step.global_batch_size)
        return {
            "iteration": step.iteration,
            "consumed_samples": step.consumed_samples,
            **_number("loss", step.loss),
            "learning_rate": step.learning_rate,
            "global_batch_size": step.global_batch_size,
            "grad_norm": _finite(step.grad_norm),
            "loss_scale": step.loss_scale,
            "seconds": step.seconds,
            "tokens_per_s": tokens,
            "model_tflops_per_gpu": tflops,
            "mfu": mfu,
            "skipped": step.skipped,
            **{name: _finite(value) for name, value in step.losses.items()},
            "time": round(time.time(), 3),
        }

    def _report_interval(self) -> None:
        interval, self._interval = self._interval, []
        seconds = sum(step.seconds for step in interval) / len(interval)
        last = interval[-1]
        tokens, tflops, _ = self._rates(seconds, last.global_batch_size)
        self._console.line(iteration_line(interval, self._total, tflops=tflops, tokens_per_s=tokens, eta=self.eta_seconds()))
        values = {**_interval_losses(interval), "learning rate": last.learning_rate, "tokens per second": tokens}
        values |= {"iteration time (s)": seconds, "global batch size": last.global_batch_size}
        values |= {"loss scale": last.loss_scale, "skipped iterations": sum(step.skipped for step in interval)}
        values |= {"grad norm": last.grad_norm} if last.grad_norm is not None else {}
        values |= {"TFLOP/s per GPU": tflops} if tflops is not None else {}
        for logger in self._loggers:
            logger.log({name: value for name, value in values.items() if value is not None}, last.iteration)

    def _live_text(self, step: Step) -> str:
        tokens, _, _ = self._rates(step.seconds, step.global_batch_size)
        return f"iteration {step.iteration}/{self._total}  loss {step.loss:.4f}  {tokens:,.0f} tokens/s  ETA {_clock(self.eta_seconds())}"


def iteration_line(
    interval: list[Step], total: int, *, tflops: float | None, tokens_per_s: float, eta: float | None, now: datetime | None = None
) -> str:
    """Megatron-LM's line for an interval of steps, which must not be empty.

    Time is the mean over the interval, losses the mean over its iterations that stepped, everything else is of the last one.
    """
    last = interval[-1]
    milliseconds = 1000.0 * sum(step.seconds for step in interval) / len(interval)
    fields = [f"consumed samples: {last.consumed_samples:12d}", f"elapsed time per iteration (ms): {milliseconds:.1f}"]
    if tflops is not None:
        # One decimal is Megatron's; a CPU's share would be printed as 0.0.
        fields.append(f"throughput per GPU (TFLOP/s/GPU): {tflops:.{1 if tflops >= 1 else 4}f}")
    fields += [f"learning rate: {last.learning_rate:.6E}", f"global batch size: {last.global_batch_size:5d}"]
    for name, value in _interval_losses(interval).items():
        fields.append(f"{name}: {_scientific(value)}")
    fields.append(f"loss scale: {last.loss_scale:.1f}")
    if last.grad_norm is not None:
        fields.append(f"grad norm: {last.grad_norm:.3f}")
    fields.append(f"number of skipped iterations: {sum(step.skipped for step in interval):3d}")
    fields.append(f"number of nan iterations: {sum(not math.isfinite(step.loss) for step in interval):3d}")
    fields += [f"tokens/s: {tokens_per_s:.1f}", f"ETA: {_clock(eta)}"]
    stamp = f"{now or datetime.now():%Y-%m-%d %H:%M:%S}"
    return f" [{stamp}] iteration {last.iteration:8d}/{total:8d} | " + " | ".join(fields) + " |"


def _interval_losses(interval: list[Step]) -> dict[str, float]:
    # Where every iteration was skipped Megatron prints no loss; where some loss is not a number it must show, not vanish from the mean.
    names = list(_by_log_name(0.0, interval[-1].losses))
    losses = {name: _mean(interval, lambda step, name=name: _by_log_name(step.loss, step.losses).get(name, math.nan)) for name in names}
    return {name: value for name, value in losses.items() if value is not None}


def _by_log_name(loss: float, parts: Mapping[str, float]) -> dict[str, float]:
    """Losses by the names in Megatron's lines: the whole where it has no parts."""
    return {_LOG_NAMES.get(name, name): value for name, value in parts.items()} or {"lm loss": loss}


def _mean(interval: list[Step], value: Callable[[Step], float]) -> float | None:
    values = [value(step) for step in interval if not step.skipped]
    finite = [number for number in values if math.isfinite(number)]
    if not values:
        return None
    return sum(finite) / len(finite) if finite else math.nan


def _ppl(loss: float) -> float:
    # Megatron's cap: a diverged loss gives a large number, not an overflow.
    return math.exp(min(20.0, loss)) if math.isfinite(loss) else math.nan


def _scientific(value: float) -> str:
    return f"{value:.6E}" if math.isfinite(value) else f"{value}"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "n/a"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(name: str, value: float) -> dict[str, Any]:
    # JSON has no NaN; readers see null, and "nan" tells it from a value that is merely missing.
    return {name: value} if math.isfinite(value) else {name: None, "nan": True}


class _JsonLines:
    """metrics.jsonl: one write() a line on an O_APPEND descriptor, so a kill leaves whole lines and at most one cut one."""

    def __init__(self, path: Path, start_iteration: int) -> None:
        self._path = path
        try:
            if path.exists():
                _keep_until(path, start_iteration)
            self._fd: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._failed(error) from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record. Raises RunError where the disk refuses."""
        assert self._fd is not None, "append after close"
        line = json.dumps(record, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._fd, line) :]
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _failed(self, error: OSError) -> RunError:
        hint = "free space on that disk, or choose another --run-dir; the same command again continues the run"
        return RunError(f"{self._path}: cannot be written: {error.strerror}", hint)


def _keep_until(path: Path, iteration: int) -> None:
    """Drop lines after `iteration` (they will be run again), cut or damaged lines, and repeats of an iteration; the rewrite is atomic."""
    kept: dict[tuple[Any, ...], bytes] = {}
    lines = 0
    for line, record in iterate_lines(path):
        lines += 1
        if record is not None and record["iteration"] <= iteration:
            kept[(record.get("kind"), record.get("name") if record.get("kind") == "eval" else None, record["iteration"])] = line
    if len(kept) == lines:
        return
    _replace(path, b"".join(kept.values()))


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class _Console:
    """Log lines and, on a terminal, one live line below them. A console that has gone away does not end a run."""

    def __init__(self, lines: IO[str], terminal: IO[str] | None) -> None:
        self._lines: IO[str] | None = lines
        self._terminal = terminal
        self._drawn = 0.0
        if terminal is not None:
            from rich.console import Console

            self._rich = Console(file=terminal, force_terminal=True, highlight=False)

    def line(self, text: str) -> None:
        """Print `text` whole: one write, so that no other output lands inside it."""
        self.clear()
        if self._lines is None:
            return
        try:
            self._lines.write(text + "\n")
            self._lines.flush()
        except (OSError, ValueError):
            self._lines = None
            print("warning: stdout is gone; the run goes on and metrics.jsonl has every iteration", file=sys.stderr)

    def live(self, text: Callable[[], str]) -> None:
        """Draw the live line anew, at most ten times a second."""
        now = time.monotonic()
        if self._terminal is None or now - self._drawn < _LIVE_SECONDS:
            return
        self._drawn = now
        self._draw(text())

    def clear(self) -> None:
        """Remove the live line."""
        if self._terminal is not None and self._drawn:
            self._draw("")

    def _draw(self, text: str) -> None:
        from rich.text import Text

        try:
            assert self._terminal is not None
            self._terminal.write("\r\x1b[2K")
            self._rich.print(Text(text, style="dim"), end="", no_wrap=True, overflow="ellipsis", crop=True, width=_width_of(self._terminal))
            self._terminal.flush()
        except (OSError, ValueError):
            self._terminal = None


def _width_of(terminal: IO[str]) -> int:
    # Of this descriptor, anew each time: a rank's stdout and stderr may be pipes, and windows are resized. One less, so that no line wraps.
    try:
        # A terminal that was never told its size (some containers, `script`) reports 0 columns.
        return (os.get_terminal_size(terminal.fileno()).columns or 80) - 1
    except (OSError, ValueError):
        return 79


def check_loggers(run: Run) -> None:
    """Raise MegactlError if the run asks for a logger that is not installed. Called before any rank starts."""
    for flag, asked, package in (
        ("--tensorboard-dir", run.logging.tensorboard_dir, "tensorboard"),
        ("--wandb-project", run.logging.wandb_project, "wandb"),
    ):
        if asked is not None and importlib.util.find_spec(package) is None:
            message = f"{flag} {asked}: needs the package {package}, which is not installed"
            raise MegactlError(message, f'pip install "megactl[{package}]", or leave {flag} out')


def _open_loggers(run_dir: Path, run: Run, start_iteration: int) -> list[_Logger]:
    check_loggers(run)
    loggers: list[_Logger] = []
    if run.logging.tensorboard_dir is not None:
        loggers.append(_TensorBoard(run.logging.tensorboard_dir, start_iteration))
    if run.logging.wandb_project is not None:
        loggers.append(_WeightsAndBiases(run_dir, run))
    return loggers


class _TensorBoard:
    def __init__(self, folder: str, start_iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events after the checkpoint belong to iterations that run again; purge_step hides them.
        self._writer = SummaryWriter(folder, purge_step=start_iteration + 1 if start_iteration else None)

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, run_dir: Path, run: Run) -> None:
        import wandb

        # Offline: compute nodes often have no way out; `wandb sync` uploads the folder later.
        self._run = wandb.init(project=run.logging.wandb_project, name=run_dir.name, dir=str(run_dir), mode="offline", config=asdict(run))

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        self._run.log(dict(values), step=iteration)

    def close(self) -> None:
        self._run.finish()


def write_summary(
    run_dir: Path, run: Run, *, status: str, world_size: int, peak_memory_gb: Sequence[float] = (), error: str | None = None
) -> dict[str, Any]:
    """Write summary.json (atomically) from metrics.jsonl and return it; figures that are not known are null. Raises OSError."""
    path = run_dir / METRICS_FILE
    steps = read_records(path).steps if path.exists() else []
    summary: dict[str, Any] = {
        "status": status,
        "iterations": steps[-1]["iteration"] if steps else 0,
        "final_loss": final_loss(steps),
        "median_s_per_iteration": median_of(steps, "seconds"),
        "tokens_per_s": median_of(steps, "tokens_per_s"),
        "model_tflops_per_gpu": median_of(steps, "model_tflops_per_gpu"),
        "mfu": median_of(steps, "mfu"),
        "peak_memory_gb": max(peak_memory_gb, default=None),
        "peak_memory_gb_by_rank": list(peak_memory_gb),
        "world_size": world_size,
        "layout": layout_of(run),
    }
    if error is not None:
        summary["error"] = error
    _replace(run_dir / SUMMARY_FILE, (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
    return summary


def layout_of(run: Run) -> dict[str, Any]:
    """The run's parallel layout and batch, by the short names of the command line."""
    parallel, training = run.parallel, run.training
    return {
        "tp": parallel.tensor_parallel,
        "cp": parallel.context_parallel,
        "pp": parallel.pipeline_parallel,
        "dp": parallel.data_parallel,
        "zero": parallel.zero,
        "schedule": parallel.schedule,
        "micro_batch_size": training.micro_batch_size,
        "global_batch_size": training.global_batch_size,
        "seq_length": training.seq_length,
        "precision": training.precision,
    }
