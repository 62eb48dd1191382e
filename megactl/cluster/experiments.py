"""The experiments of Narayanan et al., SC21, arXiv:2104.04473: Table 1 and Figures 11 to 18, every point with its exact parameters.

The parameters are those of the scripts published with the paper (Megatron-LM, commit 6985e58938). A node has 8 GPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megactl.config.names import nearest
from megactl.errors import ConfigError, Problem

GPUS_PER_NODE = 8

# What all points have in common, by the settings of train.
COMMON: dict[str, Any] = {
    "model.vocab_size": 51200,
    "model.max_positions": 2048,
    "training.seq_length": 2048,
    "training.iterations": 500,
    "training.precision": "fp16",
    "training.loss_scale": 8192.0,
    "training.eval_interval": 1000,
    "training.eval_iterations": 100,
    "optimizer.lr": 1e-4,
    "optimizer.min_lr": 1e-5,
    "optimizer.lr_schedule": "cosine",
    "optimizer.lr_decay_iterations": 320,
    "optimizer.warmup": "1%",
    "optimizer.clip_grad": 1.0,
    "data.split": "969,30,1",
    "logging.log_interval": 5,
}
# What the published scripts ask Slurm for; and no save before the time is up, since what counts is measured by then.
CLUSTER: dict[str, Any] = {
    "gpus_per_node": GPUS_PER_NODE,
    "time": "00:30:00",
    "exclusive": True,
    "memory": "0",
    "signal": "none",
    "requeue": False,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One point. `layers_per_virtual_stage`: None without the interleaved schedule. `scatter_gather`: None where it is not looked at."""

    point: str
    layers: int
    hidden: int
    heads: int
    tp: int
    pp: int
    micro_batch_size: int = 1
    global_batch_size: int
    nodes: int
    layers_per_virtual_stage: int | None = None
    recompute: bool = True
    scatter_gather: bool | None = None

    @property
    def gpus(self) -> int:
        """All GPUs of the point."""
        return self.nodes * GPUS_PER_NODE

    @property
    def dp(self) -> int:
        """Replicas: what is left of the GPUs."""
        return self.gpus // (self.tp * self.pp)

    @property
    def vpp(self) -> int:
        """Model chunks of a rank; 1 without the interleaved schedule."""
        return self.layers // (self.pp * self.layers_per_virtual_stage) if self.layers_per_virtual_stage else 1

    def as_dict(self) -> dict[str, Any]:
        """Every parameter, those that follow from others included."""
        return {**asdict(self), "dp": self.dp, "gpus": self.gpus, "vpp": self.vpp}

    def techniques(self) -> dict[str, Any]:
        """The settings beyond the plain ones, as train names them, and their values: what --without may leave out."""
        found = {"recompute": "full" if self.recompute else None, "vpp": self.vpp if self.vpp > 1 else None}
        found |= {"scatter_gather": self.scatter_gather}
        return {name: value for name, value in found.items() if value is not None}

    def settings(self) -> dict[str, Any]:
        """The parameters that are settings of train, by their dotted names."""
        return {
            "model.architecture": "gpt",
            "model.num_layers": self.layers,
            "model.hidden_size": self.hidden,
            "model.num_heads": self.heads,
            "parallel.tensor_parallel": self.tp,
            "parallel.pipeline_parallel": self.pp,
            "parallel.data_parallel": self.dp,
            "training.micro_batch_size": self.micro_batch_size,
            "training.global_batch_size": self.global_batch_size,
        }


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or figure. `varied`: the fields of a row that its points differ in; the first is a figure's x axis, the others its series."""

    name: str
    title: str
    varied: tuple[str, ...]
    rows: tuple[Row, ...]


@functools.cache
def experiments() -> dict[str, Experiment]:
    """Every experiment by its name, in the paper's order."""
    return {item.name: item for item in (_table_1(), *_figures())}


def find_experiment(name: str) -> Experiment:
    """The experiment called `name`. Raises ConfigError with the nearest name."""
    found = experiments().get(name)
    if found is None:
        close = nearest(name, experiments())
        instead = f"did you mean {close}?" if close else f"use one of {', '.join(experiments())}"
        raise ConfigError([Problem(f"--experiment {name}", "no such experiment", instead)])
    return found


def _table_1() -> Experiment:
    # point: (layers, hidden, heads, tp, pp, micro-batch, global batch, nodes, layers of a virtual stage)
    shapes: dict[str, tuple[int, int, int, int, int, int, int, int, int | None]] = {
        "1.7B": (24, 2304, 24, 1, 1, 16, 512, 4, None),
        "3.6B": (30, 3072, 32, 2, 1, 16, 512, 8, None),
        "7.5B": (36, 4096, 32, 4, 1, 16, 512, 16, None),
        "18B": (40, 6144, 48, 8, 1, 8, 1024, 32, None),
        "39B": (48, 8192, 64, 8, 2, 4, 1536, 64, None),
        "76B": (60, 10240, 80, 8, 4, 2, 1792, 128, 5),
        "145B": (80, 12288, 96, 8, 8, 2, 2304, 192, 5),
        "310B": (96, 16384, 128, 8, 16, 1, 2160, 240, 3),
        "530B": (105, 20480, 128, 8, 35, 1, 2520, 315, 1),
        "1T": (128, 25600, 160, 8, 64, 1, 3072, 384, None),
    }
    names = ("layers", "hidden", "heads", "tp", "pp", "micro_batch_size", "global_batch_size", "nodes", "layers_per_virtual_stage")
    rows = tuple(Row(point=point, **dict(zip(names, shape, strict=True))) for point, shape in shapes.items())
    return Experiment(name="table_1", title="Weak scaling of GPT models from 1.7B to 1T parameters", varied=("gpus",), rows=rows)


def _figures() -> Iterator[Experiment]:
    rows = tuple(
        Row(point=f"pp{pp}-gbs{batch}", layers=3 * pp, hidden=20480, heads=128, tp=8, pp=pp, global_batch_size=batch, nodes=pp)
        for batch in (8, 128)
        for pp in (1, 2, 4, 8)
    )
    yield Experiment(name="figure_11", title="Weak scaling of pipeline parallelism", varied=("pp", "global_batch_size"), rows=rows)
    rows = tuple(
        Row(point=f"{name}-gbs{batch}", global_batch_size=batch, layers_per_virtual_stage=layers, **_gpt_175b())
        for name, layers in (("interleaved", 2), ("non-interleaved", None))
        for batch in range(12, 61, 12)
    )
    yield Experiment(
        name="figure_12", title="Interleaved schedule on a GPT of 175B parameters", varied=("global_batch_size", "vpp"), rows=rows
    )
    shape = {"layers": 32, "hidden": 20480, "heads": 128, "nodes": 8}
    rows = tuple(
        Row(point=f"pp{pp}-tp{64 // pp}-gbs{batch}", tp=64 // pp, pp=pp, global_batch_size=batch, **shape)
        for batch in (32, 128)
        for pp in (2, 4, 8, 16, 32)
    )
    yield Experiment(name="figure_13", title="Pipeline against tensor parallelism, 162.2B", varied=("pp", "global_batch_size"), rows=rows)
    yield from _figures_5b()
    yield from _figures_large()


def _gpt_175b() -> dict[str, int]:
    return {"layers": 96, "hidden": 12288, "heads": 96, "tp": 8, "pp": 12, "nodes": 12}


def _figures_5b() -> Iterator[Experiment]:
    shape = {"layers": 32, "hidden": 3840, "heads": 32, "nodes": 8}
    degrees = (2, 4, 8, 16, 32)
    rows = tuple(
        Row(point=f"pp{pp}-dp{64 // pp}-gbs{batch}", tp=1, pp=pp, global_batch_size=batch, **shape) for batch in (32, 512) for pp in degrees
    )
    yield Experiment(name="figure_14", title="Pipeline against data parallelism, 5.9B", varied=("pp", "global_batch_size"), rows=rows)
    rows = tuple(
        Row(point=f"tp{tp}-dp{64 // tp}-gbs{batch}", tp=tp, pp=1, global_batch_size=batch, **shape)
        for batch in (32, 128, 512)
        for tp in degrees
    )
    yield Experiment(name="figure_15", title="Tensor against data parallelism, 5.9B", varied=("tp", "global_batch_size"), rows=rows)


def _figures_large() -> Iterator[Experiment]:
    shape = {"layers": 32, "hidden": 15360, "heads": 128, "tp": 8, "pp": 8, "nodes": 8}
    rows = tuple(
        Row(point=f"mbs{size}-gbs{batch}", micro_batch_size=size, global_batch_size=batch, **shape)
        for batch in (128, 512)
        for size in (1, 2, 4, 8)
    )
    yield Experiment(name="figure_16", title="Size of the micro-batch, 91B", varied=("micro_batch_size", "global_batch_size"), rows=rows)
    shape = {"layers": 80, "hidden": 12288, "heads": 96, "tp": 8, "pp": 16, "nodes": 16}
    rows = tuple(
        Row(point=f"{'' if recompute else 'no-'}recompute-gbs{batch}", global_batch_size=batch, recompute=recompute, **shape)
        for recompute in (True, False)
        for batch in (2**power for power in range(9))
    )
    yield Experiment(name="figure_17", title="Activation recomputation, 145B", varied=("global_batch_size", "recompute"), rows=rows)
    rows = tuple(
        Row(
            point=f"{'' if on else 'no-'}scatter-gather-gbs{batch}", global_batch_size=batch, layers_per_virtual_stage=2,
            scatter_gather=on, **_gpt_175b(),
        )
        for on in (True, False)
        for batch in range(12, 61, 12)
    )  # fmt: skip
    yield Experiment(
        name="figure_18", title="Scatter-gather between stages, 175B", varied=("global_batch_size", "scatter_gather"), rows=rows
    )
