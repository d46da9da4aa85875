"""`IntervalMask`: two int32 a row say which keys it sees. Its methods delegate to one file a rendering."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks, ops
from ..attending import CAUSAL, Attend
from . import dense as _dense


class IntervalMask:
    """A mask in which every query row sees one contiguous run of keys, or two.

    Row q of sample b sees the keys ``kv_lo[b, q] <= k < kv_hi[b, q]`` of the same output row, and those of the second
    pair where there is one. A row that sees nothing (padding) has the empty interval (0, 0).

    Args:
        kv_lo: ``(B, Q)`` int32, first key seen.
        kv_hi: ``(B, Q)`` int32, key after the last one seen.
        kv_length: number of keys.
        kv_lo2: ``(B, Q)`` int32 or None: first key of the second run, ``kv_hi < kv_lo2`` or (0, 0).
        kv_hi2: ``(B, Q)`` int32 or None.

    Raises:
        TypeError: an interval that is not int32, or only one half of the second pair.
        ValueError: shapes that differ.

    Example:
        >>> import torch
        >>> from vlm_fuse import IntervalMask
        >>> IntervalMask.from_document_ids(torch.tensor([[0, 0, 1, -1]])).dense()[0, 0].int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [0, 0, 1, 0],
                [0, 0, 0, 0]], dtype=torch.int32)
    """

    def __init__(self, kv_lo: Tensor, kv_hi: Tensor, kv_length: int, kv_lo2: Tensor | None = None, kv_hi2: Tensor | None = None):
        checks.interval_pair(kv_lo, kv_hi, kv_lo2, kv_hi2)
        self.kv_lo, self.kv_hi, self.kv_length, self.kv_lo2, self.kv_hi2 = kv_lo, kv_hi, kv_length, kv_lo2, kv_hi2

    def __repr__(self) -> str:
        pairs = 1 if self.kv_lo2 is None else 2
        return f"IntervalMask(rows={tuple(self.kv_lo.shape)}, keys={self.kv_length}, intervals={pairs}, device={self.kv_lo.device})"

    @classmethod
    def from_document_ids(
        cls,
        document_ids: Tensor,
        attend: Attend = CAUSAL,
        *,
        image_ids: Tensor | None = None,
        prefix_lengths: int | Tensor | list[int] | None = None,
        parent_ids: Tensor | list[int] | None = None,
    ) -> IntervalMask:
        """The mask of packed, padded or plain rows: a row sees rows of its own document only.

        Args:
            document_ids: ``(B, Q)`` int32 or int64, below 0 = padding. Rows of equal id in one output row are one document.
            attend: who sees whom inside a document.
            image_ids: ``(B, Q)`` int32 or int64, -1 = no image; needed where `attend` treats images apart.
            prefix_lengths: int, or ints by document id: that many leading rows of a document are seen by all of it.
            parent_ids: ints by document id, -1 = none: a document also sees all of its parent.

        Returns:
            IntervalMask: ``B`` rows of ``Q`` queries and ``Q`` keys.

        Raises:
            ValueError: a row that would need more than two intervals (named), shapes that differ.

        Example:
            >>> import torch
            >>> from vlm_fuse import Attend, IntervalMask
            >>> mask = IntervalMask.from_document_ids(torch.tensor([[0, 0, 0]]), Attend(window=2))
            >>> mask.kv_lo, mask.kv_hi
            (tensor([[0, 0, 1]], dtype=torch.int32), tensor([[1, 2, 3]], dtype=torch.int32))
        """
        checks.from_document_ids(document_ids, attend, image_ids)
        parts = ops.intervals(document_ids, image_ids, attend, prefix_lengths, parent_ids, pair=True)
        return cls(parts[0], parts[1], document_ids.shape[1], *parts[2:])

    def dense(self) -> Tensor:
        """``(B, 1, Q, kv_length)`` bool, True where a row sees a key: what SDPA takes as attn_mask.

        A row that sees nothing gives zeros in `scaled_dot_product_attention`.

        Example:
            >>> import torch
            >>> from vlm_fuse import IntervalMask
            >>> IntervalMask.from_document_ids(torch.tensor([[0, 0]])).dense().tolist()
            [[[[True, False], [True, True]]]]
        """
        return _dense.dense(self.kv_lo, self.kv_hi, self.kv_length, self.kv_lo2, self.kv_hi2)

    def additive(self, dtype: torch.dtype) -> Tensor:
        """``(B, 1, Q, kv_length)`` of `dtype`: 0 where a row sees a key, else ``torch.finfo(dtype).min``, never -inf.

        Example:
            >>> import torch
            >>> from vlm_fuse import IntervalMask
            >>> IntervalMask.from_document_ids(torch.tensor([[0, 0]])).additive(torch.float32)[0, 0, 1]
            tensor([0., 0.])
        """
        checks.floating("additive: dtype", dtype)
        return _dense.additive(self.dense(), dtype)
