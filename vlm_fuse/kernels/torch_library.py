"""Functions of torch's own libraries, by address, for the compiled modules: these know no torch headers."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

_FOLDER = Path(torch.__file__).parent / "lib"


@functools.cache
def function(library: str, name: str):
    """An exported function, or None where this torch has none of that name."""
    for suffix in ("so", "dylib"):
        try:
            return getattr(ctypes.CDLL(str(_FOLDER / f"{library}.{suffix}")), name)
        except (OSError, AttributeError):
            continue
    return None


def address(library: str, name: str) -> int:
    """Its address, 0 where there is none."""
    found = function(library, name)
    return 0 if found is None else ctypes.cast(found, ctypes.c_void_p).value or 0


def constant(name: str) -> int:
    """What a function without arguments of the C interface of torch's compiled models returns, -1 where there is none."""
    found = function("libtorch_cpu", f"aoti_torch_{name}")
    return -1 if found is None else found()
