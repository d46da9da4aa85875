"""Which dtype a machine can train in without standing still."""

from __future__ import annotations

import time

import torch


def slowdown(size: int = 192) -> float:
    """How many times as long as in float32 a matrix product takes on this CPU in bfloat16."""
    return _seconds(size, torch.bfloat16) / _seconds(size, torch.float32)


def _seconds(size: int, dtype: torch.dtype) -> float:
    a, b = torch.randn(2, size, size).to(dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return best
