"""What the compiled modules were built from, read without loading them. No torch.

The build embeds one line of JSON in every module. It is found by searching the file's bytes, so a module that was built for
another torch can be named and refused before the dynamic linker fails on it, and the record cannot disagree with the file.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import shlex
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

MARKER = "megactl-build-info:"
# What each module is compiled from, relative to megactl/csrc.
SOURCES: dict[str, tuple[str, ...]] = {"_ops": ("ops", "kernels"), "_native": ("native",)}
_SUFFIXES = (".cpp", ".cu", ".h", ".cuh")


@dataclass(frozen=True)
class BuildInfo:
    """One compiled module. `torch` is "major.minor" (None: built without torch), `cuda` the toolkit's version (None: CPU only)."""

    module: str
    python: str
    torch: str | None
    cuda: str | None
    archs: tuple[str, ...]
    source_hash: str

    def to_marker(self) -> str:
        """The line embedded in the module."""
        return MARKER + json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> BuildInfo:
        """Inverse of `to_marker`, without the marker. Raises ValueError or TypeError where the text is not one of ours."""
        fields = json.loads(text)
        return cls(**{**fields, "archs": tuple(fields["archs"])})


def package_folder() -> Path:
    """The folder of the `megactl` package, where the compiled modules lie."""
    return Path(__file__).resolve().parent


def csrc_folder() -> Path | None:
    """The sources of the compiled modules; None where megactl was installed from a wheel, which does not carry them."""
    folder = package_folder() / "csrc"
    return folder if (folder / "ops").is_dir() else None


def module_sources(module: str, csrc: Path) -> list[Path]:
    """Every source and header of `module` below `csrc`, sorted."""
    found: list[Path] = []
    for entry in (csrc / name for name in SOURCES[module]):
        found += [entry] if entry.is_file() else [path for path in entry.rglob("*") if path.suffix in _SUFFIXES]
    return sorted(found)


def source_hash(module: str, csrc: Path) -> str:
    """16 hex digits over names and contents: what decides whether a compiled module still fits its sources."""
    digest = hashlib.sha256()
    for path in module_sources(module, csrc):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(csrc).as_posix()}:{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()[:16]


def find_module(module: str, folder: Path | None = None) -> Path | None:
    """The file of a compiled module that this Python can load, or None."""
    path = (folder or package_folder()) / f"{module}{sysconfig.get_config_var('EXT_SUFFIX')}"
    return path if path.is_file() else None


def other_builds(module: str) -> list[Path]:
    """Files of `module` for other Pythons: why a module that seems to be there is not found."""
    mine = find_module(module)
    return [path for path in sorted(package_folder().glob(f"{module}.*.so")) if path != mine]


def read_build_info(path: Path) -> BuildInfo | None:
    """What `path` was built from; None where the file carries no record (it was compiled by hand, or cut short)."""
    if path.stat().st_size == 0:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(f"{MARKER}{{".encode())
        end = data.find(b"\0", start)
        if start < 0 or end < 0:
            return None
        text = data[start + len(MARKER) : end]
    try:
        return BuildInfo.from_json(text.decode())
    except (ValueError, TypeError, KeyError):
        return None


def built(module: str) -> BuildInfo | None:
    """What the compiled `module` of this installation was built from; None where it is missing or carries no record."""
    path = find_module(module)
    return read_build_info(path) if path else None


def stale_source(module: str, info: BuildInfo) -> str | None:
    """The hash of the sources here where it differs from what `info` was built from; None where it fits or no sources are here."""
    csrc = csrc_folder()
    if csrc is None:
        return None
    now = source_hash(module, csrc)
    return now if now != info.source_hash else None


def missing(module: str) -> str | None:
    """Why `module` cannot be loaded by this Python; None where its file is there."""
    if find_module(module) is not None:
        return None
    others = ", ".join(other.name for other in other_builds(module))
    return f"megactl.{module} is not built for this Python{f' (found {others})' if others else ''}"


def misfit(module: str, info: BuildInfo | None, *, torch: str, cuda: str | None, gpus: int) -> str | None:
    """Why a `module` built from `info` is not for this process, naming both values; None where it fits.

    `torch` and `cuda` are torch's versions (cuda None: a build for CPUs), `gpus` how many torch sees.
    """
    if info is None:
        return f"megactl.{module} carries no build record, so what it was built for is unknown"
    here = ".".join(torch.split(".")[:2])
    if info.torch is not None and info.torch != here:
        return f"megactl.{module} was built for torch {info.torch}, this is torch {here}"
    if info.cuda and not cuda:
        return f"megactl.{module} was built for CUDA {info.cuda}, this torch is a CPU build"
    # A CUDA build of torch on a machine without a GPU is well served by CPU kernels.
    if info.torch is not None and not info.cuda and gpus:
        return f"megactl.{module} was built for the CPU only, this torch has CUDA {cuda} and sees {gpus} GPUs"
    now = stale_source(module, info)
    return f"megactl.{module} was built from sources {info.source_hash}, megactl/csrc is now {now}" if now else None


def build_command() -> str:
    """The shell command that builds the compiled modules for this Python."""
    if csrc_folder() is None:
        return f"{shlex.quote(sys.executable)} -m pip install --no-build-isolation --no-deps --force-reinstall megactl"
    return f"cd {shlex.quote(str(package_folder().parent))} && {shlex.quote(sys.executable)} setup.py build_ext --inplace"
