"""Where Triton kernels run, and what they take as sizes: one place for the interpreter, the device and block widths."""

from __future__ import annotations

import contextlib
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

#: under TRITON_INTERPRET=1 kernels run on the host, one program after another, and take CPU tensors.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

#: threads of a warp.
LANES = 64 if torch.version.hip else 32

#: launch options of kernels that count: left to itself NVIDIA's assembler spills a few bytes for the sake of occupancy.
SCAN = {"num_warps": 8}
if torch.version.hip is None and not (hasattr(torch, "xpu") and torch.xpu.is_available()):
    SCAN["maxnreg"] = 255

_NOWHERE = contextlib.nullcontext()


def on_device_of(tensor: Tensor):
    """Triton launches on the current device; this makes it the tensor's."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _NOWHERE


def is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def row_shape(dim: int) -> tuple[int, int]:
    """(BLOCK, num_warps) for rows of `dim` elements: up to 32 elements a thread, several 16-byte accesses in flight.

    Never below 512: 64 lanes (AMD) of 8 two-byte elements.
    """
    block = min(max(triton.next_power_of_2(dim), 512), 4096)
    return block, max(1, min(4, block // 1024))


def unit(*strides: int) -> int:
    """The largest of 8, 4, 2, 1 that divides every stride. Kernels take strides in this unit.

    That tells the compiler the alignment of every row without specialising on the strides.
    """
    joined = 8
    for stride in strides:
        joined |= stride
    return joined & -joined
