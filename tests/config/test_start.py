"""How a process finds its place: by itself, under torchrun, under srun; and what Slurm's variables mean."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megactl.config import devices, slurm
from megactl.config.load import load
from megactl.config.prepare import run_directory
from megactl.config.start import start_info
from megactl.errors import ConfigError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "1234"}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "n[07-08]",
}


def run(*assignments: str):
    return load(assignments=assignments).run


def test_alone_on_gpus_and_on_cpus():
    assert start_info(run(), {}, gpus=8).world_size == 8
    assert start_info(run("training.nproc=4"), {}, gpus=8).world_size == 4
    info = start_info(run("parallel.tensor_parallel=2", "parallel.pipeline_parallel=3", "parallel.data_parallel=2"), {}, gpus=0)
    assert (info.kind, info.rank, info.world_size, info.local_world_size, info.master_port) == ("self", 0, 12, 12, 0)
    assert info.spawns and info.is_first


def test_torchrun():
    info = start_info(run(), TORCHRUN, gpus=4)
    assert (info.kind, info.rank, info.local_rank, info.world_size, info.local_world_size) == ("torchrun", 5, 1, 8, 4)
    assert (info.master_addr, info.master_port) == ("n1", 1234)
    assert not info.spawns and not info.is_first


def test_torchrun_wins_over_srun():
    assert start_info(run(), {**SRUN, **TORCHRUN}, gpus=4).kind == "torchrun"


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_set_torchrun(missing):
    with pytest.raises(ConfigError, match=missing):
        start_info(run(), {key: value for key, value in TORCHRUN.items() if key != missing}, gpus=4)


@pytest.mark.parametrize("change", [{"RANK": "x"}, {"RANK": "8"}, {"WORLD_SIZE": "-1"}])
def test_impossible_torchrun(change):
    with pytest.raises(ConfigError):
        start_info(run(), {**TORCHRUN, **change}, gpus=4)


def test_nproc_belongs_to_the_launcher():
    with pytest.raises(ConfigError, match="torchrun has started 4 ranks"):
        start_info(run("training.nproc=2"), TORCHRUN, gpus=4)
    assert start_info(run("training.nproc=4"), TORCHRUN, gpus=4).kind == "torchrun"
    with pytest.raises(ConfigError, match="srun has started 4 ranks"):
        start_info(run("training.nproc=2"), SRUN, gpus=4)


def test_srun_with_a_task_a_gpu():
    info = start_info(run(), SRUN, gpus=4)
    assert (info.kind, info.rank, info.local_rank, info.world_size, info.local_world_size) == ("srun", 5, 1, 8, 4)
    assert info.master_addr == "n07" and info.master_port == 10_077
    other = start_info(run(), {**SRUN, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}, gpus=4)
    assert (other.master_addr, other.master_port) == (info.master_addr, info.master_port) and other.is_first


NODE = {**SRUN, "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "1(x2)"}


def test_srun_with_a_task_a_node():
    info = start_info(run(), NODE, gpus=4)
    assert (info.kind, info.rank, info.local_rank, info.world_size, info.local_world_size) == ("srun-node", 4, 0, 8, 4)
    assert info.spawns and not info.is_first
    assert start_info(run("training.nproc=3"), NODE, gpus=4).world_size == 6
    assert start_info(run("parallel.tensor_parallel=2", "parallel.data_parallel=3"), NODE, gpus=0).local_world_size == 3
    assert start_info(run(), NODE, gpus=0).kind == "srun"
    assert start_info(run(), NODE, gpus=1).kind == "srun"


def test_the_batch_script_is_not_a_task():
    batch = {**SRUN, "SLURM_STEP_ID": "4294967291", "SLURM_PROCID": "0", "SLURM_NNODES": "1"}
    assert start_info(run(), batch, gpus=2).kind == "self"
    no_step = {key: value for key, value in batch.items() if key != "SLURM_STEP_ID"}
    assert start_info(run(), no_step, gpus=2).kind == "self"
    with pytest.raises(ConfigError, match="srun megactl train"):
        start_info(run(), {**batch, "SLURM_NNODES": "2"}, gpus=2)
    assert start_info(run("training.nproc=2"), {**batch, "SLURM_NNODES": "2"}, gpus=2).kind == "self"


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[01-04,7],login", ["n01", "n02", "n03", "n04", "n7", "login"]),
        ("r[1-2]n[8-9]", ["r1n8", "r1n9", "r2n8", "r2n9"]),
        ("a-b[098-101].x", ["a-b098.x", "a-b099.x", "a-b100.x", "a-b101.x"]),
        ("a,b", ["a", "b"]),
    ],
)
def test_host_lists(text, hosts):
    assert list(slurm.expand_hosts(text)) == hosts


@settings(deadline=None)
@given(st.text(alphabet="n01-[],x", max_size=12))
def test_any_host_list_ends_in_hosts_or_an_error(text):
    try:
        found = [host for host, _ in zip(slurm.expand_hosts(text), range(50), strict=False)]
    except ConfigError:
        return
    assert all(isinstance(host, str) for host in found)


@pytest.mark.parametrize(("text", "node", "tasks"), [("8(x2),4", 0, 8), ("8(x2),4", 1, 8), ("8(x2),4", 2, 4), ("3", 0, 3), ("3", 1, None)])
def test_tasks_per_node(text, node, tasks):
    assert slurm.tasks_on_node({"SLURM_TASKS_PER_NODE": text}, node) == tasks


def test_ports_of_neighbouring_steps_differ():
    ports = {slurm.master_port({"SLURM_JOB_ID": "5", "SLURM_STEP_ID": str(step)}) for step in range(1000)}
    assert len(ports) == 1000 and all(10_000 <= port < 30_000 for port in ports)
    assert slurm.master_port({"MASTER_PORT": "99"}) == 99


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (None, None),
        ("", 0),
        ("-1", 0),
        ("0", 1),
        ("0,1,2", 3),
        ("0,-1,2", 1),
        ("GPU-8932f937-d72c,1", 2),
        ("MIG-GPU-1/2/3", 1),
        ("NoDevFiles", 0),
        ("1, 2", 2),
    ],
)
def test_visible_devices(text, count):
    assert devices.visible_list(text) == count


def test_gpus_come_from_nvidia_smi_and_the_visible_list(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-a)'\n"
        "echo '  MIG 1g.10gb Device 0: (UUID: MIG-b)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-c)'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert devices.count_gpus({}) == 2
    assert devices.count_gpus({"CUDA_VISIBLE_DEVICES": "1"}) == 1
    assert devices.count_gpus({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}) == 2
    assert devices.count_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0


def test_run_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = load(preset="gpt-tiny").run
    alone = start_info(tiny, {}, gpus=0)
    assert run_directory(load(assignments=["logging.run_dir=x"]).run, alone, {}) == "x"
    first = run_directory(tiny, alone, {})
    assert first.startswith("runs/gpt-tiny-20")
    assert run_directory(tiny, start_info(tiny, SRUN, gpus=4), SRUN) == "runs/gpt-tiny-job77"
    assert run_directory(tiny, start_info(tiny, SRUN, gpus=4), {**SRUN, "SLURM_STEP_ID": "3"}) == "runs/gpt-tiny-job77.3"
    torchrun = start_info(tiny, TORCHRUN, gpus=4)
    assert run_directory(tiny, torchrun, {"TORCHELASTIC_RUN_ID": "abc"}) == "runs/gpt-tiny-abc"
    with pytest.raises(ConfigError, match="--run-dir"):
        run_directory(tiny, torchrun, {"TORCHELASTIC_RUN_ID": "none"})
