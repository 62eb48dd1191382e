"""Two whole scripts as they are, so that a change of a template is seen; and that the templates reach an installed package."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "train.sh": (
        "--tp", "2", "--data-cache", "it's here", "--time", "12:00:00", "--account", "proj", "--cpus-per-task", "6",
        "--module", "cuda/12.8", "--venv", "/opt/env", "--env", "NCCL_SOCKET_IFNAME=ib0", "--container-image", "/images/train.sqsh",
        "--run-dir", "runs/a b",
        "--no-mock-data", "--data", "corpus", "--vocab", "300",
    ),
    "sweep.sh": ("--sweep", "lr=1e-4,3e-4", "--launcher", "torchrun", "--time", "60"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_rendered_script_is_the_golden_one(rendered, name):
    text, path = rendered(*CASES[name]), GOLDEN / name
    if os.environ.get("WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), "to accept the change: WRITE_GOLDEN=1 pytest tests/cluster/test_slurm_golden.py"
    answer = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert answer.returncode == 0 and answer.stderr == ""


@pytest.mark.parametrize("name", CASES)
def test_a_rendered_script_passes_our_own_lint(slurm, rendered, tmp_path, name):
    path = tmp_path / name
    path.write_text(rendered(*CASES[name], "--cpus-per-task", "6", "--log-dir", str(tmp_path)))
    code, out, err = slurm("lint", str(path))
    assert code == 0 and "warning" not in out, out + err


@pytest.mark.nightly
def test_the_templates_are_in_the_wheel(tmp_path):
    environ = {**os.environ, "MEGACTL_SKIP_OPS": "1", "MEGACTL_SKIP_NATIVE": "1"}
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(wheel, check=True, env=environ)
    (built,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(built).namelist())
    here = {f"megactl/templates/slurm/{path.name}" for path in (ROOT / "templates" / "slurm").iterdir()}
    assert here <= names and len(here) > 5
    target = tmp_path / "target"
    zipfile.ZipFile(built).extractall(target)
    words = ["slurm", "render", "--preset", "gpt-tiny", "--mock-data", "--nodes", "1", "--gpus-per-node", "2"]
    code = f"from megactl.cli import main; raise SystemExit(main({words!r}))"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(target)}, capture_output=True, text=True
    )
    assert answer.returncode == 0 and answer.stdout.startswith("#!/bin/bash\n"), answer.stderr
