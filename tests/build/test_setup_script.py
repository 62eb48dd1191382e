"""scripts/setup.sh: what it says where something is missing, and that a finished set-up costs nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest


def script(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MEGACTL_")}
    return subprocess.run(
        ["bash", "scripts/setup.sh", *arguments], cwd=folder, env={**clean, **environment}, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def checkout(repository: Path, tmp_path: Path) -> Path:
    """A copy of what the set-up reads, without a .venv."""
    folder = tmp_path / "checkout"
    shutil.copytree(repository / "megactl" / "csrc", folder / "megactl" / "csrc")
    for name in ("pyproject.toml", "setup.py", "constraints.txt", "scripts/setup.sh", "megactl/_build.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repository / name, folder / name)
    return folder


def stub(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def tools(folder: Path, *left_out: str) -> str:
    """A PATH with the tools the script needs, but for `left_out`."""
    folder.mkdir()
    for name in (
        "bash",
        "sh",
        "dirname",
        "basename",
        "flock",
        "mkdir",
        "rm",
        "mv",
        "cat",
        "cut",
        "find",
        "sort",
        "xargs",
        "sha256sum",
        "tail",
        "timeout",
        "readlink",
        "grep",
        "g++",
    ):
        found = shutil.which(name)
        if found and name not in left_out:
            (folder / name).symlink_to(found)
    return str(folder)


@pytest.mark.parametrize("name", ["scripts/setup.sh", "test.sh", ".ci/run"])
def test_scripts_parse_and_can_be_run(repository, name):
    assert os.access(repository / name, os.X_OK)
    subprocess.run(["bash", "-n", name], cwd=repository, check=True)


def test_no_new_enough_python(checkout, tmp_path):
    path = tools(tmp_path / "bin")
    stub(tmp_path / "bin", "python3", "exit 1")
    failed = script(checkout, PATH=path)
    assert failed.returncode == 2 and "no Python >= 3.11 found" in failed.stderr and "apt-get install" in failed.stderr


def test_all_missing_packages_are_named_at_once(checkout, tmp_path):
    path = tools(tmp_path / "bin", "g++")
    # A Python that runs, is new enough, and has neither venv nor headers.
    stub(tmp_path / "bin", "python3", 'case "$2" in *ensurepip*|*Python.h*) exit 1;; *) exit 0;; esac')
    failed = script(checkout, PATH=path)
    assert failed.returncode == 2
    assert "apt-get install -y python3-venv g++ python3-dev" in failed.stderr
    assert not (checkout / ".venv").exists()


def test_system_torch_that_is_not_there(checkout, tmp_path):
    path = tools(tmp_path / "bin")
    stub(tmp_path / "bin", "python3", 'case "$2" in *torch*) exit 1;; *) exit 0;; esac')
    failed = script(checkout, PATH=path, MEGACTL_SYSTEM_TORCH="1")
    assert failed.returncode == 2 and "has no torch >= 2.11" in failed.stderr


def test_unknown_arguments(checkout):
    failed = script(checkout, "--help-me")
    assert failed.returncode == 2 and "--key" in failed.stderr


@pytest.fixture
def finished(checkout: Path) -> Path:
    """A checkout whose set-up has been done."""
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (checkout / "megactl" / "_ops.cpython.so").write_text("")
    (checkout / ".venv" / ".megactl-setup").write_text(script(checkout, "--key").stdout)
    return checkout


def test_a_finished_set_up_is_a_no_op(finished):
    start = time.monotonic()
    done = script(finished)
    assert done.returncode == 0 and done.stderr == "" and time.monotonic() - start < 2
    assert not (finished / "build").exists()


@pytest.mark.parametrize(
    "changed", ["pyproject.toml", "setup.py", "constraints.txt", "megactl/csrc/kernels/philox.h", "megactl/csrc/native/new.cpp"]
)
def test_the_key_follows_what_the_result_depends_on(finished, changed):
    before = script(finished, "--key").stdout
    with (finished / changed).open("a") as file:
        file.write("\n")
    assert script(finished, "--key").stdout != before
    assert script(finished, "--key", MEGACTL_CUDA="0").stdout != script(finished, "--key").stdout


def test_a_killed_run_holds_no_lock(finished):
    """The lock is the kernel's: it is gone with the process, so a set-up killed at any time cannot stop the next one."""
    (finished / "build").mkdir()
    holder = subprocess.Popen(["flock", "build/setup.lock", "sleep", "60"], cwd=finished, start_new_session=True)
    try:
        for _ in range(100):
            if subprocess.run(["flock", "-n", "build/setup.lock", "true"], cwd=finished).returncode:
                break
            time.sleep(0.02)
        else:
            pytest.fail("the lock was never taken")
        (finished / "setup.py").write_text("")
        waiting = subprocess.Popen(["bash", "scripts/setup.sh"], cwd=finished, stderr=subprocess.PIPE, text=True, start_new_session=True)
        assert waiting.stderr is not None and "waiting for another set-up" in waiting.stderr.readline()
        os.killpg(waiting.pid, 9)
        waiting.wait()
    finally:
        os.killpg(holder.pid, 9)
        holder.wait()
    # Killed descendants that inherited the descriptor may live a moment longer than the one that was waited for.
    assert subprocess.run(["flock", "-w", "2", "build/setup.lock", "true"], cwd=finished).returncode == 0
