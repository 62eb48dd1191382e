"""How this process was started, and so how many ranks there are: by itself, by torchrun, or by srun. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megactl.config import slurm
from megactl.config.schema import Run
from megactl.errors import ConfigError, Problem

Kind = Literal["self", "torchrun", "srun", "srun-node"]


@dataclass(frozen=True)
class StartInfo:
    """Where this process stands among the ranks.

    `self`: no launcher; this process starts all `world_size` ranks here. `srun-node`: one task a node; this process starts the
    `local_world_size` ranks of its node, the first of them being `rank`. `torchrun`, `srun`: this process IS `rank`, started by others.
    `master_port` 0 means: any free port of this machine (only for `self`).
    """

    kind: Kind
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int

    @property
    def spawns(self) -> bool:
        """True where this process starts ranks instead of being one."""
        return self.kind in ("self", "srun-node")

    @property
    def is_first(self) -> bool:
        """True in the one process that may write the run directory's shared files."""
        return self.rank == 0


def start_info(run: Run, environ: Mapping[str, str], *, gpus: int) -> StartInfo:
    """How this process was started. `gpus`: GPUs this process sees that the run will use; 0 for a run on CPUs.

    Raises ConfigError for a half-set environment, and for `--nproc` where a launcher has already decided.
    """
    if "WORLD_SIZE" in environ or ("RANK" in environ and "LOCAL_RANK" in environ):
        return _torchrun(run, environ)
    if slurm.inside_srun(environ) and (slurm.integer(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") or 1) > 1:
        return _srun(run, environ, gpus)
    nodes = slurm.integer(environ, "SLURM_NNODES", "SLURM_JOB_NUM_NODES") or 1
    if nodes > 1 and not slurm.inside_srun(environ) and run.training.nproc is None:
        rule = f"this job has {nodes} nodes, but the command was not started by srun and would use this node alone"
        instead = "start it with `srun megactl train ...`, or give --nproc to use this node alone"
        raise ConfigError([Problem(f"SLURM_NNODES={nodes}", rule, instead)])
    world = self_world_size(run, gpus=gpus)
    return StartInfo("self", 0, 0, world, world, "127.0.0.1", 0)


def self_world_size(run: Run, *, gpus: int) -> int:
    """Ranks to start on this machine: --nproc, else every GPU, else (on CPUs) tp x pp x cp x dp with dp 1 unless given."""
    parallel = run.parallel
    product = parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel * (parallel.data_parallel or 1)
    return run.training.nproc or gpus or max(product, 1)


def _torchrun(run: Run, environ: Mapping[str, str]) -> StartInfo:
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        rule = "is set by torchrun together with the others, and is missing here"
        raise ConfigError([Problem(name, rule, "start with torchrun, or unset RANK, LOCAL_RANK and WORLD_SIZE") for name in missing])
    rank, world, local = (slurm.integer(environ, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_world = slurm.integer(environ, "LOCAL_WORLD_SIZE") or world
    port = slurm.integer(environ, "MASTER_PORT")
    assert rank is not None and world is not None and local is not None and local_world is not None and port is not None
    if rank >= world:
        raise ConfigError([Problem(f"RANK={rank}", f"must be below WORLD_SIZE={world}", "start with torchrun")])
    _refuse_nproc(run, local_world, "torchrun")
    return StartInfo("torchrun", rank, local, world, local_world, environ["MASTER_ADDR"], port)


def _srun(run: Run, environ: Mapping[str, str], gpus: int) -> StartInfo:
    tasks = slurm.integer(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") or 1
    nodes = slurm.integer(environ, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES") or 1
    address, port = slurm.master_address(environ), slurm.master_port(environ)
    rank = slurm.integer(environ, "SLURM_PROCID") or 0
    if tasks == nodes:
        local = _ranks_per_node(run, gpus, nodes)
        if local > 1:
            return StartInfo("srun-node", rank * local, 0, nodes * local, local, address, port)
    node = slurm.integer(environ, "SLURM_NODEID") or 0
    local_world = slurm.tasks_on_node(environ, node) or max(tasks // nodes, 1)
    _refuse_nproc(run, local_world, "srun")
    return StartInfo("srun", rank, slurm.integer(environ, "SLURM_LOCALID") or 0, tasks, local_world, address, port)


def _ranks_per_node(run: Run, gpus: int, nodes: int) -> int:
    """Ranks of a node under one task a node: --nproc, its GPUs, or on CPUs an even share of the degrees asked for."""
    if run.training.nproc or gpus:
        return run.training.nproc or gpus
    product = self_world_size(run, gpus=0)
    return product // nodes if product % nodes == 0 else 1


def _refuse_nproc(run: Run, local_world: int, launcher: str) -> None:
    nproc = run.training.nproc
    if nproc is not None and nproc != local_world:
        rule = f"{launcher} has started {local_world} ranks on this machine and decides their number"
        raise ConfigError([Problem(f"--nproc {nproc}", rule, f"leave --nproc out, or start the command without {launcher}")])
