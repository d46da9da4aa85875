"""The interval mask written out: one entry for every pair of query row and key row."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(kv_lo: Tensor, kv_hi: Tensor, kv_length: int, kv_lo2: Tensor | None = None, kv_hi2: Tensor | None = None) -> Tensor:
    """``(B, 1, Q, kv_length)`` bool, True where the row sees the key."""
    key = torch.arange(kv_length, dtype=torch.int32, device=kv_lo.device)
    seen = (key >= kv_lo[..., None]) & (key < kv_hi[..., None])
    if kv_lo2 is not None:
        seen |= (key >= kv_lo2[..., None]) & (key < kv_hi2[..., None])
    return seen[:, None]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen, else ``finfo(dtype).min``: with -inf a row that sees nothing would make NaN of every score."""
    out = torch.full(seen.shape, torch.finfo(dtype).min, dtype=dtype, device=seen.device)
    return out.masked_fill_(seen, 0)
