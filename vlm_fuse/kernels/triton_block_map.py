"""Which blocks of query rows and keys a mask touches and which it covers whole, as the lists of a BlockMask.

Launches: 2. First the class of every block, a byte each, from the rows' bounds alone; then all lists. No element of the mask
is visited.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_dense import bound_of
from .triton_launch import INTERPRETED, LANES, on_device_of
from .triton_scan import divide

# blocks of keys and rows looked at at once: of rows one a lane, so that each is read once; entries of a list looked at at once
_COLUMNS, _ROWS = (8, 4) if INTERPRETED.value else (32, 4 * LANES)
_ENTRIES = 8 if INTERPRETED.value else 256

_PARTIAL, _FULL = tl.constexpr(1), tl.constexpr(2)

_VARYING = ["rows", "width", "q_block", "kv_block", "lines", "columns", "tiles", "row_lists"]
# bounds may be slices of larger tensors
_PARTS = ["kv_lo", "kv_hi", "kv_lo2", "kv_hi2"]


@triton.jit
def _keys(lo, hi, row, width):
    """(begin, end) of the intervals of rows, (0, 0) where it is empty: it then touches nothing."""
    begin, end = bound_of(lo, row, width), bound_of(hi, row, width)
    return tl.where(begin < end, begin, 0), tl.where(begin < end, end, 0)


@triton.jit
def _counted(kind):
    """1 for a partial block, 2**16 for a full one."""
    return (kind == _PARTIAL).to(tl.int32) + ((kind == _FULL).to(tl.int32) << 16)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_PARTS)
def classes_kernel(
    classes, kv_lo, kv_hi, kv_lo2, kv_hi2, rows, width, q_block, kv_block, row_lists, lines, columns, tiles,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program owns the classes of COLUMNS blocks of keys for one block of query rows.

    They are written twice, by rows and behind all of those by keys, so that every list is read along its entries.
    """
    program = tl.program_id(0)
    line = divide(program, tiles)
    column = (program.to(tl.int64) - line * tiles) * COLUMNS + tl.arange(0, COLUMNS)
    sample = divide(line, lines)
    low = (line - sample * lines) * q_block
    high = tl.minimum(low + q_block, rows)
    # a block beyond the last key is read as one without keys
    begin = tl.minimum(column * kv_block, width)
    end = tl.minimum(begin + kv_block, width)
    is_whole = (begin + kv_block <= width) & (low + q_block <= rows)
    begin, end = begin.to(tl.int32)[None, :], end.to(tl.int32)[None, :]
    touched = tl.zeros((COLUMNS,), tl.int32)
    covered = touched + 1
    at = low
    while at < high:
        # beyond the last row that one again: it changes nothing
        row = sample * rows + tl.minimum(at + tl.arange(0, ROWS), high - 1)
        lo, hi = _keys(kv_lo, kv_hi, row, width)
        if kv_lo2 is not None:
            lo2, hi2 = _keys(kv_lo2, kv_hi2, row, width)
            # two that meet are one: a block may be covered by both of them together
            meet = (lo <= hi2) & (lo2 <= hi) & (lo < hi) & (lo2 < hi2)
            lo, lo2 = tl.where(meet, tl.minimum(lo, lo2), lo)[:, None], tl.where(meet, 0, lo2)[:, None]
            hi, hi2 = tl.where(meet, tl.maximum(hi, hi2), hi)[:, None], tl.where(meet, 0, hi2)[:, None]
            touches = ((lo < end) & (hi > begin)) | ((lo2 < end) & (hi2 > begin))
            covers = ((lo <= begin) & (hi >= end)) | ((lo2 <= begin) & (hi2 >= end))
        else:
            lo, hi = lo[:, None], hi[:, None]
            touches = (lo < end) & (hi > begin)
            covers = (lo <= begin) & (hi >= end)
        touched = tl.maximum(touched, tl.max(touches.to(tl.int32), 0))
        covered = tl.minimum(covered, tl.min(covers.to(tl.int32), 0))
        at += ROWS
    kind = tl.where(is_whole & (covered > 0), _FULL, touched).to(tl.uint8)
    tl.store(classes + line * columns + column, kind, mask=column < columns)
    across = classes + row_lists.to(tl.int64) * columns
    tl.store(across + (sample * columns + column) * lines + (line - sample * lines), kind, mask=column < columns)
    # written once: tiles part the blocks of keys of a line, and a line has one block of query rows


@triton.jit(do_not_specialize=_VARYING)
def lists_kernel(
    classes, kv_count, kv_indices, full_kv_count, full_kv_indices, q_count, q_indices, full_q_count, full_q_indices,
    row_lists, lines, columns, ENTRIES: tl.constexpr,
):  # fmt: skip
    """A program owns both lists of one block of query rows, a program behind those both lists of one block of keys."""
    number = tl.program_id(0).to(tl.int64)
    length = columns
    if number >= row_lists:
        classes += row_lists.to(tl.int64) * columns
        number -= row_lists
        length = lines
        kv_count, kv_indices, full_kv_count, full_kv_indices = q_count, q_indices, full_q_count, full_q_indices
    classes += number * length
    # both counts in one number: neither reaches 2**16 within ENTRIES
    partial = tl.zeros((), tl.int32)
    full = tl.zeros((), tl.int32)
    at = tl.zeros((), tl.int32)
    while at < length:
        entry = at + tl.arange(0, ENTRIES)
        found = tl.sum(_counted(tl.load(classes + entry, mask=entry < length, other=0)), 0)
        partial += found & 0xFFFF
        full += found >> 16
        at += ENTRIES
    tl.store(kv_count + number, partial)
    tl.store(full_kv_count + number, full)
    kv_indices += number * length
    full_kv_indices += number * length
    partial_before = tl.zeros((), tl.int32)
    full_before = tl.zeros((), tl.int32)
    at = tl.zeros((), tl.int32)
    while at < length:
        entry = at + tl.arange(0, ENTRIES)
        here = entry < length
        kind = tl.load(classes + entry, mask=here, other=0)
        one = _counted(kind)
        before = tl.cumsum(one, 0) - one
        # chosen ones go in order from the front, the others in order behind them
        rank = partial_before + (before & 0xFFFF)
        tl.store(kv_indices + tl.where(kind == _PARTIAL, rank, partial + entry - rank), entry, mask=here)
        rank = full_before + (before >> 16)
        tl.store(full_kv_indices + tl.where(kind == _FULL, rank, full + entry - rank), entry, mask=here)
        found = tl.sum(one, 0)
        partial_before += found & 0xFFFF
        full_before += found >> 16
        at += ENTRIES
    # written once: programs and pairs of lists are one to one, and an entry's place is its rank among the chosen or the others


def block_map(
    kv_lo: Tensor, kv_hi: Tensor, kv_lo2: Tensor | None, kv_hi2: Tensor | None, kv_length: int, q_block: int, kv_block: int
) -> tuple[Tensor, ...]:
    """The eight tensors of a BlockMask, int32: partial and full blocks of keys, then of query rows."""
    samples, rows = kv_lo.shape
    lines, columns = triton.cdiv(rows, q_block), triton.cdiv(kv_length, kv_block)
    parts = [None if bounds is None else bounds.contiguous() for bounds in (kv_lo, kv_hi, kv_lo2, kv_hi2)]
    made = []
    for outer, inner in ((lines, columns), (lines, columns), (columns, lines), (columns, lines)):
        made.append(kv_lo.new_empty(samples, 1, outer, dtype=torch.int32))
        made.append(kv_lo.new_empty(samples, 1, outer, inner, dtype=torch.int32))
    blocks = samples * lines * columns
    classes = kv_lo.new_empty(2 * blocks, dtype=torch.uint8)
    tiles = triton.cdiv(columns, _COLUMNS)
    with on_device_of(kv_lo):
        if blocks:
            classes_kernel[(samples * lines * tiles,)](
                classes, *parts, rows, kv_length, q_block, kv_block, samples * lines, lines, columns, tiles, _COLUMNS, _ROWS, num_warps=4
            )  # fmt: skip
        if samples * (lines + columns):
            lists_kernel[(samples * (lines + columns),)](classes, *made, samples * lines, lines, columns, _ENTRIES, num_warps=1)
    return tuple(made)
