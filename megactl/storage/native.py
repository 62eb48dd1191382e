"""The compiled helpers, where they are built. Everything works without them, slower."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType


@functools.cache
def native_module() -> ModuleType | None:
    """`megactl._native`, or None after one warning a process."""
    try:
        from megactl import _native
    except ImportError as error:
        warnings.warn(
            f"megactl._native is not loaded ({error}): sample indices are built and logs are read in Python, ten times slower and more; "
            "build it with: python setup.py build_ext --inplace",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return _native
