"""The definition of the renderings of an interval mask in plain PyTorch: dense, bits, block map, segments.

Everywhere ``kv_lo``, ``kv_hi`` (and the second pair, or None) are int32 (B, Q): row q sees the keys ``kv_lo <= k < kv_hi``.
Bounds outside of 0 .. kv_length are read as the nearest one inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import CAUSAL_SEGMENT, EMPTY_SEGMENT, FULL_SEGMENT, OTHER_SEGMENT, WINDOWED_FULL_SEGMENT, WINDOWED_SEGMENT


def _seen(kv_lo: Tensor, kv_hi: Tensor, kv_lo2: Tensor | None, kv_hi2: Tensor | None, kv_length: int) -> Tensor:
    """(B, Q, kv_length) bool."""
    key = torch.arange(kv_length, dtype=torch.int32, device=kv_lo.device)
    seen = (key >= kv_lo[..., None]) & (key < kv_hi[..., None])
    if kv_lo2 is not None:
        seen |= (key >= kv_lo2[..., None]) & (key < kv_hi2[..., None])
    return seen


def dense(kv_lo: Tensor, kv_hi: Tensor, kv_lo2: Tensor | None, kv_hi2: Tensor | None, kv_length: int, dtype: torch.dtype) -> Tensor:
    """``(B, 1, Q, kv_length)``. bool: True where the row sees the key; a floating dtype: 0 there, else ``finfo(dtype).min``."""
    seen = _seen(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length)[:, None]
    if dtype == torch.bool:
        return seen
    return torch.full(seen.shape, torch.finfo(dtype).min, dtype=dtype, device=seen.device).masked_fill_(seen, 0)


def bits(kv_lo: Tensor, kv_hi: Tensor, kv_lo2: Tensor | None, kv_hi2: Tensor | None, kv_length: int) -> Tensor:
    """``(B, ceil(Q * kv_length / 8))`` uint8: entry i of the flattened (Q, kv_length) is bit i % 8 of byte i // 8."""
    flat = _seen(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length).flatten(1).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8)).view(flat.shape[0], (flat.shape[1] + 7) // 8, 8)
    weight = 1 << torch.arange(8, dtype=torch.uint8, device=flat.device)
    return (padded * weight).sum(-1, dtype=torch.uint8)


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(how many, the chosen columns in order and then all others in order), int32, of (..., rows, columns) bool."""
    number = chosen.sum(-1, dtype=torch.int32)
    return number, chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True).int()


def block_map(
    kv_lo: Tensor, kv_hi: Tensor, kv_lo2: Tensor | None, kv_hi2: Tensor | None, kv_length: int, q_block: int, kv_block: int
) -> tuple[Tensor, ...]:
    """The eight tensors of a FlexAttention BlockMask, int32, with R blocks of query rows and C blocks of keys.

    kv_num_blocks (B, 1, R), kv_indices (B, 1, R, C), the same of full blocks, then q_num_blocks (B, 1, C), q_indices
    (B, 1, C, R) and the same of full blocks. A block is full where all of its rows see all of its keys and it does not
    reach beyond the mask, else partial where some row sees some key.
    """
    seen = _seen(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length)
    samples, rows, keys = seen.shape
    padded = torch.nn.functional.pad(seen, (0, -keys % kv_block, 0, -rows % q_block))
    blocks = padded.view(samples, 1, -(-rows // q_block), q_block, -(-keys // kv_block), kv_block)
    full = blocks.all(5).all(3)
    partial = blocks.any(5).any(3) & ~full
    made = []
    for kind in (partial, full, partial.transpose(-2, -1), full.transpose(-2, -1)):
        made += _ordered(kind)
    return tuple(made)


def segments(kv_lo: Tensor, kv_hi: Tensor, kv_lo2: Tensor | None, kv_hi2: Tensor | None, kv_length: int) -> Tensor:
    """``(n, 7)`` int64 on the CPU: sample, first row, row after the last, first key, key after the last, class, window.

    The finest cut of each sample's rows such that no row before a cut sees a key at or behind the first key that a row
    behind it sees; neighbouring segments that see nothing are one. Classes, with the last row seeing the last key:
    CAUSAL (every row one key more than the row before, all from the first), WINDOWED (and at most the last `window` of
    them), FULL (every row all keys), WINDOWED_FULL (as many rows as keys, ``|q - k| < window``), EMPTY, OTHER.
    """
    return torch.tensor(
        [
            (sample, *segment)
            for sample in range(kv_lo.shape[0])
            for segment in _cut([None if part is None else part[sample].clamp(0, kv_length).tolist() for part in (kv_lo, kv_hi, kv_lo2, kv_hi2)])
        ],
        dtype=torch.int64,
    ).view(-1, 7)


def _cut(parts: list[list[int] | None]) -> list[tuple[int, ...]]:
    firsts, ends, firsts2, ends2 = parts
    rows = []  # the keys of each row: no, one or two intervals in order and apart
    for q in range(len(firsts)):
        pairs = [(firsts[q], ends[q])] + ([] if firsts2 is None else [(firsts2[q], ends2[q])])
        found = sorted(pair for pair in pairs if pair[0] < pair[1])
        if len(found) == 2 and found[1][0] <= found[0][1]:
            found = [(found[0][0], max(found[0][1], found[1][1]))]
        rows.append(found)
    ahead = [2**31] * (len(rows) + 1)  # first key seen by this row or a later one
    for q in range(len(rows) - 1, -1, -1):
        ahead[q] = min([ahead[q + 1], *(lo for lo, _ in rows[q])])
    made, start, reach, nothing = [], 0, 0, True  # nothing: no row since start sees a key
    for q, found in enumerate(rows):
        nothing = nothing and not found
        reach = max([reach, *(hi for _, hi in found)])
        if reach > ahead[q + 1] or (nothing and q + 1 < len(rows) and not rows[q + 1]):
            continue
        made.append((start, q + 1, *_classed(rows[start : q + 1])))
        start, nothing = q + 1, True
    return made


def _classed(rows: list[list[tuple[int, int]]]) -> tuple[int, int, int, int]:
    """(first key, key after the last, class, window) of one segment."""
    if not any(rows):
        return 0, 0, EMPTY_SEGMENT, 0
    begin, end = min(lo for found in rows for lo, _ in found), max(hi for found in rows for _, hi in found)
    if any(len(found) != 1 for found in rows):
        return begin, end, OTHER_SEGMENT, 0
    one = [found[0] for found in rows]
    stop = [end - (len(rows) - 1 - i) for i in range(len(rows))]  # of a causal row
    if all(keys == (begin, stop[i]) for i, keys in enumerate(one)):
        return begin, end, CAUSAL_SEGMENT, 0
    if all(keys == (begin, end) for keys in one):
        return begin, end, FULL_SEGMENT, 0
    window = max(hi - lo for lo, hi in one)
    if all(keys == (max(begin, stop[i] - window), stop[i]) for i, keys in enumerate(one)):
        return begin, end, WINDOWED_SEGMENT, window
    reach = one[0][1] - begin
    if len(rows) == end - begin and all(keys == (max(begin, begin + i + 1 - reach), min(end, begin + i + reach)) for i, keys in enumerate(one)):
        return begin, end, WINDOWED_FULL_SEGMENT, reach
    return begin, end, OTHER_SEGMENT, 0
