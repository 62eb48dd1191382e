"""Loads megactl._ops, refuses one that does not fit this torch, device or source, and decides between it and the reference.

Nothing is compiled at run time: a compile lock left behind by a killed process would stop every later one.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings

import torch

from megactl import _build
from megactl.errors import BuildError, ConfigError, Problem

MODES = ("auto", "compiled", "torch")
# The modules beside this one that have operators, each with a function `register`.
TOPICS = ("philox", "adamw", "cross_entropy", "gelu", "gradients", "norm", "rotary", "softmax", "swiglu")


def mode() -> str:
    """The value of MEGACTL_OPS. Raises ConfigError where it is none of auto, compiled, torch."""
    chosen = os.environ.get("MEGACTL_OPS", "auto")
    if chosen not in MODES:
        raise ConfigError([Problem(f"MEGACTL_OPS = {chosen}", f"must be one of {', '.join(MODES)}", "unset it for auto")])
    return chosen


# The answer does not change while a process runs, and torch.compile cannot trace the loading: it takes the answer as a constant.
@torch.compiler.assume_constant_result
def use_compiled() -> bool:
    """Whether the compiled operators are used; loads them at the first call.

    Raises BuildError where MEGACTL_OPS=compiled and they are missing, and, unless MEGACTL_OPS=torch, where they do not fit.
    """
    chosen = mode()
    if chosen == "torch":
        return False
    missing = load()
    if missing is None:
        return True
    if chosen == "compiled":
        raise BuildError(f"MEGACTL_OPS=compiled, but {missing}", f"run: {_build.build_command()}")
    _warn_once(missing)
    return False


def describe() -> str:
    """One line for `megactl doctor` and logs: what the operators run on and why. Raises as `use_compiled` does."""
    if not use_compiled():
        return "plain torch (MEGACTL_OPS=torch)" if mode() == "torch" else f"plain torch ({load()})"
    info = _build.built("_ops")
    assert info is not None
    device = f"CUDA {info.cuda} for sm_{', sm_'.join(info.archs)}" if info.cuda else "CPU only"
    return f"compiled (torch {info.torch}, Python {info.python}, {device}, source {info.source_hash})"


def looks(tensor: torch.Tensor) -> str:
    """A tensor as messages name it: dtype, shape, device."""
    contiguous = "" if tensor.is_contiguous() else " (not contiguous)"
    return f"{tensor.dtype} {list(tensor.shape)}{contiguous} on {tensor.device}"


@functools.cache
def load() -> str | None:
    """Load and register the compiled operators once. Returns None, or why they are missing. Raises BuildError where they do not fit."""
    missing = _build.missing("_ops")
    if missing is not None:
        return missing
    check(_build.built("_ops"))
    try:
        importlib.import_module("megactl._ops")
    except ImportError as error:
        raise BuildError(f"megactl._ops does not load: {error}", f"run: {_build.build_command()}") from error
    _register()
    return None


def check(info: _build.BuildInfo | None) -> None:
    """Raise BuildError, naming both values, where a module built from `info` does not fit this process."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    problem = _build.misfit("_ops", info, torch=torch.__version__, cuda=torch.version.cuda, gpus=gpus)
    if problem:
        raise BuildError(problem, f"run: {_build.build_command()} (or set MEGACTL_OPS=torch for the slower reference)")


@functools.cache
def _warn_once(missing: str) -> None:
    """One warning a process, and only where somebody reads it: on the first rank."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        advice = f"using the slower reference in plain torch. To build it: {_build.build_command()}"
        warnings.warn(f"{missing}: {advice}", RuntimeWarning, stacklevel=4)


def _register() -> None:
    """Tell torch what shapes the operators give and how they differentiate: each topic knows its own."""
    for topic in TOPICS:
        importlib.import_module(f"megactl.engine.ops.{topic}").register()
