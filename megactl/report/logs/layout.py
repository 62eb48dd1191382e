"""How a run was laid out: what its arguments say, then what follows from them, then (where asked for) what the file name says.

Nothing is guessed: a field nobody stated is None. Every value that was not read as it stands is explained in `derived`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from megactl.report.logs.filename import facts
from megactl.report.logs.records import Run


@dataclass
class Layout:
    """Degrees, batches and switches of a run; None is unknown. sp, partition_activations and scattered_embeddings are yes or no.

    recompute: "none", "selective" or "full". offload: "none", or what of "optimizer", "parameters", "activations", with + between.
    bucket: elements of one gradient bucket. cp is read because it divides the ranks, too. derived: why a field has its value, where no
    line states it.
    """

    gpus: int | None = None
    nodes: int | None = None
    dp: int | None = None
    tp: int | None = None
    pp: int | None = None
    vpp: int | None = None
    cp: int | None = None
    sp: bool | None = None
    recompute: str | None = None
    zero: int | None = None
    bucket: int | None = None
    offload: str | None = None
    partition_activations: bool | None = None
    scattered_embeddings: bool | None = None
    mbs: int | None = None
    gas: int | None = None
    gbs: int | None = None
    seq: int | None = None
    derived: dict[str, str] = field(default_factory=dict)

    def settle(self, name: str, value: Any, why: str) -> None:
        """Give an unknown field a value that no line states, with the reason."""
        if value is not None and getattr(self, name) is None:
            setattr(self, name, value)
            self.derived[name] = why


NAMES: Mapping[str, tuple[str, ...]] = {
    "gpus": ("world_size",),
    "nodes": ("nnodes", "num_nodes"),
    "dp": ("data_parallel_size", "data_parallel"),
    "tp": ("tensor_model_parallel_size", "model_parallel_size", "tensor_parallel"),
    "pp": ("pipeline_model_parallel_size", "pipe_parallel_size", "pipeline_parallel"),
    "vpp": ("virtual_pipeline_model_parallel_size", "virtual_pipeline"),
    "cp": ("context_parallel_size", "context_parallel"),
    "sp": ("sequence_parallel",),
    "zero": ("zero_optimization.stage", "zero_optimization_stage", "zero_stage", "zero"),
    "bucket": ("zero_optimization.reduce_bucket_size", "reduce_bucket_size", "zero_reduce_bucket_size", "ddp_bucket_size", "bucket_size"),
    "partition_activations": (
        "activation_checkpointing.partition_activations",
        "partition_activations",
        "distribute_saved_activations",
        "distribute_checkpointed_activations",
    ),
    "scattered_embeddings": ("scattered_embeddings",),
    "mbs": ("micro_batch_size", "train_micro_batch_size_per_gpu", "per_device_train_batch_size", "batch_size"),
    "gas": ("gradient_accumulation_steps",),
    "gbs": ("global_batch_size", "train_batch_size"),
    "seq": ("seq_length", "encoder_seq_length", "block_size", "n_positions"),
}
"""Names under which each era of each system states a field, the one that rules the others first."""

# A larger "count" is damage, and would overflow what is computed from it.
_MOST = 1e15
_UNSTATED = frozenset({"", "none", "null", "auto", "n/a"})


def text(arguments: Mapping[str, str], *names: str) -> str | None:
    """The first of `names` that is stated, as printed; None where all are missing or say None."""
    return next((value for name in names if (value := arguments.get(name, "").strip().strip("'\"")).lower() not in _UNSTATED), None)


def whole(arguments: Mapping[str, str], *names: str) -> int | None:
    """The same as a whole number ("5e8" and "64.0" are ones, too); None for anything that is no count."""
    stated = text(arguments, *names)
    try:
        number = float(stated) if stated is not None else math.nan
    except ValueError:
        return None
    return int(number) if 0 <= number <= _MOST and number == int(number) else None


def switch(arguments: Mapping[str, str], *names: str) -> bool | None:
    """The same as yes or no."""
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get((text(arguments, *names) or "").lower())


def layout_of(run: Run, *, from_filename: bool = False) -> Layout:
    """The layout of a run. `from_filename`: ask the file's name where the log is silent."""
    layout = _stated(run)
    if from_filename:
        for name, value in facts(run.file).items():
            if name != "model_b":
                layout.settle(name, value, "in the file's name")
    _follow(layout, run)
    return layout


def _stated(run: Run) -> Layout:
    readers: dict[str, Callable[..., Any]] = {name: whole for name in NAMES}
    readers |= dict.fromkeys(("sp", "partition_activations", "scattered_embeddings"), switch)
    layout = Layout(**{name: readers[name](run.arguments, *names) for name, names in NAMES.items()})
    for name in ("gpus", "nodes", "dp", "tp", "pp", "cp", "mbs", "gas", "gbs", "seq"):
        # A degree or a batch of 0 is a placeholder.
        setattr(layout, name, getattr(layout, name) or None)
    layout.recompute, layout.offload = _recompute(run.arguments), _offload(run.arguments)
    if layout.gpus is None and run.world_size:
        layout.gpus = run.world_size
    if layout.zero is None and switch(run.arguments, "use_distributed_optimizer"):
        layout.settle("zero", 1, "--use-distributed-optimizer is ZeRO-1")
    if switch(run.arguments, "deepspeed") is False and layout.zero:
        # Megatron-DeepSpeed prints its ZeRO stage also where it runs without DeepSpeed.
        layout.zero, layout.derived["zero"] = 0, "DeepSpeed is off"
    if layout.zero == 0:
        # Configurations print a default bucket that nothing uses.
        layout.bucket = None
    return layout


def _recompute(arguments: Mapping[str, str]) -> str | None:
    granularity = text(arguments, "recompute_granularity", "recompute")
    if granularity in ("full", "selective", "none"):
        return granularity
    if switch(arguments, "recompute_activations"):
        return "selective"
    stated = [switch(arguments, name) for name in ("checkpoint_activations", "gradient_checkpointing", "activations_checkpoint_method")]
    if True in stated or text(arguments, "activations_checkpoint_method") in ("uniform", "block"):
        return "full"
    # An argument that is listed and says None is a switch that is off; a missing one says nothing.
    listed = {"recompute_granularity", "recompute", "checkpoint_activations", "gradient_checkpointing"} & arguments.keys()
    return "none" if False in stated or listed else None


def _offload(arguments: Mapping[str, str]) -> str | None:
    if "offload" in arguments:
        # megactl's own: parts with commas between, or None.
        return "+".join(part.strip() for part in (text(arguments, "offload") or "none").split(","))

    def device(part: str) -> str | None:
        return arguments.get(f"zero_optimization.offload_{part}.device", arguments.get(f"offload_{part}.device"))

    both = {"optimizer": device("optimizer"), "parameters": device("param")}
    old = {"optimizer": switch(arguments, "zero_optimization.cpu_offload", "cpu_offload", "optimizer_cpu_offload"),
           "parameters": switch(arguments, "zero_optimization.cpu_offload_params", "cpu_offload_params")}  # fmt: skip
    if not any(value is not None for value in (*both.values(), *old.values())):
        return None
    on = [part for part in both if (both[part] or "none").strip("'\" ").lower() in ("cpu", "nvme") or old[part]]
    return "+".join(on) or "none"


def _follow(layout: Layout, run: Run) -> None:
    """What follows from the rest, in an order in which each line may use those before it."""
    _follow_from_system(layout, run)
    if layout.vpp is None:
        _follow_vpp(layout, run)
    split = _product(layout.tp, layout.pp, layout.cp or 1)
    if split and layout.gpus and layout.gpus % split == 0:
        layout.settle("dp", layout.gpus // split, "gpus / (tp x pp x cp)" if layout.cp else "gpus / (tp x pp)")
    layout.settle("gpus", _product(split, layout.dp), "tp x pp x dp")
    printed = [int(value) for value in run.iterations.global_batch if 1 <= value <= _MOST]
    if printed and layout.gbs != printed[-1]:
        layout.gbs, layout.derived["gbs"] = printed[-1], "of the last iteration line"
    layout.settle("gbs", _product(layout.mbs, layout.gas, layout.dp), "mbs x gas x dp")
    one_pass = _product(layout.mbs, layout.dp)
    if one_pass and layout.gbs and layout.gbs % one_pass == 0:
        layout.settle("gas", layout.gbs // one_pass, "gbs / (mbs x dp)")


def _follow_from_system(layout: Layout, run: Run) -> None:
    if run.system == "hf-trainer":
        layout.settle("tp", 1, "the Hugging Face Trainer does not split layers")
        layout.settle("pp", 1, "the Hugging Face Trainer has no pipeline")
    elif layout.tp and run.system.startswith(("megatron", "megactl")) and not any(name in run.arguments for name in NAMES["pp"]):
        layout.settle("pp", 1, "the arguments have no pipeline size")
    per_node = whole(run.arguments, "gpus_per_node", "nproc_per_node")
    if per_node and layout.nodes:
        layout.settle("gpus", per_node * layout.nodes, "nodes x gpus a node")
    elif per_node and layout.gpus and layout.gpus % per_node == 0:
        layout.settle("nodes", layout.gpus // per_node, "gpus / gpus a node")


def _follow_vpp(layout: Layout, run: Run) -> None:
    a_stage, layers = whole(run.arguments, "num_layers_per_virtual_pipeline_stage"), whole(run.arguments, "num_layers")
    if a_stage and layers and layout.pp and layers % (layout.pp * a_stage) == 0:
        layout.settle("vpp", layers // (layout.pp * a_stage), "layers / (pp x layers a virtual stage)")


def _product(*factors: int | None) -> int | None:
    return math.prod(factors) if all(factors) else None  # type: ignore[arg-type]


FIELDS = tuple(item.name for item in fields(Layout) if item.name != "derived")
