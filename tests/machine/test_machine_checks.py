"""What `megactl doctor` makes of made-up machines: GPUs and drivers, torch builds, limits, memory, network, variables."""

from __future__ import annotations

import os
import resource

import pytest

from megactl.machine import host, software
from megactl.machine.check import Check, worst
from megactl.machine.examine import _guarded
from megactl.machine.folder import folder_checks
from megactl.machine.gpus import Gpu, Gpus, find_gpus, gpu_checks
from megactl.machine.host import Clock, clock_check, core_checks, kernel_clock, limit_checks, memory_checks, shm_check
from megactl.machine.network import Port, network_checks, rdma_ports, variable_checks
from megactl.machine.software import module_checks, version_checks
from megactl.machine.system import System
from megactl.machine.torch_facts import TorchFacts

GIB = 2**30
FITS = {"_ops": {"reason": None, "record": None}, "_native": {"reason": None, "record": None}}
CUDA = {
    "torch": "2.11.0+cu130", "cuda": "13.0", "hip": None, "available": True, "error": None, "driver_cuda": "13.0", "gloo": True,
    "devices": [{"name": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "memory": 80 * GIB}] * 2, "archs": ["sm_80", "sm_90", "sm_100"],
    "nccl": "2.27.5", "cudnn": "9.13.0", "triton": "3.5.0", "modules": FITS,
}  # fmt: skip
BLIND = {"available": False, "devices": [], "archs": [], "nccl": None, "error": "the driver is too old"}
TWO = Gpus("580.65.06", "13.0", tuple(Gpu(index, "NVIDIA H100 80GB HBM3", 81559, 4, 0) for index in range(2)))


def torch(**changes):
    return TorchFacts(True, None, CUDA | changes)


def by_name(checks):
    found = list(checks)
    names = {check.name: check for check in found}
    assert len(names) == len(found), "each name stands once"
    return names


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return System(root, {"PATH": str(root / "bin")})


def program(folder, name, body):
    (folder / "bin").mkdir(exist_ok=True)
    path = folder / "bin" / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


SMI = """case "$*" in
*driver_version*) echo 580.65.06;;
*query*) echo "0, NVIDIA H100 80GB HBM3, 81559, 4, 0"; echo "1, NVIDIA H100 80GB HBM3, 81559, 40960, [N/A]";;
*) echo "| NVIDIA-SMI 580.65.06   Driver Version: 580.65.06   CUDA Version: 13.0  |";;
esac"""


# ---- GPUs --------------------------------------------------------------------------------------------------------------------


def test_nvidia_smi_is_read(tmp_path):
    program(tmp_path, "nvidia-smi", SMI)
    found = find_gpus(write(tmp_path, {}))
    assert (found.driver, found.cuda, found.error) == ("580.65.06", "13.0", None)
    assert found.devices == (
        Gpu(0, "NVIDIA H100 80GB HBM3", 81559, 4, 0), Gpu(1, "NVIDIA H100 80GB HBM3", 81559, 40960, None),
    )  # fmt: skip


def test_without_nvidia_smi_the_kernel_lists_the_gpus(tmp_path):
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n"
    found = find_gpus(
        write(
            tmp_path, {"proc/driver/nvidia/version": text, "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA A100\n"}
        )
    )
    assert found.driver == "535.104.05" and [gpu.name for gpu in found.devices] == ["NVIDIA A100"] and found.error is None
    assert find_gpus(System(tmp_path / "none", {"PATH": ""})) == Gpus()


@pytest.mark.parametrize(
    ("said", "cure"),
    [
        ("Failed to initialize NVML: Driver/library version mismatch", "reboot"),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", "modprobe nvidia"),
        ("No devices were found", "--gpus-per-node"),
    ],
)
def test_a_broken_driver_is_a_problem(tmp_path, said, cure):
    program(tmp_path, "nvidia-smi", f'echo "{said}"; exit 9')
    found = by_name(gpu_checks(find_gpus(write(tmp_path, {})), torch(**BLIND), None))
    assert found["driver"].status == "problem" and found["driver"].value == said and cure in found["driver"].cure


def test_a_hanging_nvidia_smi_is_said(tmp_path):
    program(tmp_path, "nvidia-smi", "exec /bin/sleep 60")
    answer = write(tmp_path, {}).run("nvidia-smi", seconds=0.3)
    assert answer.code is None and answer.err == "nvidia-smi gave no answer within 0.3 s"


def test_a_good_machine_has_nothing_to_mend():
    found = by_name(gpu_checks(TWO, torch(), None))
    assert worst(found.values()) == "ok"
    assert found["devices"].value == "2 x NVIDIA H100 80GB HBM3, 80 GiB each" and found["torch sees"].value == "2 GPUs"


@pytest.mark.parametrize(
    ("facts", "gpus", "value", "cure"),
    [
        (torch(torch="2.11.0+cpu", cuda=None, **BLIND), TWO, "torch 2.11.0+cpu is a CPU build", "for CUDA 13.0 or older"),
        (
            torch(**BLIND | {"driver_cuda": "12.2"}),
            Gpus("535.104.05", "12.2", TWO.devices),
            "built for CUDA 13.0, driver 535.104.05 supports CUDA 12.2",
            "install a torch for CUDA 12",
        ),
        (torch(**BLIND), TWO, "the driver is too old", "dmesg"),
    ],
)
def test_gpus_that_torch_cannot_use_are_a_problem(facts, gpus, value, cure):
    check = by_name(gpu_checks(gpus, facts, None))["torch sees"]
    assert check.status == "problem" and value in check.value and cure in check.cure


def test_an_older_minor_version_of_the_driver_works():
    assert (
        by_name(gpu_checks(Gpus("525.60.13", "12.0", TWO.devices), torch(cuda="12.8", driver_cuda="12.0"), None))["torch sees"].status
        == "ok"
    )


@pytest.mark.parametrize(
    ("visible", "status", "value"),
    [("0,1", "ok", "0,1"), ("", "warning", "hides every GPU"), ("-1", "warning", "hides every GPU"),
     ("0,2", "problem", "there is no GPU 2"), ("GPU-8d5c", "ok", "GPU-8d5c")],
)  # fmt: skip
def test_visible_devices(visible, status, value):
    check = by_name(gpu_checks(TWO, torch(), visible))["CUDA_VISIBLE_DEVICES"]
    assert check.status == status and value in check.value


def test_hidden_gpus_are_not_called_broken():
    assert by_name(gpu_checks(TWO, torch(**BLIND), ""))["torch sees"].status == "ok"


def test_busy_unlike_and_broken_gpus_are_warned_of():
    gpus = Gpus("580.1.1", None, (Gpu(0, "A100", 40960, 30000, 3), Gpu(1, "H100", 81559, 4, 0)))
    found = by_name(gpu_checks(gpus, torch(devices=CUDA["devices"][:1]), None))
    assert found["memory in use"].value == "GPU 0: 29.3 GiB in use" and found["uncorrected memory errors"].value == "GPU 0: 3"
    assert found["devices"].value == "1 x A100, 1 x H100" and found["torch sees"].value == "1 of 2 GPUs"
    assert {check.status for name, check in found.items() if name != "driver"} == {"warning"}


@pytest.mark.parametrize(
    ("archs", "capability", "works"),
    [
        (["sm_80", "sm_90"], [7, 0], False), (["sm_80"], [8, 6], True), (["sm_86"], [8, 0], False), (["sm_80", "compute_80"], [9, 0], True),
        (["sm_80"], [9, 0], False), (["sm_90a"], [9, 0], True), (["sm_100a"], [10, 3], False), (["sm_100f"], [10, 3], True),
    ],
)  # fmt: skip
def test_a_gpu_without_code_in_torch_is_a_problem(archs, capability, works):
    facts = torch(archs=archs, devices=[{"name": "G", "capability": capability, "memory": 1}])
    found = by_name(gpu_checks(Gpus("580.1.1", None, TWO.devices[:1]), facts, None))
    assert ("architecture" not in found) == works
    if not works:
        assert found["architecture"].status == "problem" and f"sm_{capability[0]}{capability[1]}" in found["architecture"].value


# ---- versions and modules ----------------------------------------------------------------------------------------------------


def test_versions(tmp_path):
    found = by_name(version_checks(System(tmp_path, {}), torch(), TWO))
    assert found["torch"].value == "2.11.0+cu130" and found["NCCL"].value == "2.27.5" and worst(found.values()) == "ok"
    assert {"megactl", "Python", "CUDA of torch", "cuDNN", "Triton"} <= found.keys()


@pytest.mark.parametrize(
    ("facts", "status", "value"),
    [
        (TorchFacts(False), "warning", "not installed"),
        (TorchFacts(True, "ImportError: libcudart.so.13: no such file"), "problem", "does not work: ImportError: libcudart"),
        (torch(torch="2.10.1"), "problem", "2.10.1"),
    ],
)
def test_torch_that_is_missing_broken_or_old(tmp_path, facts, status, value):
    check = by_name(version_checks(System(tmp_path, {}), facts, Gpus()))["torch"]
    assert check.status == status and value in check.value


def test_several_gpus_need_nccl(tmp_path):
    assert by_name(version_checks(System(tmp_path, {}), torch(nccl=None), TWO))["NCCL"].status == "problem"


def test_modules_that_do_not_fit_say_why(monkeypatch):
    stale = "megactl._ops was built from sources 1, megactl/csrc is now 2"
    found = by_name(module_checks(torch(modules=FITS | {"_ops": {"reason": stale, "record": None}})))
    assert found["megactl._ops"].status == "problem" and found["megactl._ops"].value == stale and "build_ext" in found["megactl._ops"].cure
    monkeypatch.setattr(software._build, "find_module", lambda module, folder=None: None)
    found = by_name(module_checks(torch()))
    # The engine runs without either, so nothing breaks.
    assert {check.status for check in found.values()} == {"warning"} and "not built for this Python" in found["megactl._native"].value
    assert by_name(module_checks(TorchFacts(False)))["megactl._ops"].status == "ok"


def test_modules_are_judged_by_their_record_where_torch_is_missing(monkeypatch):
    if software._build.built("_native") is None:
        pytest.skip("needs the compiled module")
    assert {check.status for check in module_checks(TorchFacts(False))} == {"ok"}
    monkeypatch.setattr(software._build, "stale_source", lambda module, info: "f" * 16)
    found = by_name(module_checks(TorchFacts(False)))
    assert found["megactl._ops"].status == "problem" and f"is now {'f' * 16}" in found["megactl._ops"].value
    assert found["megactl._native"].status == "warning"


# ---- host --------------------------------------------------------------------------------------------------------------------

MEMINFO = "MemTotal:       65536000 kB\nMemFree: 100 kB\nMemAvailable:   32768000 kB\nHugePages_Total: 0\n"


def test_memory_and_the_limit_on_it(tmp_path):
    (check,) = memory_checks(write(tmp_path, {"proc/meminfo": MEMINFO}))
    assert check.value == "62.5 GiB, 31.2 GiB available" and check.status == "ok"
    (check,) = memory_checks(write(tmp_path, {"sys/fs/cgroup/memory.max": f"{GIB}\n", "proc/self/cgroup": "0::/\n"}))
    assert check.status == "warning" and "1.0 GiB (limit of the control group; the machine has 62.5 GiB)" in check.value
    (check,) = memory_checks(System(tmp_path / "none", {}))
    assert check.status == "warning" and "cannot be read" in check.value


class Space:
    """A file system's size and free space, as statvfs gives them."""

    def __init__(self, size, free, inodes=(1000, 900)):
        self.f_frsize, self.f_blocks, self.f_bavail = 1, size, free
        self.f_files, self.f_favail = inodes


@pytest.mark.parametrize(
    ("size", "free", "gpus", "status"),
    [(64 * 2**20, 64 * 2**20, 8, "problem"), (64 * 2**20, 64 * 2**20, 0, "warning"), (512 * 2**20, 2**29, 8, "warning"),
     (512 * 2**20, 2**29, 1, "ok"), (8 * GIB, 8 * GIB, 8, "ok"), (8 * GIB, 2**20, 8, "problem")],
)  # fmt: skip
def test_shared_memory(tmp_path, monkeypatch, size, free, gpus, status):
    monkeypatch.setattr(host.os, "statvfs", lambda path: Space(size, free))
    check = shm_check(System(tmp_path, {}), gpus=gpus)
    assert check.status == status
    if size < GIB and status != "ok":
        assert "docker --shm-size" in check.cure


def test_no_shared_memory(tmp_path):
    assert shm_check(System(tmp_path, {}), gpus=0).status == "problem"


def test_cores_quota_and_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(host.os, "cpu_count", lambda: 64)
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}
    found = by_name(core_checks(write(tmp_path, files), cores=16, gpus=8))
    assert found["cores"].value == "16 of 64" and found["cores"].status == "ok"
    assert found["time on them"].status == "warning" and "OMP_NUM_THREADS=4" in found["time on them"].cure
    found = by_name(core_checks(System(tmp_path / "none", {"OMP_NUM_THREADS": "32"}), cores=1, gpus=8))
    assert "--cpus-per-task" in found["cores"].cure and found["OMP_NUM_THREADS"].status == "warning"
    assert by_name(core_checks(System(tmp_path / "none", {"OMP_NUM_THREADS": "many"}), cores=4, gpus=8))["cores"].status == "warning"


@pytest.mark.parametrize(
    ("files", "locked", "infiniband", "statuses"),
    [(65536, resource.RLIM_INFINITY, True, ("ok", "ok")), (1024, 2**16, False, ("warning", "ok")),
     (128, 2**16, True, ("problem", "problem")), (resource.RLIM_INFINITY, 8 * GIB, True, ("ok", "warning"))],
)  # fmt: skip
def test_limits_of_a_process(files, locked, infiniband, statuses):
    found = by_name(limit_checks(files, locked, infiniband=infiniband))
    assert (found["open files"].status, found["locked memory"].status) == statuses


def test_clock():
    assert clock_check(Clock(True, 0.0123)).value == "synchronised, within 12 ms"
    assert clock_check(Clock(False, 16.0)).status == "warning" and "chronyd" in clock_check(Clock(False, 16.0)).cure
    assert clock_check(None).status == "ok"
    found = kernel_clock()
    assert found is None or 0 <= found.error < 1e6


# ---- run directory -----------------------------------------------------------------------------------------------------------


def test_a_folder_that_can_be_made_or_written(tmp_path):
    found = by_name(folder_checks(tmp_path / "runs" / "new", named=True))
    assert found["folder"].value == f"{tmp_path}/runs/new (to be made)" and found["folder"].status == "ok"
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_folder_that_is_a_file_or_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "is a file" in by_name(folder_checks(tmp_path / "file" / "run", named=True))["folder"].value

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megactl.machine.folder.tempfile.NamedTemporaryFile", full)
    check = by_name(folder_checks(tmp_path, named=True))["folder"]
    assert check.status == "problem" and "No space left on device" in check.value
    assert by_name(folder_checks(tmp_path, named=False))["folder"].status == "warning"


@pytest.mark.parametrize(
    ("space", "status"),
    [(Space(100 * GIB, 50 * GIB), "ok"), (Space(100 * GIB, 5 * GIB), "warning"), (Space(100 * GIB, 2**20), "problem"),
     (Space(100 * GIB, 50 * GIB, (1000, 0)), "problem")],
)  # fmt: skip
def test_room(tmp_path, monkeypatch, space, status):
    monkeypatch.setattr("megactl.machine.folder.os.statvfs", lambda path: space)
    assert by_name(folder_checks(tmp_path, named=True))["room"].status == status


# ---- network and variables ---------------------------------------------------------------------------------------------------

IB = "sys/class/infiniband/mlx5_0/ports/1"


def resolve(name):
    return "10.0.0.7"


def unknown(name):
    raise OSError(-2, "Name or service not known")


def test_rdma_ports(tmp_path):
    system = write(tmp_path, {f"{IB}/state": "4: ACTIVE\n", f"{IB}/rate": "400 Gb/sec (4X NDR)\n", f"{IB}/link_layer": "InfiniBand\n"})
    ports = rdma_ports(system)
    assert ports == (Port("mlx5_0/1", "ACTIVE", "400 Gb/sec (4X NDR)", "InfiniBand"),)
    assert (
        by_name(network_checks(system, ports, nodes=2, resolve=resolve))["RDMA"].value == "1 active ports, 400 Gb/sec (4X NDR) InfiniBand"
    )
    down = (Port("mlx5_0/1", "DOWN", "10 Gb/sec", "InfiniBand"),)
    assert by_name(network_checks(system, down, nodes=2, resolve=resolve))["RDMA"].status == "warning"


def test_names_without_an_address(tmp_path):
    found = by_name(network_checks(System(tmp_path, {"MASTER_ADDR": "node-1"}), (), nodes=2, resolve=unknown))
    assert found["host name"].status == found["MASTER_ADDR"].status == "problem"
    loopback = by_name(network_checks(System(tmp_path, {}), (), nodes=2, resolve=lambda name: "127.0.1.1"))["host name"]
    assert loopback.status == "warning" and "GLOO_SOCKET_IFNAME" in loopback.cure


@pytest.mark.parametrize(
    ("name", "value", "good"),
    [("NCCL_SOCKET_IFNAME", "eth", True), ("NCCL_SOCKET_IFNAME", "=eth", False), ("NCCL_SOCKET_IFNAME", "=eth0", True),
     ("NCCL_SOCKET_IFNAME", "^docker,lo", True), ("NCCL_SOCKET_IFNAME", "bond0,ib", True), ("NCCL_SOCKET_IFNAME", "ens", False),
     ("GLOO_SOCKET_IFNAME", "eth0", True), ("GLOO_SOCKET_IFNAME", "eth", False)],
)  # fmt: skip
def test_interfaces_that_variables_name(tmp_path, name, value, good):
    for interface in ("eth0", "ib0", "lo"):
        (tmp_path / "sys" / "class" / "net" / interface).mkdir(parents=True)
    found = by_name(network_checks(System(tmp_path, {name: value}), (), nodes=1, resolve=resolve))
    assert (name not in found) == good
    if not good:
        assert found[name].status == "problem" and "eth0, ib0, lo" in found[name].cure


def test_variables():
    environ = {
        "NCCL_DEBUG": "INFO", "NCCL_IB_DISABLE": "1", "CUDA_LAUNCH_BLOCKING": "1", "NCCL_BLOCKING_WAIT": "1", "HOME": "/root",
        "SLURM_JOB_ID": "7", "NCCL_P2P_DISABLE": "1", "TORCH_API_TOKEN": "secret",
        "MEGACTL_TRAINNG_SEED": "1", "MEGACTL_TRAINING_SEED": "3",
    }  # fmt: skip
    found = by_name(variable_checks({**environ, "MEGACTL_TRAINNG_SEED": ""}, rdma=True, gpus=8))
    assert {name for name, check in found.items() if check.status == "warning"} == {
        "NCCL_IB_DISABLE", "CUDA_LAUNCH_BLOCKING", "NCCL_BLOCKING_WAIT", "NCCL_P2P_DISABLE",
    }  # fmt: skip
    assert found["TORCH_API_TOKEN"].value == "<redacted>" and "HOME" not in found and "SLURM_JOB_ID" not in found
    calm = by_name(variable_checks({"NCCL_IB_DISABLE": "1", "NCCL_P2P_DISABLE": "1"}, rdma=False, gpus=1))
    assert worst(calm.values()) == "ok"
    problems = [check for check in variable_checks(environ, rdma=True, gpus=8) if check.status == "problem"]
    assert len(problems) == 1 and problems[0].name.startswith("MEGACTL_TRAINNG_SEED") and "MEGACTL_TRAINING_SEED" in problems[0].cure


def test_a_check_that_cannot_look_does_not_hide_the_others():
    def look():
        yield Check("g", "first", "x")
        raise ValueError("odd text")

    found = by_name(_guarded("g", look))
    assert found["first"].status == "ok" and "ValueError: odd text" in found["checks"].value


def test_a_cure_belongs_to_what_is_wrong():
    with pytest.raises(AssertionError):
        Check("g", "n", "v", "problem")
    with pytest.raises(AssertionError):
        Check("g", "n", "v", "ok", "do something")
    assert os.path.exists("/proc/self"), "these checks are for Linux"
