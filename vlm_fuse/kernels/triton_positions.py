"""M-RoPE positions: a scan along the tokens of each row, with the size of every image looked up in its grid.

Launches: 4. Placeholders of each block of tokens, and where grids begin; what a block adds to a position; the positions; the
deltas and, with a status, the report. A block never reaches over the end of its row. A position is the sum of what the
tokens before it in its document add (1 for text, the larger side of an image for its last placeholder), and the offset in
its image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batch import BAD_GRID, DOCUMENT_RETURNS, GRID_CUT, GRID_UNUSED, NO_GRID, RAISE, UNKNOWN_TYPE, RecordedError
from .triton_launch import INTERPRETED, SCAN, on_device_of
from .triton_numbers import convert, to_float32
from .triton_scan import divide, last_kept_before, running_max

_BLOCK = 16 if INTERPRETED.value else 512
_SPAN = 16 if INTERPRETED.value else 512  # blocks, grids or runs looked at at once
_RUNS = 16 if INTERPRETED.value else 32  # runs that are compared with as many

_MOST = tl.constexpr(2**31)  # a grid never needs more placeholders than there are tokens
_NEVER = tl.constexpr(2**62)
_BAD, _NONE, _CUT, _UNUSED, _UNKNOWN, _RETURNS = (
    tl.constexpr(code) for code in (BAD_GRID, NO_GRID, GRID_CUT, GRID_UNUSED, UNKNOWN_TYPE, DOCUMENT_RETURNS)
)

# fields of a block's summary, one int64 each: placeholders of both kinds, ...
_IMAGES, _VIDEOS = tl.constexpr(0), tl.constexpr(1)
# what it adds, and what it has added where its last document begins (-1: none does); the same of kept tokens; documents
_ADDED, _ADDED_BEFORE, _KEPT, _KEPT_BEFORE, _LAST_KEPT = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
_STARTS, _FALLS, _HIGHEST = tl.constexpr(7), tl.constexpr(8), tl.constexpr(9)
# its first error: token, code, kind, and three numbers
_TOKEN, _CODE, _KIND, _HAVE, _WANT, _EXTRA = (tl.constexpr(field) for field in range(10, 16))
_FIELDS = 16

_VARYING = ["samples", "length", "row_blocks", "blocks", "images", "videos", "merge", "interval", "image_steps", "video_steps"]


@triton.jit
def _valid(t, h, w, merge):
    """Whether a grid can be: sizes of at least 1 that fit, sides that the merge divides."""
    sized = (t > 0) & (t < _MOST) & (h > 0) & (h < _MOST) & (w > 0) & (w < _MOST)
    h = tl.where(sized, h, 0)
    w = tl.where(sized, w, 0)
    return sized & (h - divide(h, merge) * merge == 0) & (w - divide(w, merge) * merge == 0)


@triton.jit
def _capped(a, b):
    return tl.minimum(a * b, _MOST)


@triton.jit
def _grid_ends(grids, ends, info, count, merge, KIND: tl.constexpr, SPLIT: tl.constexpr, SPAN: tl.constexpr):
    """Where the placeholders of each grid end, over the batch; info: (total, first bad grid) of a kind."""
    total = tl.zeros((), tl.int64)
    bad = tl.full((), _NEVER, tl.int64)
    at = tl.zeros((), tl.int64)
    if grids is not None:
        while at < count:
            row = at + tl.arange(0, SPAN)
            here = row < count
            t = tl.load(grids + row * 3, mask=here, other=1)
            h = tl.load(grids + row * 3 + 1, mask=here, other=0)
            w = tl.load(grids + row * 3 + 2, mask=here, other=0)
            valid = here & _valid(t, h, w, merge)
            bad = tl.minimum(bad, tl.min(tl.where(here & (valid == 0), row, _NEVER), 0))
            h = divide(tl.where(valid, h, 0), merge)
            w = divide(tl.where(valid, w, 0), merge)
            t = tl.where(valid, t, 0)
            if SPLIT:
                size = _capped(t, _capped(h, w))
            else:
                size = _capped(_capped(t, h), w)
            tl.store(ends + row, total + tl.cumsum(size, 0), mask=here)
            total += tl.sum(size, 0)
            at += SPAN
    tl.store(info + 2 * KIND, total)
    tl.store(info + 2 * KIND + 1, bad)


@triton.jit
def _sum(summary, field, blocks, first, last, SPAN: tl.constexpr):
    """Of a field over the blocks first .. last - 1."""
    total = tl.zeros((), tl.int64)
    at = tl.zeros((), tl.int64) + first
    while at < last:
        number = at + tl.arange(0, SPAN)
        total += tl.sum(tl.load(summary + field * blocks + number, mask=number < last, other=0), 0)
        at += SPAN
    return total


@triton.jit
def _largest(summary, field, blocks, first, last, SPAN: tl.constexpr):
    found = tl.full((), -1, tl.int64)
    at = tl.zeros((), tl.int64) + first
    while at < last:
        number = at + tl.arange(0, SPAN)
        found = tl.maximum(found, tl.max(tl.load(summary + field * blocks + number, mask=number < last, other=-1), 0))
        at += SPAN
    return found


@triton.jit(do_not_specialize=_VARYING)
def count_kernel(
    types, image_grid, video_grid, image_ends, video_ends, info, summary, length, row_blocks, blocks, images, videos, merge,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A program owns the placeholders of one block; the two behind them where the grids of a kind begin and end."""
    block = tl.program_id(0).to(tl.int64)
    if block < blocks:
        sample = divide(block, row_blocks)
        column = (block - sample * row_blocks) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(types + sample * length + column, mask=column < length, other=0)
        tl.store(summary + _IMAGES * blocks + block, tl.sum((value == 1).to(tl.int64), 0))
        tl.store(summary + _VIDEOS * blocks + block, tl.sum((value == 2).to(tl.int64), 0))
    elif block == blocks:
        _grid_ends(image_grid, image_ends, info, images, merge, 0, False, SPAN)
    else:
        _grid_ends(video_grid, video_ends, info, videos, merge, 1, SPLIT, SPAN)
    # written once: blocks tile the tokens, each kind has one program


@triton.jit
def _place(grids, ends, count, steps, ordinal, of_kind, merge, SPLIT: tl.constexpr):
    """(has a grid, its row, placeholder in its image or frame, how many that has, frame, line, column, larger side)."""
    zero = ordinal * 0
    known = of_kind & (zero > 0)
    row, offset, part, i, j, k, side = zero, zero, zero + 1, zero, zero, zero, zero
    if grids is not None:
        low = zero
        high = zero + count
        step = tl.zeros((), tl.int32)
        while step < steps:
            middle = (low + high) >> 1
            open_ = of_kind & (low < high)
            above = tl.load(ends + middle, mask=open_, other=0) > ordinal
            low, high = tl.where(open_ & (above == 0), middle + 1, low), tl.where(open_ & above, middle, high)
            step += 1
        known = of_kind & (low < count)
        row = tl.where(known, low, 0)
        first = tl.load(ends + row - 1, mask=known & (row > 0), other=0)
        t = tl.load(grids + row * 3, mask=known, other=1)
        h = divide(tl.load(grids + row * 3 + 1, mask=known, other=0), merge)
        w = divide(tl.load(grids + row * 3 + 2, mask=known, other=0), merge)
        w_ = tl.maximum(w, 1)
        plane = tl.maximum(_capped(h, w), 1)
        offset = tl.where(known, ordinal - first, 0)
        if SPLIT:
            part = plane
            offset = offset - divide(offset, part) * part
        else:
            part = tl.maximum(_capped(_capped(t, h), w), 1)
        i = divide(offset, plane)
        rest = offset - i * plane
        j = divide(rest, w_)
        k = rest - j * w_
        side = tl.maximum(h, w)
    return known, row, offset, part, i, j, k, side


@triton.jit
def _time(intervals, interval, frame, row, known):
    """Where a frame of a video stands: multiplied in the type of the intervals, cut off."""
    if intervals is None:
        time = frame * interval
    else:
        by = tl.load(intervals + row, mask=known, other=0)
        if by.dtype == tl.int64:
            time = frame * by
        else:
            if by.dtype == tl.float64:
                product = frame.to(tl.float64) * by
            else:
                product = to_float32(convert(frame.to(tl.float32), by.dtype)) * to_float32(by)
                product = to_float32(convert(product, by.dtype))
            # what no position can be is 0
            time = tl.where((product > -9e18) & (product < 9e18), product, 0).to(tl.int64)
    return time


@triton.jit
def _tokens(
    types, attention_mask, document_ids, image_grid, video_grid, image_ends, video_ends, summary,
    length, row_blocks, blocks, block, images, videos, merge, image_steps, video_steps,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """What is known of a block's tokens alone: (column, flat token, inside, type, kept, given id, place)."""
    sample = divide(block, row_blocks)
    column = (block - sample * row_blocks) * BLOCK + tl.arange(0, BLOCK)
    here = column < length
    token = sample * length + column
    value = tl.load(types + token, mask=here, other=0).to(tl.int64)
    kept = here
    given = token * 0
    if attention_mask is not None:
        kept = kept & (tl.load(attention_mask + token, mask=here, other=0) != 0)
    if document_ids is not None:
        given = tl.maximum(tl.load(document_ids + token, mask=here, other=-1).to(tl.int64), -1)
        kept = kept & (given >= 0)
    image = here & (value == 1)
    video = here & (value == 2)
    ordinal = tl.cumsum(image.to(tl.int32), 0).to(tl.int64) - 1 + _sum(summary, _IMAGES, blocks, 0, block, SPAN)
    known1, row1, offset1, part1, i1, j1, k1, side1 = _place(image_grid, image_ends, images, image_steps, ordinal, image, merge, False)
    ordinal = tl.cumsum(video.to(tl.int32), 0).to(tl.int64) - 1 + _sum(summary, _VIDEOS, blocks, 0, block, SPAN)
    known2, row2, offset2, part2, i2, j2, k2, side2 = _place(video_grid, video_ends, videos, video_steps, ordinal, video, merge, SPLIT)
    known = known1 | known2
    row = tl.where(video, row2, row1)
    offset = tl.where(video, offset2, offset1)
    part = tl.where(video, part2, part1)
    i = tl.where(video, i2, i1)
    j = tl.where(video, j2, j1)
    k = tl.where(video, k2, k1)
    side = tl.where(video, side2, side1)
    added = tl.where(kept, tl.where(known, tl.where(offset + 1 == part, side, 0), 1), 0)
    return column, token, here, value, kept, given, known, row, offset, part, i, j, k, added


@triton.jit
def _begins(attention_mask, document_ids, token, here, kept, given, low, row_begin, BLOCK: tl.constexpr):
    """(whether a document begins at a token, whether its id falls): the kept token before has another id, or there is none."""
    behind = token - 1
    kept_behind = here & (behind >= low)
    if attention_mask is not None:
        kept_behind = kept_behind & (tl.load(attention_mask + behind, mask=kept_behind, other=0) != 0)
    kept_behind = kept_behind & (tl.load(document_ids + behind, mask=kept_behind, other=-1) >= 0)
    previous = running_max(tl.where(kept_behind, behind, -1))
    if tl.max(kept.to(tl.int32), 0) > 0:
        previous = tl.maximum(previous, last_kept_before(attention_mask, document_ids, low, row_begin, BLOCK))
    joined = kept & (previous >= row_begin)
    other = tl.load(document_ids + previous, mask=joined, other=-1).to(tl.int64)
    return kept & ((joined & (other == given)) == 0), joined & (given < other)


@triton.jit(do_not_specialize=_VARYING)
def sums_kernel(
    types, attention_mask, document_ids, image_grid, video_grid, image_ends, video_ends, summary,
    length, row_blocks, blocks, images, videos, merge, image_steps, video_steps,
    SPLIT: tl.constexpr, CHECK: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A program owns the rest of one block's summary."""
    block = tl.program_id(0).to(tl.int64)
    column, token, here, value, kept, given, known, row, offset, part, _, _, _, added = _tokens(
        types, attention_mask, document_ids, image_grid, video_grid, image_ends, video_ends, summary,
        length, row_blocks, blocks, block, images, videos, merge, image_steps, video_steps, SPLIT, BLOCK, SPAN,
    )  # fmt: skip
    sample = divide(block, row_blocks)
    row_begin = sample * length
    low = row_begin + (block - sample * row_blocks) * BLOCK
    mine = summary + block
    tl.store(mine + _ADDED * blocks, tl.sum(added, 0))
    tl.store(mine + _KEPT * blocks, tl.sum(kept.to(tl.int64), 0))
    tl.store(mine + _LAST_KEPT * blocks, tl.max(tl.where(kept, column, -1), 0))
    if document_ids is not None:
        begins, falls = _begins(attention_mask, document_ids, token, here, kept, given, low, row_begin, BLOCK)
        one = kept.to(tl.int64)
        tl.store(mine + _ADDED_BEFORE * blocks, tl.max(tl.where(begins, tl.cumsum(added, 0) - added, -1), 0))
        tl.store(mine + _KEPT_BEFORE * blocks, tl.max(tl.where(begins, tl.cumsum(one, 0) - one, -1), 0))
        tl.store(mine + _STARTS * blocks, tl.sum(begins.to(tl.int64), 0))
        tl.store(mine + _FALLS * blocks, tl.sum((begins & falls).to(tl.int64), 0))
    if CHECK:
        vision = here & ((value == 1) | (value == 2))
        unknown = kept & (value != 0) & (vision == 0)
        none = vision & (known == 0)
        joined = vision & (column + 1 < length)
        joined = joined & (tl.load(types + token + 1, mask=joined, other=0).to(tl.int64) == value)
        if attention_mask is not None:
            masked = tl.load(attention_mask + token, mask=joined, other=0) != 0
            joined = joined & ((tl.load(attention_mask + token + 1, mask=joined, other=0) != 0) == masked)
        if document_ids is not None:
            joined = joined & (tl.maximum(tl.load(document_ids + token + 1, mask=joined, other=-1).to(tl.int64), -1) == given)
        cut = known & (offset + 1 < part) & (joined == 0)
        first = tl.min(tl.where(unknown | none | cut, token, _NEVER), 0)
        tl.store(mine + _TOKEN * blocks, first)
        lane = token == first
        code = tl.where(unknown, _UNKNOWN, tl.where(none, _NONE, _CUT)).to(tl.int64)
        tl.store(mine + _CODE * blocks, tl.sum(tl.where(lane, code, 0), 0))
        tl.store(mine + _KIND * blocks, tl.sum(tl.where(lane & (value == 2), 1, 0).to(tl.int64), 0))
        tl.store(mine + _HAVE * blocks, tl.sum(tl.where(lane, tl.where(unknown, column, offset + 1), 0), 0))
        tl.store(mine + _WANT * blocks, tl.sum(tl.where(lane & cut, part, 0), 0))
        tl.store(mine + _EXTRA * blocks, tl.sum(tl.where(lane, tl.where(unknown, value, row), 0), 0))
    # written once: a block has one program


@triton.jit(do_not_specialize=_VARYING)
def positions_kernel(
    types, attention_mask, document_ids, image_grid, video_grid, intervals, image_ends, video_ends, summary, run_token, positions,
    samples, length, row_blocks, blocks, images, videos, merge, interval, image_steps, video_steps,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A program owns the positions of one block's tokens, and where its documents begin."""
    block = tl.program_id(0).to(tl.int64)
    column, token, here, value, kept, given, known, row, _, _, i, j, k, added = _tokens(
        types, attention_mask, document_ids, image_grid, video_grid, image_ends, video_ends, summary,
        length, row_blocks, blocks, block, images, videos, merge, image_steps, video_steps, SPLIT, BLOCK, SPAN,
    )  # fmt: skip
    sample = divide(block, row_blocks)
    row_begin = sample * length
    low = row_begin + (block - sample * row_blocks) * BLOCK
    first_block = sample * row_blocks
    plane = (tl.zeros((), tl.int64) + samples) * length
    out = positions + token
    newest = tl.zeros((), tl.int64) + low
    if document_ids is None:
        at = _sum(summary, _ADDED, blocks, first_block, block, SPAN) + tl.cumsum(added, 0) - added
        rest = column * 0
    else:
        begins, _ = _begins(attention_mask, document_ids, token, here, kept, given, low, row_begin, BLOCK)
        # what the blocks of the row before have added, all of them and before their last document
        added_before = tl.zeros((), tl.int64)
        kept_before = tl.zeros((), tl.int64)
        added_at_start = tl.full((), -1, tl.int64)
        kept_at_start = tl.full((), -1, tl.int64)
        number = first_block
        while number < block:
            other = number + tl.arange(0, SPAN)
            there = other < block
            sums = tl.load(summary + _ADDED * blocks + other, mask=there, other=0)
            starts = tl.load(summary + _ADDED_BEFORE * blocks + other, mask=there, other=-1)
            before = added_before + tl.cumsum(sums, 0) - sums
            added_at_start = tl.maximum(added_at_start, tl.max(tl.where(starts >= 0, before + starts, -1), 0))
            added_before += tl.sum(sums, 0)
            sums = tl.load(summary + _KEPT * blocks + other, mask=there, other=0)
            starts = tl.load(summary + _KEPT_BEFORE * blocks + other, mask=there, other=-1)
            before = kept_before + tl.cumsum(sums, 0) - sums
            kept_at_start = tl.maximum(kept_at_start, tl.max(tl.where(starts >= 0, before + starts, -1), 0))
            kept_before += tl.sum(sums, 0)
            number += SPAN
        at = added_before + tl.cumsum(added, 0) - added
        at = at - tl.maximum(added_at_start, running_max(tl.where(begins, at, -1)))
        one = kept.to(tl.int64)
        count = kept_before + tl.cumsum(one, 0) - one
        count = count - tl.maximum(kept_at_start, running_max(tl.where(begins, count, -1)))
        last_kept = _largest(summary, _LAST_KEPT, blocks, first_block, first_block + row_blocks, SPAN)
        rest = tl.where(column > last_kept, column - last_kept - 1, 0)
        tl.store(out, tl.where(kept, count, rest), mask=here)
        out += plane
        newest = tl.max(tl.where(begins, token, low), 0)
        if run_token is not None:
            run = _sum(summary, _STARTS, blocks, 0, block, SPAN) + tl.cumsum(begins.to(tl.int64), 0) - 1
            tl.store(run_token + run, token.to(tl.int32), mask=begins)
    time = at + tl.where(known, tl.where(value == 2, _time(intervals, interval, i, row, known & (value == 2)), i), 0)
    line = at + tl.where(known, j, 0)
    place = at + tl.where(known, k, 0)
    tl.store(out, tl.where(kept, time, rest), mask=here)
    tl.store(out + plane, tl.where(kept, line, rest), mask=here)
    tl.store(out + 2 * plane, tl.where(kept, place, rest), mask=here)
    highest = tl.maximum(time, tl.maximum(line, place))
    tl.store(summary + _HIGHEST * blocks + block, tl.max(tl.where(kept & (token >= newest), highest, -1), 0))
    # written once: blocks tile the tokens, and a token begins one document at most


@triton.jit
def _write(status, code, sample, kind, placeholders, rows, total_placeholders, total_rows, extra):
    tl.store(status, tl.zeros((), tl.int64) + code)
    tl.store(status + 1, tl.zeros((), tl.int64) + sample)
    tl.store(status + 2, tl.zeros((), tl.int64) + kind)
    tl.store(status + 3, tl.zeros((), tl.int64) + placeholders)
    tl.store(status + 4, tl.zeros((), tl.int64) + rows)
    tl.store(status + 5, tl.zeros((), tl.int64) + total_placeholders)
    tl.store(status + 6, tl.zeros((), tl.int64) + total_rows)
    tl.store(status + 7, tl.zeros((), tl.int64) + extra)


@triton.jit
def _returning(document_ids, run_token, runs, length, BLOCK: tl.constexpr):
    """The first token at which a document id returns in its row."""
    found = tl.full((), _NEVER, tl.int64)
    at = tl.zeros((), tl.int64)
    while at < runs:
        run = at + tl.arange(0, BLOCK)
        here = run < runs
        token = tl.load(run_token + run, mask=here, other=0).to(tl.int64)
        sample = tl.where(here, divide(token, length), -1)
        given = tl.load(document_ids + token, mask=here, other=-1)
        first_sample = tl.min(tl.where(here, sample, 2**31 - 1), 0)
        earlier = tl.zeros((), tl.int64)
        while earlier <= at:
            # other rows cannot have it
            last = divide(tl.load(run_token + tl.minimum(earlier + BLOCK, runs) - 1), length)
            if last >= first_sample:
                before = earlier + tl.arange(0, BLOCK)
                there = before < runs
                token_before = tl.load(run_token + before, mask=there, other=0).to(tl.int64)
                sample_before = tl.where(there, divide(token_before, length), -2)
                given_before = tl.load(document_ids + token_before, mask=there, other=-2)
                same = (given[:, None] == given_before[None, :]) & (sample[:, None] == sample_before[None, :])
                hit = tl.max((same & (before[None, :] < run[:, None])).to(tl.int32), 1) > 0
                found = tl.minimum(found, tl.min(tl.where(hit, token, _NEVER), 0))
            earlier += BLOCK
        at = tl.where(found < _NEVER, runs, at + BLOCK)
    return found


@triton.jit
def _report_bad(grids, info, status, merge, KIND: tl.constexpr):
    if grids is not None:
        bad = tl.load(info + 2 * KIND + 1)
        if (bad < _NEVER) & (tl.load(status) == 0):
            thw = grids + bad * 3
            _write(status, _BAD, 0, KIND, tl.load(thw), tl.load(thw + 1), tl.load(thw + 2), merge, bad)


@triton.jit
def _report_unused(ends, info, status, placeholders, count, KIND: tl.constexpr, SPAN: tl.constexpr):
    total = tl.load(info + 2 * KIND)
    if (placeholders < total) & (tl.load(status) == 0):
        row = tl.zeros((), tl.int64)
        at = tl.zeros((), tl.int64)
        while at < count:
            number = at + tl.arange(0, SPAN)
            row += tl.sum((tl.load(ends + number, mask=number < count, other=_NEVER) <= placeholders).to(tl.int64), 0)
            at += SPAN
        _write(status, _UNUSED, -1, KIND, placeholders, total, placeholders, total, row)


@triton.jit(do_not_specialize=_VARYING)
def finish_kernel(
    document_ids, image_grid, video_grid, image_ends, video_ends, info, summary, run_token, deltas, status,
    samples, length, row_blocks, blocks, images, videos, merge,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """A program owns the delta of one sample; the one behind them the status."""
    sample = tl.program_id(0).to(tl.int64)
    if sample < samples:
        first = sample * row_blocks
        last = first + row_blocks
        kept = tl.zeros((), tl.int64)
        kept_at_start = tl.zeros((), tl.int64)
        newest = first
        number = first
        while number < last:
            other = number + tl.arange(0, SPAN)
            there = other < last
            sums = tl.load(summary + _KEPT * blocks + other, mask=there, other=0)
            if document_ids is not None:
                starts = tl.load(summary + _KEPT_BEFORE * blocks + other, mask=there, other=-1)
                before = kept + tl.cumsum(sums, 0) - sums
                kept_at_start = tl.maximum(kept_at_start, tl.max(tl.where(starts >= 0, before + starts, 0), 0))
                newest = tl.maximum(newest, tl.max(tl.where(starts >= 0, other, 0), 0))
            kept += tl.sum(sums, 0)
            number += SPAN
        highest = _largest(summary, _HIGHEST, blocks, newest, last, SPAN)
        tl.store(deltas + sample, highest + 1 - (kept - kept_at_start))
    elif status is not None:
        image_placeholders = _sum(summary, _IMAGES, blocks, 0, blocks, SPAN)
        video_placeholders = _sum(summary, _VIDEOS, blocks, 0, blocks, SPAN)
        _report_bad(image_grid, info, status, merge, 0)
        _report_bad(video_grid, info, status, merge, 1)
        token = tl.full((), _NEVER, tl.int64)
        at = tl.zeros((), tl.int64)
        while at < blocks:
            number = at + tl.arange(0, SPAN)
            token = tl.minimum(token, tl.min(tl.load(summary + _TOKEN * blocks + number, mask=number < blocks, other=_NEVER), 0))
            at += SPAN
        returns = tl.full((), _NEVER, tl.int64)
        if document_ids is not None:
            # ids that never fall cannot return: the usual batch costs one sum
            if _sum(summary, _FALLS, blocks, 0, blocks, SPAN) > 0:
                returns = _returning(document_ids, run_token, _sum(summary, _STARTS, blocks, 0, blocks, SPAN), length, RUNS)
            if (returns <= token) & (returns < _NEVER) & (tl.load(status) == 0):
                _write(status, _RETURNS, divide(returns, length), 0, 0, 0, 0, 0, tl.load(document_ids + returns).to(tl.int64))
        if (token < _NEVER) & (tl.load(status) == 0):
            bad_sample = divide(token, length)
            block = bad_sample * row_blocks + (token - bad_sample * length) // BLOCK
            mine = summary + block
            code = tl.load(mine + _CODE * blocks)
            kind = tl.load(mine + _KIND * blocks)
            have = tl.load(mine + _HAVE * blocks)
            want = tl.load(mine + _WANT * blocks)
            extra = tl.load(mine + _EXTRA * blocks)
            total = tl.load(info + 2 * kind)
            placeholders = tl.where(kind == 0, image_placeholders, video_placeholders)
            if code == _NONE:
                first = bad_sample * row_blocks
                have = _sum(summary, kind, blocks, first, first + row_blocks, SPAN)
                want = tl.maximum(total - _sum(summary, kind, blocks, 0, first, SPAN), 0)
                extra = tl.where(kind == 0, images, videos).to(tl.int64)
            if code == _UNKNOWN:
                placeholders = placeholders * 0
                total = total * 0
            _write(status, code, bad_sample, kind, have, want, placeholders, total, extra)
        _report_unused(image_ends, info, status, image_placeholders, images, 0, SPAN)
        _report_unused(video_ends, info, status, video_placeholders, videos, 1, SPAN)
    # written once: a sample has one program, the status has one


def _bytes(tensor: Tensor | None) -> Tensor | None:
    return tensor.view(torch.uint8) if tensor is not None and tensor.dtype == torch.bool else tensor


def mrope_position_ids(
    types: Tensor, image_grid: Tensor | None, video_grid: Tensor | None, intervals: Tensor | None, attention_mask: Tensor | None,
    document_ids: Tensor | None, merge: int, interval: int, split: bool, status,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(position_ids, rope_deltas)``: int64 (3, B, L), or (4, B, L) with document_ids, and (B, 1)."""
    samples, length = types.shape
    device = types.device
    positions = torch.empty((3 if document_ids is None else 4, samples, length), dtype=torch.int64, device=device)
    deltas = torch.empty((samples, 1), dtype=torch.int64, device=device)
    row_blocks = max(triton.cdiv(length, _BLOCK), 1)
    blocks = samples * row_blocks
    images, videos = (0 if grid is None else grid.shape[0] for grid in (image_grid, video_grid))
    image_grid, video_grid = (grid if count else None for grid, count in ((image_grid, images), (video_grid, videos)))
    intervals = intervals if videos else None
    image_ends, video_ends = (torch.empty(max(count, 1), dtype=torch.int64, device=device) for count in (images, videos))
    info = torch.empty(4, dtype=torch.int64, device=device)
    summary = torch.empty(_FIELDS * blocks, dtype=torch.int64, device=device)
    check = status is not None
    run_token = torch.empty(max(types.numel(), 1), dtype=torch.int32, device=device) if check and document_ids is not None else None
    found = torch.zeros(8, dtype=torch.int64, device=device) if status is RAISE else status
    types, attention_mask = _bytes(types), _bytes(attention_mask)
    sizes = (length, row_blocks, blocks, images, videos, merge)
    steps = (images.bit_length(), videos.bit_length())
    with on_device_of(types):
        count_kernel[(blocks + 2,)](types, image_grid, video_grid, image_ends, video_ends, info, summary, *sizes, split, _BLOCK, _SPAN, **SCAN)
        if blocks:
            sums_kernel[(blocks,)](
                types, attention_mask, document_ids, image_grid, video_grid, image_ends, video_ends, summary, *sizes, *steps,
                split, check, _BLOCK, _SPAN, **SCAN,
            )  # fmt: skip
            positions_kernel[(blocks,)](
                types, attention_mask, document_ids, image_grid, video_grid, intervals, image_ends, video_ends, summary, run_token, positions,
                samples, *sizes, interval, *steps, split, _BLOCK, _SPAN, **SCAN,
            )  # fmt: skip
        if samples or check:
            finish_kernel[(samples + check,)](
                document_ids, image_grid, video_grid, image_ends, video_ends, info, summary, run_token, deltas, found,
                samples, *sizes, _BLOCK, _SPAN, _RUNS, **SCAN,
            )  # fmt: skip
        if status is RAISE:
            record = tuple(found.tolist())
            if record[0]:
                raise RecordedError(record)
    return positions, deltas
