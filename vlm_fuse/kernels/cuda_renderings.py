"""The renderings of interval masks in CUDA C++. Launches: `dense` and `bits` 1, `block_map` 2."""

from __future__ import annotations

import torch
from torch import Tensor

from .cuda_module import module


def _contiguous(*parts: Tensor | None) -> tuple[Tensor | None, ...]:
    """Bounds may be slices of larger tensors."""
    return tuple(None if bounds is None else bounds.contiguous() for bounds in parts)


def dense(kv_lo: Tensor, kv_hi: Tensor, kv_lo2: Tensor | None, kv_hi2: Tensor | None, kv_length: int, dtype: torch.dtype) -> Tensor:
    """``(B, 1, Q, kv_length)`` bool, or 0 and the lowest number of a floating dtype."""
    samples, rows = kv_lo.shape
    out = kv_lo.new_empty((samples, 1, rows, kv_length), dtype=dtype)
    module.dense(*_contiguous(kv_lo, kv_hi, kv_lo2, kv_hi2), kv_length, out)
    return out


def bits(kv_lo: Tensor, kv_hi: Tensor, kv_lo2: Tensor | None, kv_hi2: Tensor | None, kv_length: int) -> Tensor:
    """``(B, ceil(Q * kv_length / 8))`` uint8, the first entry lowest."""
    samples, rows = kv_lo.shape
    out = kv_lo.new_empty((samples, (rows * kv_length + 7) // 8), dtype=torch.uint8)
    module.bits(*_contiguous(kv_lo, kv_hi, kv_lo2, kv_hi2), kv_length, out)
    return out


def block_map(
    kv_lo: Tensor, kv_hi: Tensor, kv_lo2: Tensor | None, kv_hi2: Tensor | None, kv_length: int, q_block: int, kv_block: int
) -> tuple[Tensor, ...]:
    """The eight tensors of a BlockMask, int32: partial and full blocks of keys, then of query rows."""
    samples, rows = kv_lo.shape
    lines, columns = -(-rows // q_block), -(-kv_length // kv_block)
    made = []
    for outer, inner in ((lines, columns), (lines, columns), (columns, lines), (columns, lines)):
        made += [kv_lo.new_empty((samples, 1, outer)), kv_lo.new_empty((samples, 1, outer, inner))]
    # the class of every block, lines padded to whole warps
    workspace = kv_lo.new_empty(samples * lines * (-(-columns // 32) * 32), dtype=torch.uint8)
    module.block_map(*_contiguous(kv_lo, kv_hi, kv_lo2, kv_hi2), kv_length, q_block, kv_block, *made, workspace)
    return tuple(made)
