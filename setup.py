"""Builds the compiled modules; everything else about the package is in pyproject.toml.

megactl._ops     torch operators (C++ and, where torch has CUDA and a toolkit is found, CUDA) over torch's stable ABI
megactl._native  torch-free C++ behind pybind11

MEGACTL_CUDA=auto|0|1     build CUDA kernels (auto: when torch has CUDA and a toolkit is found)
MEGACTL_ARCHS=80,90a,100  GPU architectures (default: the GPUs seen here; sm_80, sm_90a and sm_100 where none is)
MEGACTL_SKIP_OPS=1        leave _ops out: no torch needed
MEGACTL_SKIP_NATIVE=1     leave _native out
"""

import importlib.util
import os
import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as plain_build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = Path("megactl", "csrc")
DEFAULT_ARCHS = ("80", "90a", "100")
# Results must not depend on the instruction set chosen at run time, so a multiply and an add are never fused;
# errno and floating-point traps are not used here, and keeping them would stop sqrt and selects from being vectorised.
CXX_FLAGS = ["-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-g0"]
NVCC_FLAGS = ["-O3", "--fmad=false", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden"]
BUILDING = {"build", "build_ext", "bdist", "bdist_wheel", "develop", "editable_wheel", "install"}


def load_build_module():
    """megactl/_build.py, without importing the package (an isolated build has none of its dependencies)."""
    spec = importlib.util.spec_from_file_location("megactl_build", ROOT / "megactl" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_build = load_build_module()


def flag(name):
    """Whether the environment switch `name` is on."""
    return os.environ.get(name, "0") not in ("", "0")


def torch_version():
    """torch's (major, minor), or an exit that says what to do."""
    try:
        import torch
    except ImportError as error:
        sys.exit(
            f"megactl: building _ops needs torch >= 2.11 in this Python ({error}): install torch and run pip with --no-build-isolation, "
            "or set MEGACTL_SKIP_OPS=1 to build without it"
        )
    version = tuple(int(part) for part in re.match(r"(\d+)\.(\d+)", torch.__version__).groups())
    if version < (2, 11):
        sys.exit(f"megactl: torch {torch.__version__} is too old for _ops: install torch >= 2.11, or set MEGACTL_SKIP_OPS=1")
    return version


def wants_cuda():
    """Whether _ops gets CUDA kernels; exits where MEGACTL_CUDA=1 cannot be honoured."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    choice = os.environ.get("MEGACTL_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"megactl: MEGACTL_CUDA={choice}: must be auto, 0 or 1")
    possible = bool(torch.version.cuda and CUDA_HOME)
    if choice == "1" and not possible:
        missing = "this torch is a CPU build" if not torch.version.cuda else "no CUDA toolkit was found (set CUDA_HOME)"
        sys.exit(f"megactl: MEGACTL_CUDA=1 cannot be honoured: {missing}; set MEGACTL_CUDA=0 for a CPU build")
    return choice != "0" and possible


def visible_archs():
    """The architectures of the GPUs in this machine, Hopper and later with their architecture-specific instructions."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return [f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}" for major, minor in sorted(found)]


def parse_archs(text):
    """ "sm_80, 90a;10.0+PTX" -> ["80", "90a", "100+PTX"]; exits on what no kernel here is built for."""
    archs = [part.lower().removeprefix("sm_").replace(".", "").replace("ptx", "PTX") for part in re.split(r"[\s,;]+", text.strip()) if part]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}a?(\+PTX)?", arch):
            sys.exit(f"megactl: GPU architecture {arch!r} is not one: write MEGACTL_ARCHS=80,90a,100")
        if int(re.match(r"\d+", arch).group()) < 75:
            sys.exit(f"megactl: GPU architecture sm_{arch} cannot be built: a V100 (sm_70) needs a CUDA 12 build, CUDA 13 starts at sm_75")
    return archs


def gpu_archs():
    """What to compile for: MEGACTL_ARCHS, else torch's own TORCH_CUDA_ARCH_LIST, else the GPUs seen, else the defaults."""
    text = os.environ.get("MEGACTL_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST") or ",".join(visible_archs()) or ",".join(DEFAULT_ARCHS)
    archs = parse_archs(text)
    # torch's build turns this list into -gencode options; without it, it would probe the GPU and write its own list.
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(re.sub(r"(\d)(a?(\+PTX)?)$", r".\1\2", arch) for arch in archs)
    return archs


def ops_extension():
    """megactl._ops and its build record."""
    version = torch_version()
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    cuda = wants_cuda()
    archs = gpu_archs() if cuda else []
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / CSRC / "ops").glob("*.cpp"))
    if cuda:
        sources += sorted(str(path.relative_to(ROOT)) for path in (ROOT / CSRC / "kernels" / "cuda").glob("*.cu"))
    extension = (CUDAExtension if cuda else CppExtension)(
        "megactl._ops",
        sources,
        include_dirs=[str(ROOT / CSRC)],
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000"), *([("USE_CUDA", None)] if cuda else [])],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
    )
    extension.megactl_build = {"torch": ".".join(map(str, version)), "cuda": torch.version.cuda if cuda else None, "archs": tuple(archs)}
    return extension


def native_extension():
    """megactl._native: every .cpp of csrc/native; None where there is none."""
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / CSRC / "native").glob("*.cpp"))
    if not sources:
        return None
    try:
        import pybind11
    except ImportError:
        sys.exit("megactl: building _native needs pybind11 in this Python: pip install pybind11, or set MEGACTL_SKIP_NATIVE=1")
    includes = [pybind11.get_include(), str(ROOT / CSRC)]
    extension = Extension("megactl._native", sources, include_dirs=includes, extra_compile_args=[*CXX_FLAGS, "-std=c++17"], language="c++")
    extension.megactl_build = {"torch": None, "cuda": None, "archs": ()}
    return extension


def extensions():
    """The modules asked for."""
    if not BUILDING & set(sys.argv):
        return []
    found = [None if flag("MEGACTL_SKIP_OPS") else ops_extension(), None if flag("MEGACTL_SKIP_NATIVE") else native_extension()]
    return [extension for extension in found if extension]


class Recorded:
    """Mixin of build_ext: embeds the build record, and builds again where the file that lies there was built from something else."""

    def build_extension(self, extension):
        module = extension.name.rpartition(".")[2]
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        fields = {"python": python, "source_hash": _build.source_hash(module, ROOT / CSRC), **extension.megactl_build}
        info = _build.BuildInfo(module=module, **fields)
        extension.sources = [*extension.sources, self.write_record(info)]
        extension.depends = [str(path) for path in _build.module_sources(module, ROOT / CSRC)] + [str(ROOT / "setup.py")]
        target, stamp = Path(self.get_ext_fullpath(extension.name)), Path("build", "generated", f"{module}.stamp")
        if not stamp.is_file() or stamp.read_text() != self.stamp(target, info):
            target.unlink(missing_ok=True)
        stamp.unlink(missing_ok=True)
        super().build_extension(extension)
        stamp.write_text(self.stamp(target, info))

    @staticmethod
    def stamp(target, info):
        """What a finished build leaves behind: a module that a killed linker cut short is newer than its sources, too."""
        state = target.stat() if target.is_file() else None
        return f"{target} {state and (state.st_size, state.st_mtime_ns)} {info.to_marker()}"

    def write_record(self, info):
        """A source file of one line, so that a changed hash recompiles nothing else. Returns its path."""
        path = Path("build", "generated", f"{info.module}_build_info.cpp")
        text = f'extern "C" __attribute__((used)) const char megactl_build_info{info.module}[] = R"({info.to_marker()})";\n'
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return str(path)


class BuildPython(build_py):
    """Puts the Slurm templates, which lie beside the package, inside it in a wheel."""

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False):
            return
        for source in sorted((ROOT / "templates").rglob("*")):
            if source.is_file():
                target = Path(self.build_lib, "megactl", source.relative_to(ROOT))
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))


def build_command(modules):
    """torch's build_ext where a module needs nvcc or torch's flags, setuptools' own otherwise."""
    if any(extension.name == "megactl._ops" for extension in modules):
        from torch.utils.cpp_extension import BuildExtension

        return type("build_ext", (Recorded, BuildExtension), {})
    return type("build_ext", (Recorded, plain_build_ext), {})


modules = extensions()
setup(ext_modules=modules, cmdclass={"build_ext": build_command(modules), "build_py": BuildPython})
