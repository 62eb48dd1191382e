"""The parts of all ranks of a layout in one process, and what they hold: to save at one layout and load at another."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from megactl.config.schema import Run
from megactl.engine.mesh import Axis, Mesh
from megactl.engine.parallelize import Part, build_parts


def parts_of(run: Run) -> Iterator[tuple[Part, Mesh]]:
    """Every part of each rank; what is built needs no other rank."""
    parallel = run.parallel
    tp, pp, dp = parallel.tensor_parallel, parallel.pipeline_parallel, parallel.data_parallel
    for p, d, t in product(range(pp), range(dp), range(tp)):
        axes = {"tp": Axis(tp, t), "dp": Axis(dp, d), "replicas": Axis(dp, d), "pp": Axis(pp, p)}
        mesh = Mesh(torch.device("cpu"), rank=t + tp * (d + dp * p), world_size=tp * pp * dp, **axes)
        for part in build_parts(run, mesh):
            yield part, mesh


def remember(part: Part) -> None:
    """Moments that tell every element apart."""
    for state in part.optimizer.states:
        state.exp_avg.copy_(state.master), state.exp_avg_sq.copy_(state.master.square())


def held(part: Part) -> list[torch.Tensor]:
    """All that a part keeps between steps, gradients apart."""
    kinds = ("param", "master", "exp_avg", "exp_avg_sq")
    whole = [tensor for tensor in part.flat.bucket_params if tensor.untyped_storage().nbytes()]
    return [*whole, *(state.part(kind) for state in part.optimizer.states for kind in kinds)]
