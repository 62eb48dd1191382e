"""Limits of control groups, version 1, version 2, both, and inside a container; from made-up /proc and /sys."""

from __future__ import annotations

import pytest

from megactl.machine.cgroup import cpu_quota, memory_event_files, memory_limit
from megactl.machine.system import System

GIB = 2**30


def system(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return System(root, {})


V2 = "0::/user.slice/job.scope\n"
V1 = "4:memory:/slurm/uid_0/job_7/step_0\n3:cpu,cpuacct:/slurm/uid_0/job_7\n"
GROUP = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"proc/self/cgroup": V2, f"{GROUP}/user.slice/job.scope/memory.max": "max\n"}, None),
        ({"proc/self/cgroup": V2, f"{GROUP}/user.slice/job.scope/memory.max": f"{8 * GIB}\n"}, 8 * GIB),
        # The limit of a group above holds too, and the least of them counts.
        (
            {
                "proc/self/cgroup": V2,
                f"{GROUP}/user.slice/job.scope/memory.max": f"{8 * GIB}\n",
                f"{GROUP}/user.slice/memory.max": f"{4 * GIB}\n",
            },
            4 * GIB,
        ),
        # In a container the path is the host's, and the own group is the root of the mount.
        ({"proc/self/cgroup": "0::/docker/abc\n", f"{GROUP}/memory.max": f"{2 * GIB}\n"}, 2 * GIB),
        ({"proc/self/cgroup": V1, f"{GROUP}/memory/slurm/uid_0/job_7/memory.limit_in_bytes": f"{6 * GIB}\n"}, 6 * GIB),
        ({"proc/self/cgroup": V1, f"{GROUP}/memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        # Version 2 beside version 1.
        ({"proc/self/cgroup": V1 + "0::/x\n", f"{GROUP}/unified/x/memory.max": f"{GIB}\n"}, GIB),
        ({"proc/self/cgroup": "nonsense\n\n1:\n", f"{GROUP}/memory.max": "lots\n"}, None),
    ],
)
def test_memory_limit(tmp_path, files, limit):
    assert memory_limit(system(tmp_path, files)) == limit


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": V2, f"{GROUP}/user.slice/job.scope/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": V2, f"{GROUP}/user.slice/job.scope/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                "proc/self/cgroup": V1,
                f"{GROUP}/cpu,cpuacct/slurm/uid_0/job_7/cpu.cfs_quota_us": "400000\n",
                f"{GROUP}/cpu,cpuacct/slurm/uid_0/job_7/cpu.cfs_period_us": "100000\n",
            },
            4.0,
        ),
        ({"proc/self/cgroup": V1, f"{GROUP}/cpu/cpu.cfs_quota_us": "-1\n", f"{GROUP}/cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"proc/self/cgroup": V2, f"{GROUP}/cpu.max": "1 0\n"}, None),
    ],
)
def test_cpu_quota(tmp_path, files, quota):
    assert cpu_quota(system(tmp_path, files)) == quota


def test_files_of_memory_kills_are_the_nearest_first(tmp_path):
    found = [str(path.relative_to(tmp_path)) for path in memory_event_files(system(tmp_path, {"proc/self/cgroup": V2}))]
    assert found[0] == f"{GROUP}/user.slice/job.scope/memory.events" and found[-1] == "proc/vmstat"
    assert f"{GROUP}/memory.events" in found
