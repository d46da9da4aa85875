"""The interval mask as FlexAttention's BlockMask, made without a visit to its Q x K elements."""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .. import checks, mask_ops

# mask_mods stand at module level and capture tensors alone: a Python int in a closure would be compiled into the kernel,
# once for each of its values. A mask of one row never looks at the sample: it serves any batch.


def _of_one_row(kv_lo: Tensor, kv_hi: Tensor):
    def mask_mod(b, h, q_idx, kv_idx):
        return (kv_idx >= kv_lo[q_idx]) & (kv_idx < kv_hi[q_idx])

    return mask_mod


def _of_rows(kv_lo: Tensor, kv_hi: Tensor):
    def mask_mod(b, h, q_idx, kv_idx):
        return (kv_idx >= kv_lo[b, q_idx]) & (kv_idx < kv_hi[b, q_idx])

    return mask_mod


def _of_one_row_in_pairs(kv_lo: Tensor, kv_hi: Tensor, kv_lo2: Tensor, kv_hi2: Tensor):
    def mask_mod(b, h, q_idx, kv_idx):
        first = (kv_idx >= kv_lo[q_idx]) & (kv_idx < kv_hi[q_idx])
        return first | ((kv_idx >= kv_lo2[q_idx]) & (kv_idx < kv_hi2[q_idx]))

    return mask_mod


def _of_rows_in_pairs(kv_lo: Tensor, kv_hi: Tensor, kv_lo2: Tensor, kv_hi2: Tensor):
    def mask_mod(b, h, q_idx, kv_idx):
        first = (kv_idx >= kv_lo[b, q_idx]) & (kv_idx < kv_hi[b, q_idx])
        return first | ((kv_idx >= kv_lo2[b, q_idx]) & (kv_idx < kv_hi2[b, q_idx]))

    return mask_mod


def mask_mod(parts: mask_ops.Parts):
    """The mask as a function (b, h, q_idx, kv_idx) -> bool tensor."""
    kv_lo, kv_hi, kv_lo2, kv_hi2, _ = parts
    if kv_lo.shape[0] != 1:
        return _of_rows(kv_lo, kv_hi) if kv_lo2 is None else _of_rows_in_pairs(kv_lo, kv_hi, kv_lo2, kv_hi2)
    return _of_one_row(kv_lo[0], kv_hi[0]) if kv_lo2 is None else _of_one_row_in_pairs(kv_lo[0], kv_hi[0], kv_lo2[0], kv_hi2[0])


def block_mask(parts: mask_ops.Parts, block_size: int | tuple[int, int]) -> BlockMask:
    """What ``create_block_mask`` makes of the same mask, tensor by tensor."""
    q_block, kv_block = checks.block_size(block_size)
    made = mask_ops.block_map(parts, q_block, kv_block)
    # all eight at once: from_kv_blocks would find those of the queries through a dense matrix
    return BlockMask((parts[0].shape[1], parts[4]), *made, (q_block, kv_block), mask_mod(parts))
