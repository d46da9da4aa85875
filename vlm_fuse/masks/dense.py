"""The interval mask written out: one entry for every pair of query row and key."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks, mask_ops


def dense(parts: mask_ops.Parts) -> Tensor:
    """``(B, 1, Q, kv_length)`` bool, True where the row sees the key."""
    return mask_ops.dense(parts, torch.bool)


def additive(parts: mask_ops.Parts, dtype: torch.dtype) -> Tensor:
    """0 where seen, else ``finfo(dtype).min``: with -inf a row that sees nothing would make NaN of every score."""
    checks.floating("additive: dtype", dtype)
    return mask_ops.dense(parts, dtype)


def bits(parts: mask_ops.Parts) -> Tensor:
    """``(B, ceil(Q * kv_length / 8))`` uint8, eight entries of the dense mask a byte, the first one lowest."""
    return mask_ops.bits(parts)
