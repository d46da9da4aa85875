"""Which implementation serves a call: by the argument, then VLM_FUSE_BACKEND, then the device."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import NamedTuple

VARIABLE = "VLM_FUSE_BACKEND"

# os.environ.get encodes and decodes at every call, 0.5 us; the mapping below it does not
_environment = getattr(os.environ, "_data", os.environ)
_KEY = VARIABLE.encode() if _environment is not os.environ and os.name == "posix" else VARIABLE


class _Entry(NamedTuple):
    module: str
    devices: tuple[str, ...]  # empty: every device


#: in order of preference for a device. CUDA C++ before Triton: the same call is fewer launches, and each costs the host less;
#: no size is known yet at which Triton is faster.
_TABLE = {
    "cpu": _Entry("vlm_fuse.kernels.native", ("cpu",)),
    "cuda": _Entry("vlm_fuse.kernels.cuda_backend", ("cuda",)),
    "triton": _Entry("vlm_fuse.kernels.triton_backend", ("cuda", "xpu")),
    "reference": _Entry("vlm_fuse.reference", ()),
}

NAMES = ("auto", *_TABLE)


class BackendInfo(NamedTuple):
    """One backend: whether it can be used here, on which devices, and why (not)."""

    available: bool
    devices: tuple[str, ...]
    reason: str


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module(_TABLE[name].module)
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"
    there, reason = module.available()
    return (module if there else None), reason


def _devices(name: str) -> tuple[str, ...]:
    """Kernels that are interpreted or emulated run on CPU tensors."""
    devices, module = _TABLE[name].devices, _load(name)[0]
    on_host = getattr(module, "EMULATED", False)
    return (*devices, "cpu") if on_host else devices


def backends() -> dict[str, BackendInfo]:
    """Every backend, whether it can be used here, and why not.

    Returns:
        dict: by name, in order of preference: ``BackendInfo(available, devices, reason)``; no devices: every device.

    Example:
        >>> import vlm_fuse
        >>> vlm_fuse.backends()["reference"].available
        True
    """
    found = {}
    for name in _TABLE:
        module, reason = _load(name)
        found[name] = BackendInfo(module is not None, _devices(name), reason)
    return found


@functools.cache
def _warn_fallback(device: str, name: str, reason: str) -> None:
    warnings.warn(f"vlm_fuse: no faster backend for {device}, using the plain PyTorch reference: {name}: {reason}", stacklevel=3)


@functools.cache
def choose(name: str, device: str) -> ModuleType:
    """The implementation for a device type. A named backend never falls back; "auto" may, and says so once."""
    if name not in NAMES:
        raise ValueError(f"backend: unknown {name!r}; choose one of {', '.join(NAMES)}")
    if name != "auto":
        module, reason = _load(name)
        if module is None:
            raise RuntimeError(f"backend {name!r} is not available: {reason}")
        if _devices(name) and device not in _devices(name):
            raise RuntimeError(f"backend {name!r} serves {', '.join(_devices(name))}, not {device}; move the tensors or leave backend='auto'")
        return module
    missing = ("none serves it", "no kernels for this device")
    for candidate, entry in _TABLE.items():
        if entry.devices and device not in entry.devices:
            continue
        module, reason = _load(candidate)
        if module is not None:
            if candidate == "reference":
                _warn_fallback(device, *missing)
            return module
        missing = (candidate, reason)
    raise AssertionError("the reference is always there")


def name_from(argument: str) -> str:
    """The backend asked for: the argument, else the variable, else "auto"."""
    if argument == "auto" and _KEY in _environment:
        return os.environ[VARIABLE] or "auto"
    return argument
