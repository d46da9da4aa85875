"""A mask written out, an element or a bit for every pair of query row and key. One launch each.

What is written are units of 16 bytes at multiples of 16, wherever rows begin: a unit belongs to the row in which its first
entry lies, and its end may lie in the next row (in several of them, where a row is shorter than a unit).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import INTERPRETED, on_device_of
from .triton_scan import divide

_UNITS = 4 if INTERPRETED.value else 128  # of a warp, four stores a lane
_ROWS = 4  # of a program, one after another: their bounds lie in one cache line

_VARYING = ["rows", "width", "groups", "tiles"]
# bounds may be slices of larger tensors
_PARTS = ["kv_lo", "kv_hi", "kv_lo2", "kv_hi2"]


@triton.jit
def bound_of(bounds, row, width):
    """A bound of a row or of rows, as the nearest one within the keys."""
    return tl.minimum(tl.maximum(tl.load(bounds + row), 0), width)


@triton.jit
def _clipped(bounds, row, start, width, reach):
    """Where a bound of a row that starts at `start` lies, within 0 .. reach."""
    return tl.minimum(tl.maximum(start + bound_of(bounds, row, width), 0), reach).to(tl.int32)


@triton.jit
def _ones_from(entry, PART: tl.constexpr):
    """A word of PART entries, all bits set from `entry` on."""
    entry = tl.minimum(tl.maximum(entry, 0), PART)
    # in two steps: a shift by all 32 bits is undefined
    bit = entry * (32 // PART)
    half = entry * (32 // PART) // 2
    return (bit * 0 - 1) << half << (bit - half)


@triton.jit
def _within(at, begin, end, PART: tl.constexpr):
    """Whether an entry lies in begin .. end - 1; for a PART of several entries a word with all of their bits set or none."""
    if PART == 1:
        inside = (at >= begin) & (at < end)
    else:
        inside = _ones_from(begin - at, PART) & ~_ones_from(end - at, PART)
    return inside


@triton.jit
def _all(at, seen, PART: tl.constexpr):
    """As `_within`, one answer for all."""
    if PART == 1:
        inside = (at * 0 + seen.to(tl.int32)) == 1
    else:
        inside = at * 0 - seen.to(tl.int32)
    return inside


@triton.jit
def _seen_from(seen, kv_lo, kv_hi, kv_lo2, kv_hi2, row, start, rows, width, reach, at, PART: tl.constexpr):
    """`seen` and what `row`, which starts at `start`, and the rows behind it see before `reach`."""
    while (start < reach) & (row < rows):
        seen |= _within(at, _clipped(kv_lo, row, start, width, reach), _clipped(kv_hi, row, start, width, reach), PART)
        if kv_lo2 is not None:
            seen |= _within(at, _clipped(kv_lo2, row, start, width, reach), _clipped(kv_hi2, row, start, width, reach), PART)
        start += width
        row += 1
    return seen


@triton.jit
def _valued(seen, LOWEST: tl.constexpr, PART: tl.constexpr, dtype: tl.constexpr):
    if PART == 1:
        value = tl.where(seen, 0.0, LOWEST).to(dtype)
    elif PART == 4:
        # True is a byte 1
        value = (seen & 0x01010101).to(dtype)
    else:
        value = seen.to(dtype)
    return value


@triton.jit
def _store_few(
    out, item, count, kv_lo, kv_hi, kv_lo2, kv_hi2, row, start, rows, width,
    LOWEST: tl.constexpr, ITEM: tl.constexpr, ITEMS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """`count` items from `item` on, fewer than a unit; the first of their rows starts at `start`, seen from there."""
    lane = tl.arange(0, ITEMS)
    at = lane * ITEM
    seen = _seen_from(_all(at, count < 0, PART), kv_lo, kv_hi, kv_lo2, kv_hi2, row, start, rows, width, count.to(tl.int32) * ITEM, at, PART)
    tl.store(out + item + lane, _valued(seen, LOWEST, PART, out.dtype.element_ty), mask=lane < count)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_PARTS)
def entries_kernel(
    out, kv_lo, kv_hi, kv_lo2, kv_hi2, rows, width, groups, tiles,
    LOWEST: tl.constexpr, ITEM: tl.constexpr, STEPS: tl.constexpr, PART: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program owns up to UNITS units in each of ROWS rows of a sample; a sample's first program also what fills no unit.

    An item of `out` holds ITEM entries: a byte 8 bits, an element itself. A unit is 2**STEPS entries in parts of PART.
    """
    UNIT: tl.constexpr = 1 << STEPS
    ITEMS: tl.constexpr = UNIT // ITEM
    program = tl.program_id(0)
    line = divide(program, tiles)
    tile = program.to(tl.int64) - line * tiles
    sample = line * 0
    if ITEM > 1:
        sample = divide(line, groups)
    group = line - sample * groups
    # of the sample: its items, the first one's number, and the units that lie within
    entries = rows.to(tl.int64) * width
    items = (entries + (ITEM - 1)) // ITEM
    first = sample * items
    low = (first * ITEM + (UNIT - 1)) >> STEPS
    high = (first + items) * ITEM >> STEPS
    behind = (sample + 1) * rows.to(tl.int64)
    target = out
    if PART > 1:
        target = out.to(tl.pointer_type(tl.int32), bitcast=True)
        out = out.to(tl.pointer_type(tl.int8), bitcast=True)
    unit = tl.arange(0, UNITS)[:, None]
    part = tl.arange(0, UNIT // PART)[None, :]
    at = unit * UNIT + part * PART
    row = group * ROWS
    last = tl.minimum(row + ROWS, rows)
    while row < last:
        start = first * ITEM + row * width
        number = ((start + (UNIT - 1)) >> STEPS) + tile * UNITS
        count = tl.minimum(tl.minimum((start + width + (UNIT - 1)) >> STEPS, high) - number, UNITS).to(tl.int32)
        if count > 0:
            # from here on counted from the first unit's first entry
            start -= number << STEPS
            reach = count * UNIT
            own = sample * rows + row
            begin, end = _clipped(kv_lo, own, start, width, reach), _clipped(kv_hi, own, start, width, reach)
            longest = end - begin
            if kv_lo2 is not None:
                begin2, end2 = _clipped(kv_lo2, own, start, width, reach), _clipped(kv_hi2, own, start, width, reach)
                longest = tl.maximum(longest, end2 - begin2)
            # most tiles of a long row are seen as a whole or not at all
            value = _valued(_all(at, longest == reach, PART), LOWEST, PART, target.dtype.element_ty)
            if (longest < reach) & ((longest > 0) | (start + width < reach)):
                seen = _within(at, begin, end, PART)
                if kv_lo2 is not None:
                    seen |= _within(at, begin2, end2, PART)
                seen = _seen_from(seen, kv_lo, kv_hi, kv_lo2, kv_hi2, own + 1, start + width, behind, width, reach, at, PART)
                value = _valued(seen, LOWEST, PART, target.dtype.element_ty)
            tl.store(target + number * (UNIT // PART) + (unit * (UNIT // PART) + part), value, mask=unit < count)
        row += 1
    if (tile == 0) & (group == 0):
        # before the first unit, and behind the last one
        head = tl.minimum(low * ITEMS - first, items)
        own = sample * rows
        if head > 0:
            _store_few(out, first, head, kv_lo, kv_hi, kv_lo2, kv_hi2, own, own * 0, behind, width, LOWEST, ITEM, ITEMS, PART)
        item = tl.maximum(high * ITEMS - first, head)
        if item < items:
            left = entries - item * ITEM
            above = divide(left + width - 1, width)
            _store_few(
                out, first + item, items - item, kv_lo, kv_hi, kv_lo2, kv_hi2, behind - above, left - above * width, behind, width,
                LOWEST, ITEM, ITEMS, PART,
            )  # fmt: skip
    # written once: a unit has one first entry and that one row, tiles part the units of a row, and what lies in no unit
    # that the sample has for itself is before all of them or behind


def _launch(out: Tensor, parts: tuple, samples: int, rows: int, width: int, lowest: float | None, item: int, steps: int, part: int) -> None:
    parts = [None if bounds is None else bounds.contiguous() for bounds in parts]
    groups, tiles = triton.cdiv(rows, _ROWS), triton.cdiv(triton.cdiv(width, 1 << steps), _UNITS)
    with on_device_of(out):
        entries_kernel[(samples * groups * tiles,)](
            out, *parts, rows, width, groups, tiles, lowest, item, steps, part, _UNITS, _ROWS, num_warps=1
        )  # fmt: skip


def dense(kv_lo: Tensor, kv_hi: Tensor, kv_lo2: Tensor | None, kv_hi2: Tensor | None, kv_length: int, dtype: torch.dtype) -> Tensor:
    """``(B, 1, Q, kv_length)`` bool, or 0 and the lowest number of a floating dtype."""
    samples, rows = kv_lo.shape
    out = kv_lo.new_empty(samples, 1, rows, kv_length, dtype=dtype)
    if out.numel():
        lowest = None if dtype == torch.bool else torch.finfo(dtype).min
        steps = (16 // out.element_size()).bit_length() - 1
        # samples follow each other without a gap: one with all rows
        _launch(out, (kv_lo, kv_hi, kv_lo2, kv_hi2), 1, samples * rows, kv_length, lowest, 1, steps, 4 if lowest is None else 1)
    return out


def bits(kv_lo: Tensor, kv_hi: Tensor, kv_lo2: Tensor | None, kv_hi2: Tensor | None, kv_length: int) -> Tensor:
    """``(B, ceil(Q * kv_length / 8))`` uint8, the first entry lowest."""
    samples, rows = kv_lo.shape
    out = kv_lo.new_empty(samples, (rows * kv_length + 7) // 8, dtype=torch.uint8)
    if out.numel():
        _launch(out, (kv_lo, kv_hi, kv_lo2, kv_hi2), samples, rows, kv_length, None, 8, 7, 32)
    return out
