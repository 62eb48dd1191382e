"""The training run of one rank: build, restore, loop, save.

The loop never waits for the device inside a step: what a step found out is copied to the host while the next one runs and
read one step late. All ranks read the same reduced numbers, so they take the same decisions (stop, save) at the same step.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megactl.config.schema import Run
from megactl.config.shown import arguments_block
from megactl.config.validate import Resolved
from megactl.engine import checkpoint
from megactl.engine.attention import gives_masks, preferred_attention
from megactl.engine.data import BatchLoader, TokenDataset, build_datasets
from megactl.engine.environment import compare_fingerprints, fingerprint, write_environment
from megactl.engine.launch import RankContext
from megactl.engine.loss_scale import SkipWatch
from megactl.engine.mesh import build_mesh
from megactl.engine.metrics import MetricsWriter, Step
from megactl.engine.optimizer import learning_rate
from megactl.engine.resilience import exit_duration_reached
from megactl.engine.state import check_fits, pieces_to_load, pieces_to_save
from megactl.engine.training_step import StepOutcome, TrainingStep, means
from megactl.engine.world import joined
from megactl.errors import CheckpointError, MegactlError, RunError
from megactl.report.records import METRICS_FILE, read_records
from megactl.storage import manifest
from megactl.storage.checkpoint_folder import candidates, resolve

EXIT_SAVED = 75


def run_rank(run: Run, resolved: Resolved, context: RankContext) -> int:
    """Train on this rank until the run is done (0) or was asked to stop (75, after a save)."""
    with joined(run, context) as device, preferred_attention(masked=gives_masks(run)):
        return Trainer(run, resolved, context, device).train()


@dataclasses.dataclass
class Progress:
    """Where the run stands: iterations done and samples consumed by them."""

    iteration: int = 0
    consumed: int = 0


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A step whose outcome is on its way to the host."""

    step: Step
    outcome: Tensor
    ready: torch.cuda.Event | None


class Trainer:
    """One rank's run. `run` is resolved."""

    def __init__(self, run: Run, resolved: Resolved, context: RankContext, device: torch.device) -> None:
        self.run, self.context, self.batch, self.warmup = run, context, resolved.batch, resolved.warmup_iterations
        self.eod = next((item.value for item in resolved.derived if item.key == "eod"), None)
        self.mesh = build_mesh(run.parallel, device)
        self.group = checkpoint.ProcessGroup(self.mesh.objects) if self.mesh.world_size > 1 else checkpoint.SingleProcess()
        self._check_same_program()
        # Between the parts of a start, so that the watch counts the silence of one part and not of all.
        context.heartbeat.beat()
        self.train_data, self.valid_data = self._datasets()
        context.heartbeat.beat()
        self.engine = TrainingStep(run, self.mesh)
        context.heartbeat.beat()
        self.skips = SkipWatch(run.training)
        self.progress = Progress()
        self.resumed_from: Path | None = None
        self._restore()
        self.writer = self._make_writer() if self.mesh.rank == 0 else None
        self.tokenizer = self._keep_tokenizer() if self.mesh.rank == 0 else None
        self.saved_at = self.progress.iteration

    def say(self, message: str) -> None:
        """A line for people, from rank 0."""
        if self.mesh.rank == 0:
            print(message, file=sys.stderr, flush=True)

    # Set-up

    def _check_same_program(self) -> None:
        prints = self.group.gather(fingerprint(self.run))
        self.hosts = [item["host"] for item in prints or ()]
        problem = self.group.broadcast(compare_fingerprints(prints) if prints is not None else None)
        if problem:
            raise RunError(problem, "install the same megactl everywhere and start every rank with the same settings")

    def _datasets(self) -> tuple[TokenDataset, TokenDataset | None]:
        training, size = self.run.training, self.batch.global_batch_size
        wanted = {"train": self.batch.consumed_after(training.iterations)}
        if training.eval_interval:
            wanted["valid"] = training.eval_iterations * size
        log = self._log_waiting if self.context.local_rank == 0 else _quiet
        built = build_datasets(self.run, wanted, self.run.model.vocab_size, self.eod, log=log)
        return built.train, built.valid

    def _log_waiting(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    def _loader(self, dataset: TokenDataset) -> BatchLoader:
        data = self.run.data
        return BatchLoader(
            dataset, self.run.training.micro_batch_size, self.mesh.dp.rank, self.mesh.dp.size, eod=self.eod,
            reset_position_ids=data.reset_position_ids, reset_attention_mask=data.reset_attention_mask, eod_mask_loss=data.eod_mask_loss,
        )  # fmt: skip

    def _make_writer(self) -> MetricsWriter:
        from megactl.costmodel.flops import model_flops
        from megactl.costmodel.hardware import peak_tflops

        run, device = self.run, self.mesh.device
        peak = peak_tflops(torch.cuda.get_device_name(device), run.training.precision) if device.type == "cuda" else None
        terminal = os.fdopen(self.context.terminal_fd, "w") if self.context.terminal_fd is not None else None
        write_environment(self.context.run_dir, hosts=self.hosts)
        return MetricsWriter(
            self.context.run_dir, run, start_iteration=self.progress.iteration, total_iterations=run.training.iterations,
            is_terminal=terminal is not None, terminal=terminal, world_size=self.mesh.world_size,
            flops_per_iteration=lambda size: model_flops(run.model, run.training.seq_length, size),
            peak_tflops=peak, total_samples=self.batch.consumed_after(run.training.iterations),
        )  # fmt: skip

    def _keep_tokenizer(self) -> dict[str, Any] | None:
        """What a checkpoint says about the tokenizer. Its files are copied into the run directory: `generate` needs nothing else."""
        from megactl.storage.tokenizer_copy import keep_tokenizer

        spec = self.run.data.tokenizer
        if spec is None:
            return None
        try:
            return {"spec": spec, **keep_tokenizer(spec, self.run.data.data, self.context.run_dir)}
        except MegactlError as error:
            # Training reads tokens, not text, and may run where the tokenizer is not.
            self.say(f"warning: {error.message}: `megactl generate` will need --tokenizer")
            return {"spec": spec}

    # Checkpoints

    @property
    def _checkpoints(self) -> Path:
        return self.context.run_dir / "checkpoints"

    def _restore(self) -> None:
        """Continue from the run directory's newest good checkpoint, or start from another run's, as the settings say."""
        settings = self.run.checkpoint
        if self.mesh.rank == 0:
            checkpoint.sweep(self._checkpoints, self.say)
        self.group.barrier()
        if settings.resume == "never":
            self._refuse_old_checkpoints()
        found = None if settings.resume == "never" else checkpoint.find(self._checkpoints, self.say, group=self.group)
        if found is None and settings.resume == "must":
            raise CheckpointError(f"--resume must: {self._checkpoints} holds no checkpoint", "use --resume auto to start afresh")
        if found is not None:
            self._load(found, optimizer=True)
            self.resumed_from = found
            self.say(f"resuming from {found} at iteration {self.progress.iteration}")
        elif settings.load is not None:
            self._load(resolve(Path(settings.load)), optimizer=not settings.load_weights)
            if settings.load_weights:
                self.progress = Progress()
            self.say(f"starting from {settings.load} at iteration {self.progress.iteration}")

    def _refuse_old_checkpoints(self) -> None:
        """--resume never in a folder with checkpoints: this run's saves would mix with those, and its metrics replace theirs."""
        old = self.group.broadcast([item.path.name for item in candidates(self._checkpoints)] if self.mesh.rank == 0 else None)
        if old:
            rule = f"{self._checkpoints} holds {len(old)} of an earlier run (newest: {old[0]})"
            raise CheckpointError(f"--resume never: {rule}", "choose another --run-dir, or move that folder away")

    def _load(self, path: Path, *, optimizer: bool) -> None:
        check_fits(path, manifest.read(path).header, self.run, optimizer=optimizer)
        with self.context.heartbeat.phase("save"):
            header = checkpoint.load(path, pieces_to_load(self.engine.parts, optimizer=optimizer), group=self.group)
        self.progress = Progress(header.step, header.consumed_samples)
        if optimizer:
            self.engine.adam_step.fill_(header.state["adam_step"])
            self.engine.loss_scale.restore(header.state.get("loss_scale"))
            if header.state.get("seed", self.run.training.seed) != self.run.training.seed:
                self.say(f"note: {path} was saved with --seed {header.state['seed']}; data order and dropout follow another one from here")

    def save(self) -> None:
        """Write a checkpoint of the iterations done so far; collective."""
        started = time.monotonic()
        header = {
            "consumed_samples": self.progress.consumed,
            "layout": {axis: getattr(self.mesh, axis).size for axis in ("tp", "cp", "dp", "pp")} | {"zero": self.run.parallel.zero},
            "precision": self.run.training.precision,
            "model": dataclasses.asdict(self.run.model),
            "tokenizer": self.tokenizer,
            "state": self._state(),
        }
        with self.context.heartbeat.phase("save"):
            path = checkpoint.save(
                self._checkpoints, step=self.progress.iteration, pieces=pieces_to_save(self.engine.parts, self.mesh), header=header,
                group=self.group, keep=self.run.checkpoint.keep_checkpoints, protect=self.resumed_from, log=self.say,
            )  # fmt: skip
        self.saved_at = self.progress.iteration
        self.say(f"saved {path} in {time.monotonic() - started:.1f} s")

    def _state(self) -> dict[str, Any]:
        """What continuing needs beside the tensors."""
        state: dict[str, Any] = {"adam_step": float(self.engine.adam_step), "seed": self.run.training.seed}
        loss_scale = self.engine.loss_scale.state()
        return state if loss_scale is None else state | {"loss_scale": loss_scale}

    # The loop

    def train(self) -> int:
        """Run the remaining iterations; returns the exit code."""
        training = self.run.training
        if self.progress.iteration >= training.iterations:
            self.say(f"nothing to do: {self.progress.iteration} of {training.iterations} iterations are done")
        elif self.context.terminal_fd is None:
            # Into a log, which is read without its run directory; on a terminal nobody asked for sixty lines.
            self.say("\n".join(arguments_block(self.run, self.mesh.world_size)))
        if self._lacks_evaluation():
            self._evaluate()
        stopped = False
        with self._loader(self.train_data).prefetch(self._schedule(), pin_memory=self.mesh.device.type == "cuda") as batches:
            pending: _Pending | None = None
            self._clock, self._last_ready = time.monotonic(), None
            while self.progress.iteration < training.iterations and not stopped:
                launched = self._launch_step(batches)
                stopped = self._read(pending)
                pending = launched
                # On a CPU the step is over when it returns: read later, its time would count as the next one's.
                if launched.ready is None or self._pauses_after(self.progress.iteration):
                    stopped = self._read(pending) or stopped
                    pending = None
                if self._pauses_after(self.progress.iteration):
                    self._pause(stopped)
            stopped = self._read(pending) or stopped
        return self._finish(stopped)

    def _schedule(self) -> Iterator[tuple[int, int]]:
        """(consumed samples, micro-batch index) of every micro-batch still to come."""
        consumed = self.progress.consumed
        for _ in range(self.progress.iteration, self.run.training.iterations):
            yield from ((consumed, index) for index in range(self.batch.micro_batches(consumed)))
            consumed += self.batch.at(consumed)

    def _launch_step(self, batches: Iterator[Any]) -> _Pending:
        progress = self.progress
        iteration, size = progress.iteration + 1, self.batch.at(progress.consumed)
        held = [next(batches) for _ in range(self.batch.micro_batches(progress.consumed))]
        rate = learning_rate(self.run.optimizer, self.warmup, iteration)
        stop = float(self._stop_wanted())
        outcome = self.engine.step(iteration, held.__getitem__, global_batch_size=size, learning_rate=rate, stop=stop)
        self.progress = Progress(iteration, progress.consumed + size)
        self.context.heartbeat.beat(iteration)
        step = Step(
            iteration=iteration, consumed_samples=self.progress.consumed, loss=float("nan"), learning_rate=rate, global_batch_size=size,
            seconds=0.0,
        )  # fmt: skip
        return self._to_host(step, outcome)

    def _stop_wanted(self) -> bool:
        if exit_duration_reached(self.run.training.exit_duration, self.context.started):
            self.context.stop.request("exit-duration")
        return self.context.stop.requested is not None

    def _to_host(self, step: Step, outcome: StepOutcome) -> _Pending:
        packed = outcome.packed()
        if packed.device.type == "cpu":
            return _Pending(step, packed, None)
        pinned = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        pinned.copy_(packed, non_blocking=True)
        ready = torch.cuda.Event(enable_timing=True)
        ready.record()
        return _Pending(step, pinned, ready)

    def _read(self, pending: _Pending | None) -> bool:
        """Report a finished step; True where a rank was asked to stop when it began."""
        if pending is None:
            return False
        if pending.ready is not None:
            pending.ready.synchronize()
        loss, norm, skipped, stop, scale, *parts = pending.outcome.tolist()
        step = dataclasses.replace(
            pending.step, loss=loss, grad_norm=norm, skipped=bool(skipped), loss_scale=scale, losses=self._named(parts),
            seconds=self._seconds_since_last(pending),
        )  # fmt: skip
        if self.writer is not None:
            self.writer.step(step)
        self.skips.see(step.iteration, skipped=step.skipped, loss_scale=scale)
        return stop > 0

    def _named(self, parts: list[float]) -> dict[str, float]:
        """The parts of a loss by name where there are several."""
        return dict(zip(self.engine.losses, parts, strict=True)) if len(parts) > 1 else {}

    def _seconds_since_last(self, pending: _Pending) -> float:
        """Seconds from the end of the step before to the end of this one, by the device's clock where it has one."""
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        if pending.ready is not None:
            # The host reads a step after it has launched the next one, so its own clock would shift time between the two.
            if self._last_ready is not None:
                seconds = self._last_ready.elapsed_time(pending.ready) / 1e3
            self._last_ready = pending.ready
        return seconds

    def _pauses_after(self, iteration: int) -> bool:
        return _is_due(self.run.training.eval_interval, iteration) or _is_due(self.run.checkpoint.save_interval, iteration)

    def _pause(self, stopped: bool) -> None:
        """Save and evaluate where this iteration asks for it; their time is not a step's.

        Saved first: whoever asked for the stop may kill the run soon. So an evaluation also waits for the next start then.
        """
        iteration, training = self.progress.iteration, self.run.training
        if stopped or _is_due(self.run.checkpoint.save_interval, iteration):
            self.save()
        if _is_due(training.eval_interval, iteration) and not (stopped and iteration < training.iterations):
            self._evaluate()
        self._clock, self._last_ready = time.monotonic(), None

    def _lacks_evaluation(self) -> bool:
        """Whether the iteration that this run goes on from was to be evaluated, and a stop or a kill came first; collective."""
        iteration = self.progress.iteration
        if self.resumed_from is None or not _is_due(self.run.training.eval_interval, iteration):
            return False
        done = None
        if self.mesh.rank == 0:
            records = read_records(self.context.run_dir / METRICS_FILE)
            done = any(evaluation["iteration"] == iteration for evaluation in records.evaluations)
        return not self.group.broadcast(done)

    def _evaluate(self) -> None:
        # Always the same samples, so that the points of a validation curve differ by the model alone.
        started, size = time.monotonic(), self.batch.global_batch_size
        count = size // (self.run.training.micro_batch_size * self.mesh.dp.size)
        loader, totals = self._loader(self.valid_data), []
        with self.context.heartbeat.phase("evaluate"):
            for index in range(self.run.training.eval_iterations):
                first = index * size
                totals.append(self.engine.evaluation_sums(lambda m, first=first: loader.micro_batch(first, m), count, size))
            # Not the mean of the batches' means, in which a token counts for more where there are few.
            parts = means(torch.stack(totals).sum(0)).tolist()
        if self.writer is not None:
            seconds = time.monotonic() - started
            self.writer.evaluation(self.progress.iteration, sum(parts), losses=self._named(parts), seconds=seconds)

    def _finish(self, stopped: bool) -> int:
        done = self.progress.iteration >= self.run.training.iterations
        if self.saved_at != self.progress.iteration:
            self.save()
        peak = self._peak_memory_gb()
        if self.writer is not None:
            self.writer.finish("completed" if done else "saved", peak_memory_gb=peak)
        if not done:
            self.say(f"stopped after iteration {self.progress.iteration} as asked; run the same command again to continue")
        return 0 if done else EXIT_SAVED

    def _peak_memory_gb(self) -> list[float]:
        """Most memory of each rank in GB (1e9 bytes): allocated on the GPU, resident on a CPU. Empty but on rank 0; collective."""
        import resource

        if self.mesh.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return self.group.gather(peak / 1e9) or []


def _is_due(interval: int, iteration: int) -> bool:
    """Whether something that is done every `interval` iterations (0: never) is done after this one."""
    return interval > 0 and iteration % interval == 0


def _quiet(message: str) -> None:
    """Where another rank of this machine says it."""
