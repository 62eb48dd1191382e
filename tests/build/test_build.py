"""setup.py and the build record: what is refused, what is built again, and that the CUDA sources compile."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from megactl import _build

INFO = _build.BuildInfo("_ops", "3.12", "2.11", "13.0", ("80", "90a"), "0123456789abcdef")
NATIVE = """#include <Python.h>
#include "value.h"
PyMODINIT_FUNC PyInit__native() {
    static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
    PyObject* module = PyModule_Create(&definition);
    PyModule_AddIntConstant(module, "value", VALUE);
    return module;
}
"""


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MEGACTL_")}
    return subprocess.run(command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True)


@pytest.fixture
def setup_functions(monkeypatch: pytest.MonkeyPatch, repository: Path) -> dict:
    """What setup.py defines, without building anything."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **keywords: None)
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    monkeypatch.delenv("MEGACTL_ARCHS", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return runpy.run_path(str(repository / "setup.py"))


def test_record_survives_the_way_through_a_file(tmp_path):
    path = tmp_path / "module.so"
    path.write_bytes(b"\x7fELF" + os.urandom(1000).replace(b"\0", b"\1") + INFO.to_marker().encode() + b"\0" + os.urandom(1000))
    assert _build.read_build_info(path) == INFO


@pytest.mark.parametrize(
    "content", [b"", b"\x7fELF", INFO.to_marker().encode()[:60], f"{_build.MARKER}{{}}\0".encode(), b"megactl-build-info:{x\0"]
)
def test_a_damaged_record_is_none(tmp_path, content):
    path = tmp_path / "module.so"
    path.write_bytes(content)
    assert _build.read_build_info(path) is None


def test_source_hash_follows_contents_and_names_of_its_own_module(tmp_path):
    (tmp_path / "kernels" / "cuda").mkdir(parents=True)
    (tmp_path / "native").mkdir()
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "a.cpp").write_text("one")
    header = tmp_path / "kernels" / "cuda" / "a.cuh"
    header.write_text("two")
    hashes = [_build.source_hash("_ops", tmp_path)]
    os.utime(header, (1, 1))
    (tmp_path / "native" / "a.cpp").write_text("other module")
    (tmp_path / "kernels" / "notes.txt").write_text("not a source")
    assert _build.source_hash("_ops", tmp_path) == hashes[0]
    header.write_text("three")
    hashes.append(_build.source_hash("_ops", tmp_path))
    header.rename(header.with_name("b.cuh"))
    hashes.append(_build.source_hash("_ops", tmp_path))
    assert len(set(hashes)) == 3


@pytest.mark.parametrize(
    ("text", "archs"),
    [("80,90a,100", ["80", "90a", "100"]), ("sm_80; SM_90A", ["80", "90a"]), ("8.0 10.0", ["80", "100"]), ("9.0+PTX", ["90+PTX"])],
)
def test_architectures_in_every_spelling(setup_functions, text, archs):
    assert setup_functions["parse_archs"](text) == archs


def test_a_v100_is_refused_with_the_reason(setup_functions):
    for text in ("70", "sm_70", "7.0"):
        with pytest.raises(SystemExit, match=r"V100 .* needs a CUDA 12 build"):
            setup_functions["parse_archs"](text)
    with pytest.raises(SystemExit, match="not one"):
        setup_functions["parse_archs"]("hopper")


def test_architectures_reach_torch(setup_functions, monkeypatch):
    monkeypatch.setenv("MEGACTL_ARCHS", "80,90a,100")
    assert setup_functions["gpu_archs"]() == ["80", "90a", "100"]
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0a;10.0"
    monkeypatch.delenv("MEGACTL_ARCHS")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0 12.0+PTX")
    assert setup_functions["gpu_archs"]() == ["90", "120+PTX"]
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0;12.0+PTX"


def test_without_torch_one_line_says_what_to_do(repository, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
    failed = run([sys.executable, "setup.py", "build_ext"], repository, PYTHONPATH=str(tmp_path))
    assert failed.returncode != 0
    assert failed.stderr.count("\n") == 1 and "--no-build-isolation" in failed.stderr and "MEGACTL_SKIP_OPS=1" in failed.stderr
    version = run([sys.executable, "setup.py", "--version"], repository, PYTHONPATH=str(tmp_path))
    assert version.stdout.strip().endswith(tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"])


def test_cuda_that_cannot_be_had_is_refused(repository):
    torch = pytest.importorskip("torch")
    if torch.version.cuda:
        pytest.skip("this torch has CUDA")
    failed = run([sys.executable, "setup.py", "build_ext"], repository, MEGACTL_CUDA="1")
    assert failed.returncode != 0 and "this torch is a CPU build" in failed.stderr and "MEGACTL_CUDA=0" in failed.stderr
    assert "must be auto, 0 or 1" in run([sys.executable, "setup.py", "build_ext"], repository, MEGACTL_CUDA="yes").stderr


@pytest.fixture
def tiny(repository: Path, tmp_path: Path) -> Path:
    """A checkout with a native module that compiles in no time."""
    native = tmp_path / "megactl" / "csrc" / "native"
    native.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "megactl/_build.py", "LICENSE"):
        shutil.copy(repository / name, tmp_path / name)
    (tmp_path / "README.md").write_text("tiny")
    (tmp_path / "megactl" / "__init__.py").write_text("")
    (native / "module.cpp").write_text(NATIVE)
    (native / "value.h").write_text("#define VALUE 1\n")
    return tmp_path


def build(folder: Path) -> int:
    """Build the tiny module and return the value it was compiled with."""
    done = run([sys.executable, "setup.py", "build_ext", "--inplace"], folder, MEGACTL_SKIP_OPS="1")
    assert done.returncode == 0, done.stderr
    loaded = run([sys.executable, "-c", "from megactl import _native; print(_native.value)"], folder)
    assert loaded.returncode == 0, loaded.stderr
    info = _build.read_build_info(folder / "megactl" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}")
    assert info is not None and info.source_hash == _build.source_hash("_native", folder / "megactl" / "csrc") and info.torch is None
    return int(loaded.stdout)


def test_a_build_is_repeated_when_it_must_be(tiny):
    """After a header changed without a newer time, a removed file, a module cut short by a killed linker."""
    pytest.importorskip("pybind11")
    header = tiny / "megactl" / "csrc" / "native" / "value.h"
    assert build(tiny) == 1
    header.write_text("#define VALUE 2\n")
    assert build(tiny) == 2
    (header.parent / "unused.h").write_text("")
    assert build(tiny) == 2
    (header.parent / "unused.h").unlink()
    assert build(tiny) == 2
    for module in tiny.rglob("_native*.so"):
        module.write_bytes(module.read_bytes()[:3000])
    assert build(tiny) == 2


def test_a_wheel_carries_templates_and_no_sources(tiny, repository):
    for name in ("templates/slurm/train.sbatch.j2", "megactl/commands/__init__.py"):
        (tiny / name).parent.mkdir(parents=True, exist_ok=True)
        (tiny / name).write_text("")
    done = run(
        [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", "dist", "."],
        tiny,
        MEGACTL_SKIP_OPS="1",
        MEGACTL_SKIP_NATIVE="1",
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tiny / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
        entry = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert "megactl/templates/slurm/train.sbatch.j2" in names and "megactl/commands/__init__.py" in names
    assert not [name for name in names if "csrc" in name]
    requirements = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: torch")]
    assert requirements and all("extra ==" in line for line in requirements)
    assert "megactl = megactl.cli:main" in entry


def test_pins_cover_the_requirements(repository):
    """Every direct requirement has one exact version in constraints.txt, and that version satisfies it."""
    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    lines = (repository / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    extras = project["optional-dependencies"]
    # wandb is never installed by the set-up: its users bring their own.
    for text in [*project["dependencies"], *(text for name, texts in extras.items() if name != "wandb" for text in texts)]:
        requirement = requirements.Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower()]), text


# These take most of the time of all; they share their headers with those that are compiled always.
LONG_KERNELS = ("cross_entropy", "gelu", "norm_backward", "norm_forward", "random", "softmax")
KERNELS = [
    pytest.param(path.name, marks=pytest.mark.nightly if path.stem in LONG_KERNELS else ())
    for path in sorted((Path(_build.__file__).parent / "csrc/kernels/cuda").glob("*.cu"))
]


@pytest.mark.slow
@pytest.mark.parametrize("source", KERNELS)
def test_cuda_kernels_compile(repository, tmp_path, source):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc, which is not installed")
    csrc = repository / "megactl" / "csrc"
    # Turn by turn, so that both the oldest and the newest architecture are tried without compiling everything twice.
    arch = ("90a", "80")[len(source) % 2]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-std=c++17", "-O3", "--fmad=false", "-Werror=all-warnings"]
    done = run([nvcc, *flags, f"-I{csrc}", "-c", str(csrc / "kernels" / "cuda" / source), "-o", str(tmp_path / "out.o")], repository)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_cuda_registration_compiles_against_this_torch(repository):
    """Without a GPU or a CUDA build of torch: its stable ABI declares what the CUDA half calls."""
    extension = pytest.importorskip("torch.utils.cpp_extension")
    includes = [*extension.include_paths(), sysconfig.get_paths()["include"], str(repository / "megactl" / "csrc")]
    flags = ["-fsyntax-only", "-std=c++20", "-Wall", "-Werror", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    isystem = [part for path in includes[:-1] for part in ("-isystem", path)]
    sources = [str(path) for path in sorted((repository / "megactl" / "csrc" / "ops").glob("*.cpp"))]
    done = run(["g++", *flags, *isystem, f"-I{includes[-1]}", *sources], repository)
    assert done.returncode == 0, done.stderr


def test_kernels_know_nothing_of_torch(repository):
    for path in _build.module_sources("_ops", repository / "megactl" / "csrc"):
        assert path.parent.name == "ops" or "torch/" not in path.read_text(), path
