"""From a Run as the user set it to one where nothing is left open: every rule checked, every derived value with its reason."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megactl.config.batch import BatchSchedule, parse_rampup, parse_warmup
from megactl.config.checks import machine_independent
from megactl.config.layout import Ranks, layout_problem
from megactl.config.memory import offload_targets
from megactl.config.schema import Run
from megactl.config.settings import replace
from megactl.config.shown import Names, nearest_multiples
from megactl.errors import ConfigError, Problem

MOCK_VOCABULARY = 256
# What the loss of one token starts backward with in fp16, unless --initial-loss-scale says otherwise.
INITIAL_TOKEN_SCALE = 16


@dataclass(frozen=True)
class Derived:
    """A value that the user did not set. `key` is a dotted setting, or a plain name for what is no setting (num_micro_batches)."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Resolved:
    """`run` has no open values left (None then means "none", as in no checkpoint to load). `derived` says how each was filled."""

    run: Run
    derived: tuple[Derived, ...]

    @property
    def batch(self) -> BatchSchedule:
        """The global batch over the run, in sequences."""
        return batch_schedule(self.run)

    @property
    def warmup_iterations(self) -> int:
        """Iterations of linear warm-up."""
        return parse_warmup(self.run.optimizer.warmup, self.run.training.iterations)


def batch_schedule(run: Run) -> BatchSchedule:
    """The batch schedule of a resolved run."""
    training, data_parallel = run.training, run.parallel.data_parallel
    assert training.global_batch_size is not None and data_parallel is not None, "the run is not resolved"
    rampup = parse_rampup(training.rampup_batch_size) if training.rampup_batch_size else None
    return BatchSchedule(training.global_batch_size, rampup, training.micro_batch_size, data_parallel)


@dataclass(frozen=True)
class Machine:
    """What `resolve` must know from outside. `vocab_size`: tokens of the data's or the tokenizer's vocabulary, `vocab_source` says which.

    `visible`: devices of this machine where it starts the ranks itself; None under torchrun or srun. `gpus`: GPUs it could use.
    `spawns`: this process starts the ranks of this machine (a task of srun may see one GPU of several and starts none).
    `per_node`: ranks of a node in a job that is not started yet, else None.
    `cpu_torch`: version of a torch that is built for CPUs only, else None. `vocab_hint`: why there is no vocabulary, for the message.
    """

    world_size: int
    visible: int | None = None
    gpus: int = 0
    spawns: bool = True
    local_world_size: int | None = None
    vocab_size: int | None = None
    vocab_source: str = "the tokenizer"
    eod: int | None = None
    vocab_hint: str | None = None
    tokenizer: str | None = None
    data: str | None = None
    run_dir: str | None = None
    cpu_torch: str | None = None
    per_node: int | None = None


def resolve(
    run: Run,
    *,
    world_size: int,
    visible: int | None = None,
    vocab_size: int | None = None,
    origins: Mapping[str, str] | None = None,
    **facts: Any,
) -> Resolved:
    """Check `run` and fill what it leaves open. Further `facts` are fields of `Machine`. Raises ConfigError holding every mistake."""
    machine = Machine(world_size=world_size, visible=visible, vocab_size=vocab_size, **facts)
    names = Names(run, origins or {})
    problems = machine_independent(run, names.origins)
    problems += _machine_problems(names, machine)
    problems += _vocabulary_problems(names, machine)
    problems += _eod_problems(names, machine)
    if problems:
        raise ConfigError(problems)
    derived = tuple(_derive(run, machine))
    values = {item.key: item.value for item in derived if "." in item.key}
    return Resolved(replace(run, values), derived)


def device_of(run: Run, *, gpus: int, cpu_torch: str | None = None) -> tuple[str, str]:
    """(device, reason) where --device is auto, or the device that was asked for."""
    if run.training.device != "auto":
        return run.training.device, "as set"
    if run.training.precision == "fp64":
        return "cpu", "fp64 is for verification and runs on the CPU"
    if gpus and cpu_torch:
        return "cpu", f"{gpus} GPUs are visible, but torch {cpu_torch} is built for CPUs only"
    return ("cuda", f"{gpus} visible GPU{'s' * (gpus != 1)}") if gpus else ("cpu", "no GPU is visible")


def _machine_problems(names: Names, machine: Machine) -> Iterator[Problem]:
    run = names.run
    parallel = run.parallel
    if run.training.device == "cuda":
        if machine.cpu_torch:
            rule = f"torch {machine.cpu_torch} is built for CPUs only"
            yield Problem(names.show("training.device"), rule, "install a CUDA build of torch, or use --device cpu")
        elif machine.gpus == 0:
            instead = "check CUDA_VISIBLE_DEVICES and nvidia-smi, or use --device cpu"
            yield Problem(names.show("training.device"), "no GPU is visible", instead)
    nproc, device = run.training.nproc, device_of(run, gpus=machine.gpus, cpu_torch=machine.cpu_torch)[0]
    if nproc is not None and machine.spawns and device == "cuda" and nproc > machine.gpus > 0:
        rule = f"needs a GPU for each rank, this machine has {machine.gpus}"
        yield Problem(names.show("training.nproc"), rule, f"use --nproc {machine.gpus}, or --device cpu")
    degrees = (parallel.tensor_parallel, parallel.pipeline_parallel, parallel.context_parallel, parallel.data_parallel or 1)
    if min(degrees) < 1 or machine.world_size < 1:
        return
    ranks = Ranks(machine.world_size, machine.visible, nproc=nproc is not None, on_cpus=device == "cpu", per_node=machine.per_node)
    problem = layout_problem(run, ranks, names)
    if problem is not None:
        yield problem
    else:
        yield from _batch_problems(names, machine)


def _data_parallel(run: Run, machine: Machine) -> int:
    parallel = run.parallel
    return machine.world_size // (parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel)


def _batch_problems(names: Names, machine: Machine) -> Iterator[Problem]:
    training, data_parallel = names.run.training, _data_parallel(names.run, machine)
    unit = training.micro_batch_size * data_parallel
    if unit < 1:
        return
    rule = f"must be a multiple of {names.show('training.micro_batch_size')} x dp {data_parallel} = {unit}"
    if training.global_batch_size is not None and training.global_batch_size > 0 and training.global_batch_size % unit:
        instead = f"use --global-batch-size {nearest_multiples(training.global_batch_size, unit)}"
        yield Problem(names.show("training.global_batch_size"), rule, instead)
    try:
        rampup = parse_rampup(training.rampup_batch_size) if training.rampup_batch_size else None
    except ValueError:
        return
    for label in ("start", "increment") if rampup else ():
        value = getattr(rampup, label)
        if value % unit:
            where = f"{label.upper()} {value} of {names.show('training.rampup_batch_size')}"
            yield Problem(where, rule, f"use {nearest_multiples(value, unit)}")


def _vocabulary_problems(names: Names, machine: Machine) -> Iterator[Problem]:
    given, data = names.run.model.vocab_size, names.run.data
    if given is None and machine.vocab_size is None and not data.mock_data and data.data is not None:
        hint = machine.vocab_hint or "neither the data nor a tokenizer says it"
        yield Problem("--vocab", f"the size of the vocabulary is not known: {hint}", "give --vocab N, or --tokenizer")
    if given is not None and machine.vocab_size is not None and given < machine.vocab_size:
        rule = f"is smaller than the {machine.vocab_size} tokens of {machine.vocab_source}"
        yield Problem(names.show("model.vocab_size"), rule, f"use --vocab {machine.vocab_size}")


def _eod_problems(names: Names, machine: Machine) -> Iterator[Problem]:
    """What works by document boundaries needs the token that marks them. (Without a vocabulary that is already a mistake.)"""
    data = names.run.data
    if data.data is None or machine.eod is not None or machine.vocab_size is None:
        return
    for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss"):
        if getattr(data, name):
            rule = f"needs an end-of-document token, and {machine.vocab_source} has none"
            yield Problem(names.show(f"data.{name}"), rule, "leave it out, or preprocess with a tokenizer that has one")


def _derive(run: Run, machine: Machine) -> Iterator[Derived]:
    """Every open value in an order in which each reason rests on the values above it."""
    yield from _derive_model(run, machine)
    yield from _derive_layout(run, machine)
    yield from _derive_memory(run)
    yield from _derive_numbers(run, machine)
    yield from _derive_paths(run, machine)


def _derive_model(run: Run, machine: Machine) -> Iterator[Derived]:
    model = run.model
    if model.vocab_size is None:
        from_data = machine.vocab_size is not None
        source = f"vocabulary of {machine.vocab_source}" if from_data else "generated tokens need no more"
        yield Derived("model.vocab_size", machine.vocab_size if from_data else MOCK_VOCABULARY, source)
    if machine.eod is not None:
        yield Derived("eod", machine.eod, f"end-of-document token of {machine.vocab_source}")
    if model.ffn_size is None:
        gated = f"2/3 x 4 x hidden {model.hidden_size} for SwiGLU's three matrices, a multiple of 64"
        yield Derived("model.ffn_size", model.mlp_width, gated if model.activation == "swiglu" else f"4 x hidden {model.hidden_size}")
    if model.kv_heads is None:
        yield Derived("model.kv_heads", model.num_heads, f"keys and values of its own for each of the {model.num_heads} heads")
    if model.sentence_head is None and model.architecture == "bert":
        yield Derived("model.sentence_head", True, "BERT is trained on sentence pairs as well")
    if model.max_positions is None:
        yield Derived("model.max_positions", run.training.seq_length, "the sequence length")


def _derive_layout(run: Run, machine: Machine) -> Iterator[Derived]:
    parallel, data_parallel = run.parallel, _data_parallel(run, machine)
    if run.training.device == "auto":
        yield Derived("training.device", *device_of(run, gpus=machine.gpus, cpu_torch=machine.cpu_torch))
    if run.training.nproc is None:
        local = machine.local_world_size or machine.world_size
        yield Derived("training.nproc", local, "ranks on this machine")
    if parallel.data_parallel is None:
        product = f"(tp {parallel.tensor_parallel} x pp {parallel.pipeline_parallel} x cp {parallel.context_parallel})"
        yield Derived("parallel.data_parallel", data_parallel, f"{machine.world_size} ranks / {product}")
    if parallel.zero is None:
        # Context-parallel ranks have the same weights as well, and share the optimizer like replicas.
        axis = "dp" if data_parallel > 1 else "cp" if parallel.context_parallel > 1 else None
        reason = f"{axis} > 1: each replica keeps a share of the optimizer" if axis else "dp is 1: nothing to share"
        yield Derived("parallel.zero", int(axis is not None), reason)
    elif parallel.zero and data_parallel * parallel.context_parallel == 1 and not _streams_weights(run):
        # Scripts sweep over dp with --zero; with one replica all stages are the same thing, so nothing is lost.
        what = {1: "optimizer", 2: "optimizer and all gradients", 3: "model"}[parallel.zero]
        yield Derived("parallel.zero", 0, f"--zero {parallel.zero} with dp 1: one rank holds the whole {what}, which is --zero 0")


def _streams_weights(run: Run) -> bool:
    """Whether weights come from host memory when they are needed, which is ZeRO 3 on a single rank as well."""
    return "parameters" in offload_targets(run.memory.offload)


def _derive_memory(run: Run) -> Iterator[Derived]:
    """What a choice of memory comes to, where that is not what it is chosen for."""
    model = run.model
    fused = model.attention == "sdpa" or (model.attention == "auto" and model.attention_dropout == 0.0)
    if run.memory.recompute == "selective" and fused:
        reason = "fused attention computes its scores again by itself and keeps a number a row and head: --recompute none is faster"
        yield Derived("recomputed", "core attention, saving little", reason)


def _derive_numbers(run: Run, machine: Machine) -> Iterator[Derived]:
    training, optimizer = run.training, run.optimizer
    unit = training.micro_batch_size * _data_parallel(run, machine)
    total = training.global_batch_size
    if total is None:
        total = unit
        replicas = unit // training.micro_batch_size
        yield Derived("training.global_batch_size", unit, f"micro-batch {training.micro_batch_size} x dp {replicas}")
    yield Derived("num_micro_batches", total // unit, f"global batch {total} / (micro-batch x dp = {unit})")
    yield from _derive_loss_scale(run, total)
    warmup = parse_warmup(optimizer.warmup, training.iterations)
    if optimizer.warmup.strip().endswith("%"):
        yield Derived("warmup_iterations", warmup, f"{optimizer.warmup} of {training.iterations} iterations")
    decay = optimizer.lr_decay_iterations
    if decay is None and optimizer.lr_schedule != "constant":
        decay = training.iterations
        yield Derived("optimizer.lr_decay_iterations", decay, "the iterations of the run")
    if optimizer.lr_schedule == "wsd" and optimizer.wsd_decay_iterations is None:
        assert decay is not None
        final = min(max(1, decay // 10), decay - warmup)
        yield Derived("optimizer.wsd_decay_iterations", final, f"a tenth of {decay} iterations")


def _derive_loss_scale(run: Run, global_batch_size: int) -> Iterator[Derived]:
    """The dynamic loss scale of an fp16 run, in Megatron's terms; its growth and backoff are 2 and 1/2."""
    training = run.training
    if training.precision != "fp16" or training.loss_scale != 0.0:
        return
    least = training.min_loss_scale
    if least is None:
        least = min(1.0, training.initial_loss_scale or 1.0)
        yield Derived("training.min_loss_scale", least, "gradients made smaller than they are would only lose digits")
    if training.initial_loss_scale is None:
        # A token's loss starts backward with scale / tokens. 16 leaves room for 4000 times as much before fp16 ends at 65504, and
        # keeps the gradient of a logit of probability 1e-5 above 2^-14, where fp16 begins to lose digits. One number for every batch
        # does worse: 2^16 leaves that logit 4 bits at a million tokens, and 2^32 (Megatron's) begins with a dozen skipped iterations.
        tokens = global_batch_size * training.seq_length
        scale = max(least, 2.0 ** math.floor(math.log2(INITIAL_TOKEN_SCALE * tokens)))
        reason = f"{INITIAL_TOKEN_SCALE} x global batch {global_batch_size} x sequence length {training.seq_length}, as a power of 2"
        yield Derived("training.initial_loss_scale", scale, reason)
    if training.loss_scale_window is None:
        yield Derived("training.loss_scale_window", 1000, "iterations without overflow before the loss scale doubles")
    if training.loss_scale_hysteresis is None:
        yield Derived("training.loss_scale_hysteresis", 2, "the second overflow after a doubling is the first to halve the loss scale")


def _derive_paths(run: Run, machine: Machine) -> Iterator[Derived]:
    if machine.data is not None and machine.data != run.data.data:
        yield Derived("data.data", machine.data, "the prefix as it is on disk")
    if machine.tokenizer is not None and run.data.tokenizer is None:
        yield Derived("data.tokenizer", machine.tokenizer, "recorded with the data")
    if machine.run_dir is not None and run.logging.run_dir is None:
        yield Derived("logging.run_dir", machine.run_dir, "a new folder for this run")


def as_dict(run: Run) -> dict[str, Any]:
    """A run as nested plain values, section by section."""
    return dataclasses.asdict(run)
