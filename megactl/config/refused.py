"""The closed table of combinations that this version refuses although each setting is valid alone. Everything not in it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from megactl.config.memory import offload_targets
from megactl.config.schema import Data, Model, Parallel, Run
from megactl.config.shown import Names
from megactl.errors import Problem


@dataclass(frozen=True)
class Refusal:
    """`settings` are named in the message; `applies` says whether a run has the combination."""

    settings: tuple[str, ...]
    applies: Callable[[Run], bool]
    reason: str
    instead: str


_FOR_BERT = {
    "data.mask_probability": "GPT predicts every token and masks none",
    "data.mask_ngrams": "GPT predicts every token and masks none",
    "data.whole_word_masking": "GPT predicts every token and masks none",
    "data.short_seq_probability": "GPT samples are cut from running text, and all of one length",
    "data.sentence_task": "GPT has no sentence pairs",
}
_FOR_GPT = {
    "data.reset_position_ids": "BERT's samples are pairs of sentences, without end-of-document tokens",
    "data.reset_attention_mask": "BERT's samples are pairs of sentences, without end-of-document tokens",
    "data.eod_mask_loss": "BERT's loss is on masked tokens alone",
}


def _only_for(name: str, architecture: str, reason: str) -> Refusal:
    """A setting of the data that the other model has no use for."""
    key = name.partition(".")[2]
    default = Data.__dataclass_fields__[key].default
    flag = Data.__dataclass_fields__[key].metadata["flags"][0].partition("/")[0]
    applies = lambda run: run.model.architecture != architecture and getattr(run.data, key) != default  # noqa: E731
    return Refusal((name, "model.architecture"), applies, reason, f"use --model {architecture}, or leave {flag} out")


_DYNAMIC_SCALE = ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "loss_scale_hysteresis")


def _is_given(name: str) -> Callable[[Run], bool]:
    return lambda run: getattr(run.training, name) not in (None, 0.0)


def _loss_scale_rows() -> Iterator[Refusal]:
    """A loss scale belongs to fp16, and what moves a scale to a dynamic one."""
    for name in ("loss_scale", *_DYNAMIC_SCALE):
        flag, given = f"--{name.replace('_', '-')}", _is_given(name)
        yield Refusal(
            (f"training.{name}", "training.precision"),
            lambda run, given=given: given(run) and run.training.precision != "fp16",
            "only gradients in fp16 need a loss scale: those of the others have the range of fp32 or more",
            f"use --precision fp16, or leave {flag} out",
        )
    for name in _DYNAMIC_SCALE:
        flag, given = f"--{name.replace('_', '-')}", _is_given(name)
        yield Refusal(
            (f"training.{name}", "training.loss_scale"),
            lambda run, given=given: given(run) and run.training.precision == "fp16" and run.training.loss_scale != 0.0,
            "a constant loss scale does not move",
            f"use --loss-scale 0, or leave {flag} out",
        )


def _idle_model_setting(name: str, needs: str, applies: Callable[[Model], bool], reason: str, instead: str) -> Refusal:
    """A setting of the model that nothing would read, because of another one."""
    field = Model.__dataclass_fields__[name]
    flag = field.metadata["flags"][0]
    return Refusal(
        (f"model.{name}", f"model.{needs}"),
        lambda run: applies(run.model) and getattr(run.model, name) != field.default,
        reason,
        f"use {instead}, or leave {flag} out",
    )


def _architecture_rows() -> Iterator[Refusal]:
    """Settings that belong to one kind of positions or of MLP."""
    learned, unscaled = "learned positions turn nothing", "without a factor no wavelength is stretched"
    for name in ("rope_base", "rotary_percent", "rope_scaling_factor"):
        yield _idle_model_setting(
            name, "position_embedding", lambda model: model.position_embedding != "rope", learned, "--position-embedding rope"
        )
    for name in ("rope_original_positions", "rope_low_frequency", "rope_high_frequency"):
        yield _idle_model_setting(
            name, "rope_scaling_factor", lambda model: model.rope_scaling_factor == 1.0, unscaled, "--rope-scaling-factor 8"
        )
    yield _idle_model_setting("gelu", "activation", lambda model: model.activation == "swiglu", "SwiGLU has no GELU", "--activation gelu")


def _offloaded(run: Run) -> frozenset[str]:
    """What --offload names; nothing where it cannot be read, which is a mistake of its own."""
    try:
        return offload_targets(run.memory.offload)
    except ValueError:
        return frozenset()


def _needs_full(name: str, given: Callable[[Run], bool], reason: str, flag: str) -> Refusal:
    """A setting that works on the saved inputs of full recomputation."""
    applies = lambda run: given(run) and run.memory.recompute != "full"  # noqa: E731
    return Refusal((name, "memory.recompute"), applies, reason, f"use --recompute full, or leave {flag} out")


_RECOMPUTE_ROWS = (
    _needs_full(
        "memory.recompute_method",
        lambda run: run.memory.recompute_method != "uniform",
        "only full recomputation has groups of layers",
        "--recompute-method",
    ),
    _needs_full(
        "memory.recompute_layers",
        lambda run: run.memory.recompute_layers > 1,
        "only full recomputation has groups of layers",
        "--recompute-layers",
    ),
    _needs_full(
        "memory.partition_activations",
        lambda run: run.memory.partition_activations,
        "only the inputs that full recomputation saves are the same on all ranks of --tp, so that each may keep a share",
        "--partition-activations",
    ),
    Refusal(
        ("memory.partition_activations", "parallel.tensor_parallel"),
        lambda run: run.memory.partition_activations and run.parallel.tensor_parallel == 1,
        "saved inputs are shared over the ranks of --tp, and there is one",
        "use --tp 2 or more, or leave --partition-activations out",
    ),
    Refusal(
        ("memory.partition_activations", "parallel.sequence_parallel"),
        lambda run: run.memory.partition_activations and run.parallel.sequence_parallel,
        "under sequence parallelism a rank's saved inputs are its own share of the tokens already",
        "leave --partition-activations out: each rank keeps 1 / tp of them all the same",
    ),
    _needs_full(
        "memory.offload",
        lambda run: "activations" in _offloaded(run),
        "only the inputs of recomputed layers are few enough bytes to copy beside the computing; a layer keeps 17 times as many",
        "activations in --offload",
    ),
)


def _needs_zero_3(name: str, given: Callable[[Run], bool], reason: str, flag: str) -> Refusal:
    """A setting of how weights are shared."""
    applies = lambda run: given(run) and run.parallel.zero in (None, 0, 1, 2)  # noqa: E731
    return Refusal((name, "parallel.zero"), applies, reason, f"use --zero 3, or leave {flag} out")


_ZERO_ROWS = (
    _needs_zero_3(
        "parallel.zero_prefetch",
        lambda run: run.parallel.zero_prefetch != Parallel.zero_prefetch,
        "only ZeRO 3 gathers weights, which it can do ahead of their use",
        "--zero-prefetch",
    ),
    _needs_zero_3(
        "parallel.persistence_threshold",
        lambda run: run.parallel.persistence_threshold != Parallel.persistence_threshold,
        "only ZeRO 3 divides the weights, of which small ones can stay whole",
        "--persistence-threshold",
    ),
    _needs_zero_3(
        "parallel.split_layers",
        lambda run: run.parallel.split_layers,
        "only ZeRO 3 gathers layers, which it can do by halves",
        "--split-layers",
    ),
    _needs_zero_3(
        "parallel.tile",
        lambda run: run.parallel.tile > 1,
        "without ZeRO 3 all tiles of a matrix are there at once: they save nothing, and small products are slower",
        "--tile",
    ),
    _needs_zero_3(
        "memory.offload",
        lambda run: "parameters" in _offloaded(run),
        "without ZeRO 3 all weights stay on the device between one use and the next, and none can be elsewhere",
        "parameters in --offload",
    ),
)


REFUSED: tuple[Refusal, ...] = (
    *_ZERO_ROWS,
    Refusal(
        ("parallel.sequence_parallel", "parallel.tensor_parallel"),
        lambda run: run.parallel.sequence_parallel and run.parallel.tensor_parallel == 1,
        "the ranks of tensor parallelism share the tokens, and there is one",
        "use --tp 2 or more, or leave --sp out",
    ),
    Refusal(
        ("parallel.virtual_pipeline", "parallel.pipeline_parallel"),
        lambda run: run.parallel.virtual_pipeline > 1 and run.parallel.pipeline_parallel == 1,
        "one pipeline rank waits for no other, so there is no bubble that more chunks could shorten",
        "use --vpp 1, or --pp 2 or more",
    ),
    Refusal(
        ("parallel.virtual_pipeline", "parallel.schedule"),
        lambda run: run.parallel.virtual_pipeline > 1 and run.parallel.schedule == "zb-v",
        "the V has two chunks on each rank, no more and no less",
        "leave --vpp out, or use --schedule 1f1b",
    ),
    Refusal(
        ("parallel.virtual_pipeline", "parallel.schedule"),
        lambda run: run.parallel.virtual_pipeline > 1 and run.parallel.schedule in ("gpipe", "zb-h1", "zb-h2"),
        "this order is made for one stage a rank, and only 1f1b is interleaved",
        "use --schedule 1f1b, or --vpp 1",
    ),
    Refusal(
        ("parallel.schedule", "parallel.pipeline_parallel"),
        lambda run: run.parallel.schedule.startswith("zb") and run.parallel.pipeline_parallel == 1,
        "no rank waits for another, so there is no bubble for weight gradients to fill",
        "use --schedule 1f1b, or --pp 2 or more",
    ),
    Refusal(
        ("parallel.pipeline_split", "parallel.pipeline_parallel"),
        lambda run: run.parallel.pipeline_split is not None and run.parallel.pipeline_parallel == 1,
        "one pipeline rank holds all layers, and there is nothing to split",
        "use --pp 2 or more, or leave --pp-split out",
    ),
    Refusal(
        ("training.precision", "training.device"),
        lambda run: run.training.precision == "fp64" and run.training.device == "cuda",
        "fp64 is for verification and runs on the CPU only",
        "use --device cpu, or --precision fp32",
    ),
    Refusal(
        ("model.sentence_head", "model.architecture"),
        lambda run: run.model.sentence_head is not None and run.model.architecture == "gpt",
        "only BERT is trained on sentence pairs",
        "use --model bert, or leave --sentence-head out",
    ),
    *_architecture_rows(),
    Refusal(
        ("parallel.context_method", "parallel.context_parallel"),
        lambda run: run.parallel.context_method != "ring" and run.parallel.context_parallel == 1,
        "each rank holds whole sequences, and attention has nothing to exchange",
        "use --cp 2 or more, or leave --cp-method out",
    ),
    Refusal(
        ("checkpoint.load", "checkpoint.resume"),
        lambda run: run.checkpoint.load is not None and run.checkpoint.resume == "must",
        "a run either starts from another run's checkpoint or must continue its own",
        "use --resume auto with --load, or leave --load out",
    ),
    Refusal(
        ("checkpoint.resume",),
        lambda run: run.checkpoint.resume == "must" and run.logging.run_dir is None,
        "without --run-dir the run directory is new and holds no checkpoint",
        "give --run-dir, or use --resume auto",
    ),
    Refusal(
        ("checkpoint.load_weights",),
        lambda run: run.checkpoint.load_weights and run.checkpoint.load is None,
        "says what to take from --load, which is not given",
        "give --load PATH, or leave --load-weights out",
    ),
    Refusal(
        ("optimizer.wsd_decay_iterations", "optimizer.lr_schedule"),
        lambda run: run.optimizer.wsd_decay_iterations is not None and run.optimizer.lr_schedule != "wsd",
        "only the wsd schedule has a final decay of its own",
        "use --lr-schedule wsd, or leave --wsd-decay-iterations out",
    ),
    Refusal(
        ("optimizer.lr_decay_iterations", "optimizer.lr_schedule"),
        lambda run: run.optimizer.lr_decay_iterations is not None and run.optimizer.lr_schedule == "constant",
        "a constant learning rate does not decay",
        "use --lr-schedule cosine, or leave --lr-decay-iterations out",
    ),
    Refusal(
        ("optimizer.min_lr", "optimizer.lr_schedule"),
        lambda run: run.optimizer.min_lr > 0 and run.optimizer.lr_schedule == "constant",
        "a constant learning rate does not decay",
        "use --lr-schedule cosine, or leave --min-lr out",
    ),
    Refusal(
        ("data.split", "data.mock_data"),
        lambda run: run.data.mock_data and run.data.split != Data.__dataclass_fields__["split"].default,
        "generated tokens are as many as a run asks for, and nothing is shared out",
        "leave --split out, or give --data",
    ),
    Refusal(
        ("data.data_cache", "data.mock_data"),
        lambda run: run.data.data_cache is not None and run.data.mock_data,
        "generated tokens have no sample index to keep",
        "leave --data-cache out",
    ),
    Refusal(
        ("data.sentence_task", "model.sentence_head"),
        lambda run: run.model.architecture == "bert" and run.data.sentence_task != "sop" and run.model.sentence_head is False,
        "without the sentence head a sample is one part, and there is no task",
        "leave --no-sentence-head out, or --sentence-task",
    ),
    *(_only_for(name, "bert", reason) for name, reason in _FOR_BERT.items()),
    *(_only_for(name, "gpt", reason) for name, reason in _FOR_GPT.items()),
    *_loss_scale_rows(),
    *_RECOMPUTE_ROWS,
)


def refusals(run: Run, origins: Mapping[str, str]) -> list[Problem]:
    """One problem for each row of the table that `run` has."""
    names = Names(run, origins)
    return [
        Problem(" with ".join(names.show(name) for name in row.settings), row.reason, row.instead) for row in REFUSED if row.applies(run)
    ]
