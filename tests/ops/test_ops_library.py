"""Which operators are used, and which builds are refused."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from megactl import _build
from megactl.engine import ops
from megactl.engine.ops import library
from megactl.errors import BuildError, ConfigError

TORCH = ".".join(torch.__version__.split(".")[:2])
MISSING = "megactl._ops is not built for this Python"


def fitting(**changes: object) -> _build.BuildInfo:
    """The record of a build that fits this process, but for `changes`."""
    csrc = _build.csrc_folder()
    assert csrc is not None
    cuda = torch.version.cuda if torch.cuda.is_available() else None
    info = _build.BuildInfo("_ops", "3.11", TORCH, cuda, (), _build.source_hash("_ops", csrc))
    return dataclasses.replace(info, **changes)


def test_a_fitting_build_is_accepted():
    library.check(fitting())


@pytest.mark.parametrize(
    ("change", "named"),
    [({"torch": "2.9"}, ["2.9", TORCH]), ({"source_hash": "0123456789abcdef"}, ["0123456789abcdef", "csrc"])],
)
def test_a_build_that_does_not_fit_is_refused_with_both_values_and_the_command(change, named):
    with pytest.raises(BuildError) as caught:
        library.check(fitting(**change))
    for word in (*named, sys.executable, "setup.py build_ext --inplace"):
        assert word in str(caught.value)


def test_cuda_and_cpu_builds_are_told_apart(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BuildError, match=r"built for CUDA 13\.0, this torch is a CPU build"):
        library.check(fitting(cuda="13.0"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    library.check(fitting(cuda=None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BuildError, match=r"CPU only, this torch has CUDA 13\.0 and sees 2 GPUs"):
        library.check(fitting(cuda=None))


def test_a_build_without_a_record_is_refused():
    with pytest.raises(BuildError, match="no build record"):
        library.check(None)


def test_the_source_is_compared_only_where_it_is_present(monkeypatch):
    monkeypatch.setattr(_build, "csrc_folder", lambda: None)
    assert _build.stale_source("_ops", dataclasses.replace(_build.BuildInfo("_ops", "", "", None, (), "other"))) is None
    assert "pip install" in _build.build_command()


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the compiled module had never been built."""
    monkeypatch.setattr(library, "load", lambda: MISSING)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    library._warn_once.cache_clear()


def test_absence_is_one_warning_with_the_command(absent, monkeypatch):
    monkeypatch.setenv("MEGACTL_OPS", "auto")
    with pytest.warns(RuntimeWarning, match="build_ext --inplace") as caught:
        assert [library.use_compiled() for _ in range(3)] == [False] * 3
    assert len(caught) == 1


def test_only_the_first_rank_warns(absent, monkeypatch):
    monkeypatch.setenv("MEGACTL_OPS", "auto")
    monkeypatch.setenv("RANK", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not library.use_compiled()


def test_absence_is_an_error_where_compiled_is_demanded(absent, monkeypatch):
    monkeypatch.setenv("MEGACTL_OPS", "compiled")
    with pytest.raises(BuildError, match="build_ext --inplace"):
        library.use_compiled()


def test_torch_mode_loads_nothing(monkeypatch):
    def fail() -> str:
        raise AssertionError("loaded")

    monkeypatch.setattr(library, "load", fail)
    monkeypatch.setenv("MEGACTL_OPS", "torch")
    assert not library.use_compiled()
    assert "plain torch" in ops.describe()


def test_an_unknown_mode_is_refused(monkeypatch):
    monkeypatch.setenv("MEGACTL_OPS", "fast")
    with pytest.raises(ConfigError, match="auto, compiled, torch"):
        library.use_compiled()


def test_describe_says_what_is_loaded(compiled):
    csrc = _build.csrc_folder()
    assert csrc is not None
    assert TORCH in ops.describe() and _build.source_hash("_ops", csrc) in ops.describe()


@pytest.mark.slow
def test_a_checkout_whose_sources_changed_is_refused_in_a_fresh_process(compiled, tmp_path: Path):
    """The whole way, with nothing replaced: copy the package, touch nothing, then change one source."""
    here = _build.package_folder()
    shutil.copytree(here, tmp_path / "megactl", ignore=shutil.ignore_patterns("__pycache__"))

    def start(mode: str) -> subprocess.CompletedProcess[str]:
        code = "from megactl.engine import ops; print(ops.use_compiled())"
        environment = {**os.environ, "MEGACTL_OPS": mode, "PYTHONPATH": str(tmp_path)}
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert start("compiled").stdout.strip() == "True"
    header = tmp_path / "megactl" / "csrc" / "kernels" / "adamw.h"
    header.write_text(header.read_text() + "// changed\n")
    refused = start("auto")
    assert refused.returncode != 0 and "was built from sources" in refused.stderr
    for module in (tmp_path / "megactl").glob("_ops*.so"):
        module.unlink()
    absent = start("auto")
    assert absent.stdout.strip() == "False" and absent.stderr.count("RuntimeWarning") == 1
