"""Host memory is looked at before a start, and shown: with a made-up machine, from the predictions that --dry-run prints."""

from __future__ import annotations

import json

import pytest

from megactl.cli import main
from megactl.commands import host_need as module
from megactl.commands.host_need import HostNeed, host_need, refuse_host_need
from megactl.config.load import load
from megactl.config.start import StartInfo
from megactl.config.validate import resolve
from megactl.errors import ConfigError
from megactl.machine.system import System

GIB = 2**30
BASE = ["train", "--preset", "gpt-345m", "--mock-data", "--precision", "bf16", "--device", "cpu", "--offload", "optimizer"]


def machine(tmp_path, *, total: int, available: int, limit: int | None = None) -> System:
    """A machine with this memory in GiB."""
    (tmp_path / "proc").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {total * 2**20} kB\nMemAvailable: {available * 2**20} kB\n")
    if limit is not None:
        (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{limit * GIB}\n")
    return System(root=tmp_path, environ={})


def resolved(*assignments: str, world: int = 1, gpus: int = 8):
    loaded = load(preset="gpt-345m", assignments=["data.mock_data=true", "training.precision=bf16", *assignments])
    return resolve(loaded.run, world_size=world, gpus=gpus, origins=loaded.origins, run_dir="x")


def start(kind: str = "self", rank: int = 0, local_rank: int = 0, world: int = 1, local: int = 1) -> StartInfo:
    return StartInfo(kind, rank, local_rank, world, local, "127.0.0.1", 0)


def test_a_run_without_offload_asks_nothing(tmp_path):
    stages = [{"host": 0, "total": 10}]
    assert host_need(resolved(), start(), stages, System(root=tmp_path)) is None


def test_each_machine_counts_its_own_ranks(tmp_path):
    run = resolved("memory.offload=optimizer", "parallel.pipeline_parallel=2", world=8)
    stages, system = [{"host": 100, "total": 7}, {"host": 1000, "total": 7}], machine(tmp_path, total=64, available=60)
    # Pipeline ranks are the outermost: the second node of two holds the last stage.
    assert host_need(run, start(world=8, local=8), stages, system).needed == 4 * 100 + 4 * 1000
    for kind, rank, local_rank in (("srun-node", 4, 0), ("torchrun", 6, 2), ("srun", 7, 3)):
        assert host_need(run, start(kind, rank, local_rank, 8, 4), stages, system).needed == 4 * 1000
    assert host_need(run, start("torchrun", 1, 1, 8, 4), stages, system).needed == 4 * 100


def test_on_cpus_what_would_be_the_devices_is_the_hosts(tmp_path):
    run = resolved("memory.offload=optimizer", "training.device=cpu", world=2, gpus=0)
    found = host_need(run, start(world=2, local=2), [{"host": 100, "total": 7}], machine(tmp_path, total=64, available=60))
    assert found.needed == 2 * 107


@pytest.mark.parametrize(("limit", "usable", "why"), [
    (None, 60, "what is available"), (40, 40, "the limit of its control group"), (62, 60, "what is available"),
    (1000, 60, "what is available"),
])  # fmt: skip
def test_the_least_of_what_is_available_and_allowed(tmp_path, limit, usable, why):
    found = host_need(
        resolved("memory.offload=optimizer"), start(), [{"host": 1, "total": 7}], machine(tmp_path, total=64, available=60, limit=limit)
    )
    assert (found.usable, found.limited_by) == (usable * GIB, why)


def test_a_machine_that_says_nothing_refuses_nothing(tmp_path):
    found = host_need(resolved("memory.offload=optimizer"), start(), [{"host": 2**60, "total": 7}], System(root=tmp_path, environ={}))
    assert found.fits and found.usable is None
    refuse_host_need(found, resolved("memory.offload=optimizer"))


def test_the_limit_is_95_percent():
    run = resolved("memory.offload=optimizer")
    refuse_host_need(HostNeed(1, 95 * GIB, 100 * GIB, "what is available"), run)
    with pytest.raises(ConfigError) as error:
        refuse_host_need(HostNeed(1, 95 * GIB + 1, 100 * GIB, "what is available"), run)
    assert str(error.value) == (
        "--offload optimizer: 1 rank on this machine would take 95.00 GiB of host memory, and it can give 95.00 GiB "
        "(95 % of what is available, 100.00 GiB); spread the run over more machines, or offload less"
    )
    whole = resolved("memory.offload=optimizer", "parallel.zero=0", world=2)
    with pytest.raises(ConfigError, match=r"2 ranks on this machine .* use --zero 1: each replica then keeps a share"):
        refuse_host_need(HostNeed(2, 99 * GIB, 100 * GIB, "the limit of its control group"), whole)


@pytest.fixture
def small_machine(monkeypatch, tmp_path):
    """The commands see a machine of 3 GiB."""
    system = machine(tmp_path / "root", total=64, available=60, limit=3)
    original = module.host_need
    for owner in ("megactl.commands.train", "megactl.commands.bench_train"):
        monkeypatch.setattr(f"{owner}.host_need", lambda resolved, start, stages: original(resolved, start, stages, system))
    monkeypatch.chdir(tmp_path)


def test_a_start_that_does_not_fit_is_refused_before_anything_is_written(small_machine, capsys, tmp_path):
    assert main([*BASE, "--run-dir", "r"]) == 2
    assert "1 rank on this machine would take" in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_a_dry_run_shows_it_and_is_not_refused(small_machine, capsys):
    assert main([*BASE, "--dry-run"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("host memory:")]
    assert "for the rank on this machine, which can give 3.00 GiB (the limit of its control group); too much: a start here" in line
    assert main([*BASE, "--dry-run", "--json"]) == 0
    host = json.loads(capsys.readouterr().out)["memory"]["host"]
    assert host["ranks"] == 1 and not host["fits"] and host["usable_bytes"] == 3 * GIB < host["bytes"]


def test_a_row_of_a_bench_that_does_not_fit_is_named(small_machine, capsys):
    words = ["bench", "train", *BASE[1:-2], "--row", "--mbs 1", "--row", "--offload optimizer"]
    assert main(words) == 2
    assert "--row '--offload optimizer': --offload optimizer: 1 rank" in capsys.readouterr().err
