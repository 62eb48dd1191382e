"""The compiled helpers, where they are built. Everything works without them, slower."""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

from megactl import _build


@functools.cache
def native_module() -> ModuleType | None:
    """`megactl._native`, or None after one warning a process: where it is missing, or built from other sources than lie here."""
    reason = _build.missing("_native") or _build.misfit("_native", _build.built("_native"), torch="", cuda=None, gpus=0)
    if reason is None:
        try:
            return importlib.import_module("megactl._native")
        except ImportError as error:
            reason = f"megactl._native does not load ({error})"
    warnings.warn(
        f"{reason}: sample indices are built and logs are read in Python, ten times slower and more; "
        "build it with: python setup.py build_ext --inplace",
        RuntimeWarning,
        stacklevel=2,
    )
    return None
