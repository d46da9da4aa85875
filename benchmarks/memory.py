"""Transient memory of one call: the highest point of what it allocates, less what it hands back."""

from __future__ import annotations

import os
from typing import Any, Callable

import torch

from vlm_fuse.backend import backends, choose

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines for every call


def transient_bytes(run: Callable[[], Any], device: str = "cpu", *, warm: bool = False) -> int:
    """Bytes that `run` holds at its highest point beyond those that live on in its result.

    Counts torch's own allocations and the tensors that the C++ kernels make, to the byte. On the CPU memory that native
    code takes from malloc besides is not seen: `resident_bytes` bounds that.

    warm: `run` has run before; what is made once (caches, compiled code) is not transient memory.
    """
    peak, held = _peak_and_held(run, device, warm)
    return peak - held


def peak_bytes(run: Callable[[], Any], device: str = "cpu", *, warm: bool = False) -> int:
    """The same with the result: all that `run` holds at its highest point."""
    return _peak_and_held(run, device, warm)[0]


def _peak_and_held(run: Callable[[], Any], device: str, warm: bool) -> tuple[int, int]:
    if not warm:
        run()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        found = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
        del result
        return found
    kernels = choose("cpu", "cpu") if backends()["cpu"].available else None
    before = 0
    if kernels is not None:
        kernels.reset_peak()
        before = kernels.memory()[0]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    made, most, _ = kernels.memory() if kernels is not None else (0, 0, 0)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak + most - before, held + made - before  # the two peaks need not come together: at most this


def resident_bytes(run: Callable[[], Any], *, warm: bool = False) -> int | None:
    """Growth of the process at the highest point of `run`, result included; Linux only, pages not yet given back
    by malloc are missed. None where the kernel does not let the mark be reset."""
    if not warm:
        run()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _status("VmRSS")
        result = run()
        peak = _status("VmHWM")
    except OSError:
        return None
    del result
    return peak - before


def _status(field: str) -> int:
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
