"""A layout by rule of thumb: tensor parallelism inside a node, pipeline stages across nodes, replicas with what is left.

Source: Narayanan et al., SC21 (arXiv:2104.04473, section 5.1, takeaways 1 and 2), in the form in which people note it down. With MP
GPUs to a replica: TP = min(MP, GPUs of a node), PP = MP / TP, DP = GPUs / MP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megactl.config.schema import Model
from megactl.costmodel.memory import Layout, MemoryEstimate, estimate_memory
from megactl.costmodel.parameters import ffn_width
from megactl.errors import ConfigError, Problem

RESERVED_GIB = 2.0
"""Left for what no estimate holds: the CUDA context and the buffers of NCCL and the libraries."""

FRAGMENTATION = 1.06
"""The caching allocator reserves up to this many times what the tensors take."""


@dataclass(frozen=True)
class SuggestedLayout:
    """Degrees, whose product is the number of GPUs, and the predicted memory of the fullest rank in bytes."""

    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    memory: MemoryEstimate

    @property
    def model_parallel(self) -> int:
        """GPUs that share one replica."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def needed_gib(self) -> float:
        """GiB a GPU must have."""
        return self.memory.total * FRAGMENTATION / 2**30 + RESERVED_GIB


def rule_of_thumb(model_parallel: int, *, gpus: int, gpus_per_node: int) -> tuple[int, int, int]:
    """(TP, PP, DP) for `model_parallel` GPUs to a replica. Raises ConfigError where these do not come out whole."""
    tensor = min(model_parallel, gpus_per_node)
    problems = []
    if model_parallel % tensor:
        rule = f"must be a multiple of the {gpus_per_node} GPUs of a node, or smaller"
        problems.append(Problem(f"--mp {model_parallel}", rule, f"use --mp {-(-model_parallel // tensor) * tensor}"))
    if gpus % model_parallel:
        rule = f"must divide --gpus {gpus}"
        more = -(-gpus // model_parallel) * model_parallel
        problems.append(Problem(f"--mp {model_parallel}", rule, f"use --gpus {more}"))
    if problems:
        raise ConfigError(problems)
    return tensor, model_parallel // tensor, gpus // model_parallel


def suggest_layout(
    model: Model,
    *,
    seq_length: int,
    gpus: int,
    gpus_per_node: int,
    gpu_memory_gib: float,
    micro_batch_size: int = 1,
    precision: str = "bf16",
    zero: int | None = None,
) -> SuggestedLayout:
    """The layout of fewest GPUs to a replica that fits `gpu_memory_gib`, without recomputation, with 1F1B and its pipeline full.

    `zero` None is ZeRO 1 where there are replicas. Raises ConfigError where nothing fits.
    """
    closest: SuggestedLayout | None = None
    options = {"seq_length": seq_length, "micro_batch_size": micro_batch_size, "precision": precision, "zero": zero}
    for degrees in _candidates(model, gpus, gpus_per_node):
        found = _estimated(model, degrees, **options)
        if found.needed_gib <= gpu_memory_gib:
            return found
        if closest is None or found.needed_gib < closest.needed_gib:
            closest = found
    raise ConfigError([_does_not_fit(closest, gpus, gpu_memory_gib)])


def check_layout(
    model: Model,
    model_parallel: int,
    *,
    seq_length: int,
    gpus: int,
    gpus_per_node: int,
    micro_batch_size: int = 1,
    precision: str = "bf16",
    zero: int | None = None,
) -> SuggestedLayout:
    """What the rule makes of `model_parallel` GPUs to a replica, fitting or not. Raises ConfigError where the model does not divide."""
    degrees = rule_of_thumb(model_parallel, gpus=gpus, gpus_per_node=gpus_per_node)
    return _estimated(model, degrees, seq_length=seq_length, micro_batch_size=micro_batch_size, precision=precision, zero=zero)


def _estimated(
    model: Model, degrees: tuple[int, int, int], *, seq_length: int, micro_batch_size: int, precision: str, zero: int | None
) -> SuggestedLayout:
    tensor, pipeline, data = degrees
    layout = Layout(
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        num_microbatches=pipeline,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        data_parallel=data,
        zero=int(data > 1) if zero is None else zero,
        precision=precision,
    )
    return SuggestedLayout(tensor, pipeline, data, estimate_memory(model, layout))


def _candidates(model: Model, gpus: int, gpus_per_node: int) -> Iterator[tuple[int, int, int]]:
    """The layouts the rule can give and the model can take, fewest GPUs to a replica first."""
    for model_parallel in (count for count in range(1, gpus + 1) if gpus % count == 0):
        tensor = min(model_parallel, gpus_per_node)
        widths = (model.num_heads, model.key_value_heads, model.hidden_size, ffn_width(model))
        pipeline = model_parallel // tensor
        if model_parallel % tensor == 0 and not any(width % tensor for width in widths) and model.num_layers % pipeline == 0:
            yield tensor, pipeline, gpus // model_parallel


def _does_not_fit(best: SuggestedLayout | None, gpus: int, gpu_memory_gib: float) -> Problem:
    if best is None:
        return Problem(f"--gpus {gpus}", "has no divisor that also divides heads and layers", "use a multiple of --gpus-per-node")
    least = f"tp {best.tensor_parallel} pp {best.pipeline_parallel} dp {best.data_parallel} needs {best.needed_gib:.1f} GiB a GPU"
    return Problem(f"--gpus {gpus}", f"are too few: {least}, and it has {gpu_memory_gib:g}", "use more --gpus, or GPUs with more memory")
