"""The mask's intervals in CUDA C++.

Launches: 1 where output rows are not longer than 4096, else 3. With a status one more that reports, unless there is a single
output row of at most that length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import RAISE, RecordedError
from .cuda_module import module


def intervals(
    document_ids: Tensor, image_ids: Tensor | None, attend: tuple[int, int, int, int, int],
    prefix_lengths: int | Tensor | None, parent_ids: Tensor | None, pair: bool, status,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """``(kv_lo, kv_hi, kv_lo2, kv_hi2)``, int32 (G, W): the keys that each row sees; the second pair only with `pair`."""
    document_ids, device = document_ids.contiguous(), document_ids.device
    image_ids = None if image_ids is None else image_ids.contiguous()
    if prefix_lengths is not None and not isinstance(prefix_lengths, int):
        prefix_lengths = torch.as_tensor(prefix_lengths, dtype=torch.int64, device=device).contiguous()
    parent_ids = None if parent_ids is None else torch.as_tensor(parent_ids, device=device).contiguous()
    shape = document_ids.shape
    lo, hi = document_ids.new_empty(shape), document_ids.new_empty(shape)
    lo2, hi2 = (document_ids.new_empty(shape), document_ids.new_empty(shape)) if pair else (None, None)
    given = (document_ids, image_ids, attend, prefix_lengths, parent_ids)
    workspace = document_ids.new_empty(module.intervals_workspace(*given), dtype=torch.int64)
    found = document_ids.new_zeros(8, dtype=torch.int64) if status is RAISE else status
    module.intervals(*given, lo, hi, lo2, hi2, workspace, found)
    if status is RAISE:
        record = tuple(found.tolist())
        if record[0]:
            raise RecordedError(record)
    return lo, hi, lo2, hi2
