"""The mask's intervals: for every row the one or two runs of keys that it sees, from document and image ids alone.

Launches: 2 (summaries of blocks of rows, then the rows). 3 where a row may need two intervals (holes, sinks, prefixes) or
has a parent: its intervals are then cut by what other rows know. With a status one more that reports, where a row could
need too many. Rows are numbered flat over (G, W) inside the kernels; an interval never leaves its output row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batch import RAISE, TOO_MANY_INTERVALS, RecordedError
from .triton_launch import INTERPRETED, SCAN, on_device_of
from .triton_scan import divide, last_kept_before, running_max

_BLOCK = 16 if INTERPRETED.value else 512
_SPAN = 16 if INTERPRETED.value else 1024  # summaries looked at at once
_TOO_MANY = tl.constexpr(TOO_MANY_INTERVALS)

# a field of the summaries: one int32 a block of rows
_LAST_START, _FIRST_START, _LAST_KEPT, _FIRST_KEPT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_RUNS, _LAST_RUN, _FIRST_BREAK = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6)
_LAST_IMAGE, _FIRST_IMAGE_BREAK = tl.constexpr(7), tl.constexpr(8)
_FIELDS = 9

# per-row arrays for the third launch
_START, _STOP, _NEXT_KEPT, _PREVIOUS_KEPT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_RUN, _RUN_START, _RUN_STOP, _IMAGE_START, _IMAGE_STOP = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)

_VARYING = ["count", "width", "blocks", "window", "sinks", "chunk_size", "prefix", "prefixes", "parents"]


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _next(values):
    return tl.associative_scan(values, 0, _smaller, reverse=True)


@triton.jit
def _most_before(summary, field, blocks, block, SPAN: tl.constexpr):
    found = tl.full((), -1, tl.int32)
    at = tl.zeros((), tl.int32)
    while at < block:
        number = at + tl.arange(0, SPAN)
        found = tl.maximum(found, tl.max(tl.load(summary + field * blocks + number, mask=number < block, other=-1), 0))
        at += SPAN
    return found


@triton.jit
def _least_after(summary, field, blocks, block, nothing, SPAN: tl.constexpr):
    found = tl.zeros((), tl.int32) + nothing
    at = block + 1
    # the nearest block that has one ends the search: fields of later blocks are larger
    while (at < blocks) & (found == nothing):
        number = at + tl.arange(0, SPAN)
        values = tl.load(summary + field * blocks + number, mask=number < blocks, other=2**31 - 1)
        found = tl.minimum(found, tl.min(values, 0))
        at += SPAN
    return found


@triton.jit
def _sum_before(summary, field, blocks, block, SPAN: tl.constexpr):
    total = tl.zeros((), tl.int32)
    at = tl.zeros((), tl.int32)
    while at < block:
        number = at + tl.arange(0, SPAN)
        total += tl.sum(tl.load(summary + field * blocks + number, mask=number < block, other=0), 0)
        at += SPAN
    return total


@triton.jit
def _continues(document_ids, image_ids, row, here, width):
    """Whether `row` lies in the same image as the row before it, in the same document and output row."""
    inside = here & (row > divide(row, width) * width)
    image = tl.load(image_ids + row, mask=inside, other=-1)
    document = tl.load(document_ids + row, mask=inside, other=-1)
    same = inside & (image >= 0) & (document >= 0)
    same = same & (tl.load(image_ids + row - 1, mask=same, other=-1) == image)
    return same & (tl.load(document_ids + row - 1, mask=same, other=-1) == document)


@triton.jit(do_not_specialize=_VARYING)
def summary_kernel(
    document_ids, image_ids, summary, previous, count, width, blocks,
    HOLES: tl.constexpr, IMAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns the summary of BLOCK rows, and for the documents that begin there the last kept row before them."""
    block = tl.program_id(0)
    low = block.to(tl.int64) * BLOCK
    row = low + tl.arange(0, BLOCK)
    here = row < count
    begin = divide(row, width) * width
    given = tl.load(document_ids + row, mask=here, other=-1)
    kept = given >= 0
    kept_before = tl.load(document_ids + row - 1, mask=here & (row > low), other=-1) >= 0
    before = running_max(tl.where(kept_before, row - 1, -1))
    if tl.max(kept.to(tl.int32), 0) > 0:
        before = tl.maximum(before, last_kept_before(None, document_ids, low, tl.zeros((), tl.int64), BLOCK))
    joined = kept & (before >= begin)
    begins = kept & ((joined & (tl.load(document_ids + before, mask=joined, other=-1) == given)) == 0)
    tl.store(previous + row, before.to(tl.int32), mask=begins)
    mine = summary + block
    tl.store(mine + _LAST_START * blocks, tl.max(tl.where(begins, row, -1), 0).to(tl.int32))
    tl.store(mine + _FIRST_START * blocks, tl.min(tl.where(begins, row, count), 0).to(tl.int32))
    tl.store(mine + _LAST_KEPT * blocks, tl.max(tl.where(kept, row, -1), 0).to(tl.int32))
    if HOLES:
        behind = kept & (row > begin)
        behind = behind & (tl.load(document_ids + row - 1, mask=behind, other=-1) >= 0)
        run_begins = kept & (behind == 0)
        tl.store(mine + _FIRST_KEPT * blocks, tl.min(tl.where(kept, row, count), 0).to(tl.int32))
        tl.store(mine + _RUNS * blocks, tl.sum(run_begins.to(tl.int32), 0))
        tl.store(mine + _LAST_RUN * blocks, tl.max(tl.where(run_begins, row, -1), 0).to(tl.int32))
        tl.store(mine + _FIRST_BREAK * blocks, tl.min(tl.where(here & (behind == 0), row, count), 0).to(tl.int32))
    if IMAGES:
        image = kept & (tl.load(image_ids + row, mask=kept, other=-1) >= 0)
        goes_on = _continues(document_ids, image_ids, row, here, width)
        tl.store(mine + _LAST_IMAGE * blocks, tl.max(tl.where(image & (goes_on == 0), row, -1), 0).to(tl.int32))
        tl.store(mine + _FIRST_IMAGE_BREAK * blocks, tl.min(tl.where(here & (goes_on == 0), row, count), 0).to(tl.int32))
    # written once: blocks tile the rows


@triton.jit
def _seen(
    row, start, stop, is_image, image_start, image_stop, own, prefix_lengths, window, sinks, chunk_size, prefix, prefixes,
    FULL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, CHUNKS: tl.constexpr, IMAGES: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """(lo, hi, front): a row sees [lo, hi), which holds the row itself, and [start, front), which may be empty."""
    low = start
    high = row + 1
    if FULL:
        high = stop
    if CHUNKS:
        low = start + divide(row - start, chunk_size) * chunk_size
        if FULL:
            high = tl.minimum(stop, low + chunk_size)
    if WINDOW:
        low = tl.maximum(low, row - window + 1)
        if FULL:
            high = tl.minimum(high, row + window)
    if IMAGES == 2:
        high = tl.where(is_image, tl.maximum(high, image_stop), high)
    if IMAGES == 1:
        low = tl.where(is_image, tl.minimum(low, image_start), low)
        high = tl.where(is_image, tl.maximum(high, image_stop), high)
    front = start
    if SINKS:
        front = tl.minimum(start + sinks, row + 1)
    if PREFIX:
        length = own.to(tl.int64) * 0 + prefix
        if prefix_lengths is not None:
            # prefixes -1: one length for every document
            entry = tl.where(prefixes < 0, 0, own)
            length = tl.load(prefix_lengths + entry, mask=(own >= 0) & (entry < tl.where(prefixes < 0, 1, prefixes)), other=0).to(tl.int64)
        front = tl.maximum(front, tl.minimum(start + length, stop))
    return low, high, front


@triton.jit(do_not_specialize=_VARYING)
def intervals_kernel(
    document_ids, image_ids, prefix_lengths, summary, previous, known, bounds, kv_lo, kv_hi,
    count, width, blocks, window, sinks, chunk_size, prefix, prefixes, parents,
    FULL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, CHUNKS: tl.constexpr, IMAGES: tl.constexpr, PREFIX: tl.constexpr,
    HOLES: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK rows: with LAST their intervals, else what `cut_kernel` reads of them and of documents that begin there."""
    block = tl.program_id(0)
    low = block.to(tl.int64) * BLOCK
    row = low + tl.arange(0, BLOCK)
    here = row < count
    begin = divide(row, width) * width
    given = tl.load(document_ids + row, mask=here, other=-1)
    kept = given >= 0
    kept_before = tl.load(document_ids + row - 1, mask=here & (row > low), other=-1) >= 0
    before = tl.maximum(running_max(tl.where(kept_before, row - 1, -1)), _most_before(summary, _LAST_KEPT, blocks, block, SPAN))
    joined = kept & (before >= begin)
    begins = kept & ((joined & (tl.load(document_ids + before, mask=joined, other=-1) == given)) == 0)
    start = tl.maximum(running_max(tl.where(begins, row, -1)), _most_before(summary, _LAST_START, blocks, block, SPAN))
    # where the next document begins, and with that where this one ends: is the row behind each the first of a document?
    after = row + 1
    given_after = tl.load(document_ids + after, mask=after < count, other=-1)
    newest = tl.where(kept, row, before)
    begin_after = divide(after, width) * width
    joined = (given_after >= 0) & (newest >= begin_after)
    begins_after = (given_after >= 0) & ((joined & (tl.load(document_ids + newest, mask=joined, other=-1) == given_after)) == 0)
    follows = _next(tl.where(begins_after, after, count))
    follows = tl.minimum(follows, _least_after(summary, _FIRST_START, blocks, block, count, SPAN))
    last = _most_before(summary, _LAST_KEPT, blocks, blocks, SPAN)
    stop = tl.load(previous + follows, mask=here & (follows < count), other=0).to(tl.int64)
    stop = tl.where(follows < count, stop, last) + 1
    is_image = kept & (row < 0)
    image_start = row
    image_stop = row
    if IMAGES:
        is_image = kept & (tl.load(image_ids + row, mask=kept, other=-1) >= 0)
        goes_on = _continues(document_ids, image_ids, row, here, width)
        image_start = running_max(tl.where(is_image & (goes_on == 0), row, -1))
        image_start = tl.maximum(image_start, _most_before(summary, _LAST_IMAGE, blocks, block, SPAN))
        goes_on = _continues(document_ids, image_ids, after, after < count, width)
        image_stop = tl.minimum(_next(tl.where(goes_on, count, after)), _least_after(summary, _FIRST_IMAGE_BREAK, blocks, block, count, SPAN))
    if LAST:
        lo, hi, front = _seen(
            row, start, stop, is_image, image_start, image_stop, given, prefix_lengths, window, sinks, chunk_size, prefix, prefixes,
            FULL, WINDOW, SINKS, CHUNKS, IMAGES, PREFIX,
        )  # fmt: skip
        tl.store(kv_lo + row, tl.where(kept, lo - begin, 0).to(tl.int32), mask=here)
        tl.store(kv_hi + row, tl.where(kept, hi - begin, 0).to(tl.int32), mask=here)
    else:
        at = known + row
        size = tl.zeros((), tl.int64) + count
        tl.store(at + _START * size, start.to(tl.int32), mask=here)
        tl.store(at + _STOP * size, stop.to(tl.int32), mask=here)
        if HOLES:
            kept_next = tl.minimum(_next(tl.where(kept, row, count)), _least_after(summary, _FIRST_KEPT, blocks, block, count, SPAN))
            behind = kept & (row > begin)
            behind = behind & (tl.load(document_ids + row - 1, mask=behind, other=-1) >= 0)
            run_begins = kept & (behind == 0)
            run = _sum_before(summary, _RUNS, blocks, block, SPAN) + tl.cumsum(run_begins.to(tl.int32), 0)
            run_start = tl.maximum(running_max(tl.where(run_begins, row, -1)), _most_before(summary, _LAST_RUN, blocks, block, SPAN))
            goes_on = kept & (given_after >= 0) & (after > begin_after)
            run_stop = tl.minimum(_next(tl.where(goes_on, count, after)), _least_after(summary, _FIRST_BREAK, blocks, block, count, SPAN))
            tl.store(at + _NEXT_KEPT * size, kept_next.to(tl.int32), mask=here)
            tl.store(at + _PREVIOUS_KEPT * size, newest.to(tl.int32), mask=here)
            tl.store(at + _RUN * size, run, mask=here)
            tl.store(at + _RUN_START * size, run_start.to(tl.int32), mask=here)
            tl.store(at + _RUN_STOP * size, run_stop.to(tl.int32), mask=here)
        if IMAGES:
            tl.store(at + _IMAGE_START * size, image_start.to(tl.int32), mask=here)
            tl.store(at + _IMAGE_STOP * size, image_stop.to(tl.int32), mask=here)
        if bounds is not None:
            own = begins & (given < parents)
            place = bounds + (divide(row, width) * parents + given) * 2
            tl.store(place, start.to(tl.int32), mask=own)
            tl.store(place + 1, stop.to(tl.int32), mask=own)
    # written once: blocks tile the rows, and an id begins once in an output row


@triton.jit
def _append(found, lo1, hi1, lo2, hi2, lo3, hi3, lo, hi):
    """One interval more behind those before it, joined to the last where they touch."""
    real = lo < hi
    top = tl.where(found > 2, hi3, tl.where(found > 1, hi2, hi1))
    joins = real & (found > 0) & (lo <= top)
    fresh = real & (joins == 0)
    hi1 = tl.where(joins & (found == 1), tl.maximum(hi1, hi), tl.where(fresh & (found == 0), hi, hi1))
    lo1 = tl.where(fresh & (found == 0), lo, lo1)
    hi2 = tl.where(joins & (found == 2), tl.maximum(hi2, hi), tl.where(fresh & (found == 1), hi, hi2))
    lo2 = tl.where(fresh & (found == 1), lo, lo2)
    hi3 = tl.where(joins & (found == 3), tl.maximum(hi3, hi), tl.where(fresh & (found == 2), hi, hi3))
    lo3 = tl.where(fresh & (found == 2), lo, lo3)
    return found + fresh.to(tl.int32), lo1, hi1, lo2, hi2, lo3, hi3


@triton.jit
def _cut(known, size, lo, hi, there):
    """(pieces, first lo, first hi, last lo, last hi) of an interval whose padding is taken out."""
    there = there & (lo < hi)
    first = tl.load(known + _NEXT_KEPT * size + lo, mask=there, other=0).to(tl.int64)
    last = tl.load(known + _PREVIOUS_KEPT * size + hi - 1, mask=there, other=-1).to(tl.int64)
    there = there & (first <= last)
    run = tl.load(known + _RUN * size + first, mask=there, other=0)
    pieces = tl.where(there, tl.load(known + _RUN * size + last, mask=there, other=0) - run + 1, 0)
    middle = tl.load(known + _RUN_STOP * size + first, mask=there, other=0).to(tl.int64)
    last_lo = tl.load(known + _RUN_START * size + last, mask=there, other=0).to(tl.int64)
    return pieces, first, tl.minimum(middle, last + 1), tl.maximum(last_lo, first), last + 1


@triton.jit(do_not_specialize=_VARYING)
def cut_kernel(
    document_ids, image_ids, prefix_lengths, parent_ids, known, bounds, bad, kv_lo, kv_hi, kv_lo2, kv_hi2,
    count, width, window, sinks, chunk_size, prefix, prefixes, parents,
    FULL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, CHUNKS: tl.constexpr, IMAGES: tl.constexpr, PREFIX: tl.constexpr,
    HOLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK rows: the union of what each sees, padding taken out, as one or two intervals."""
    block = tl.program_id(0)
    row = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = row < count
    begin = divide(row, width) * width
    given = tl.load(document_ids + row, mask=here, other=-1)
    kept = given >= 0
    size = tl.zeros((), tl.int64) + count
    start = tl.load(known + _START * size + row, mask=kept, other=0).to(tl.int64)
    stop = tl.load(known + _STOP * size + row, mask=kept, other=0).to(tl.int64)
    is_image = kept & (row < 0)
    image_start = row
    image_stop = row
    if IMAGES:
        is_image = kept & (tl.load(image_ids + row, mask=kept, other=-1) >= 0)
        image_start = tl.load(known + _IMAGE_START * size + row, mask=kept, other=0).to(tl.int64)
        image_stop = tl.load(known + _IMAGE_STOP * size + row, mask=kept, other=0).to(tl.int64)
    lo, hi, front = _seen(
        row, start, stop, is_image, image_start, image_stop, given, prefix_lengths, window, sinks, chunk_size, prefix, prefixes,
        FULL, WINDOW, SINKS, CHUNKS, IMAGES, PREFIX,
    )  # fmt: skip
    found = kept.to(tl.int32) * 0
    lo1 = row * 0
    hi1 = lo1
    lo2 = lo1
    hi2 = lo1
    lo3 = lo1
    hi3 = lo1
    front = tl.where(kept, front, start)
    lo = tl.where(kept, lo, 0)
    hi = tl.where(kept, hi, 0)
    if parent_ids is not None:
        parent = tl.load(parent_ids + given, mask=kept & (given < parents), other=-1)
        has = (parent >= 0) & (parent < parents)
        place = bounds + (divide(row, width) * parents + parent) * 2
        parent_lo = tl.load(place, mask=has, other=0).to(tl.int64)
        parent_hi = tl.load(place + 1, mask=has, other=0).to(tl.int64)
        # three times in order: the parent stands before, between or behind the other two
        earliest = parent_lo <= start
        latest = parent_lo > lo
        found, lo1, hi1, lo2, hi2, lo3, hi3 = _append(found, lo1, hi1, lo2, hi2, lo3, hi3, parent_lo, tl.where(earliest, parent_hi, parent_lo))
        found, lo1, hi1, lo2, hi2, lo3, hi3 = _append(found, lo1, hi1, lo2, hi2, lo3, hi3, start, front)
        between = (earliest == 0) & (latest == 0)
        found, lo1, hi1, lo2, hi2, lo3, hi3 = _append(found, lo1, hi1, lo2, hi2, lo3, hi3, parent_lo, tl.where(between, parent_hi, parent_lo))
        found, lo1, hi1, lo2, hi2, lo3, hi3 = _append(found, lo1, hi1, lo2, hi2, lo3, hi3, lo, hi)
        behind = (earliest == 0) & latest
        found, lo1, hi1, lo2, hi2, lo3, hi3 = _append(found, lo1, hi1, lo2, hi2, lo3, hi3, parent_lo, tl.where(behind, parent_hi, parent_lo))
    else:
        found, lo1, hi1, lo2, hi2, lo3, hi3 = _append(found, lo1, hi1, lo2, hi2, lo3, hi3, start, front)
        found, lo1, hi1, lo2, hi2, lo3, hi3 = _append(found, lo1, hi1, lo2, hi2, lo3, hi3, lo, hi)
    if HOLES:
        pieces1, a, b, c, d = _cut(known, size, lo1, hi1, kept & (found > 0))
        pieces2, e, f, _, _ = _cut(known, size, lo2, hi2, kept & (found > 1))
        pieces3, g, h, _, _ = _cut(known, size, lo3, hi3, kept & (found > 2))
        found = pieces1 + pieces2 + pieces3
        lo1 = tl.where(pieces1 > 0, a, tl.where(pieces2 > 0, e, g))
        hi1 = tl.where(pieces1 > 0, b, tl.where(pieces2 > 0, f, h))
        lo2 = tl.where(pieces1 > 1, c, tl.where((pieces1 > 0) & (pieces2 > 0), e, g))
        hi2 = tl.where(pieces1 > 1, d, tl.where((pieces1 > 0) & (pieces2 > 0), f, h))
        # both pieces of a second interval cut in two, the first being nothing but padding
        lo2 = tl.where((pieces1 == 0) & (pieces2 > 1), tl.load(known + _RUN_START * size + hi2 - 1, mask=(pieces1 == 0) & (pieces2 > 1), other=0), lo2)
    one = kept & (found > 0)
    two = kept & (found > 1)
    tl.store(kv_lo + row, tl.where(one, lo1 - begin, 0).to(tl.int32), mask=here)
    tl.store(kv_hi + row, tl.where(one, hi1 - begin, 0).to(tl.int32), mask=here)
    most = 1
    if kv_lo2 is not None:
        most = 2
        tl.store(kv_lo2 + row, tl.where(two, lo2 - begin, 0).to(tl.int32), mask=here)
        tl.store(kv_hi2 + row, tl.where(two, hi2 - begin, 0).to(tl.int32), mask=here)
    if bad is not None:
        tl.store(bad + block, tl.min(tl.where(kept & (found > most), row, 2**62), 0))
    # written once: blocks tile the rows


@triton.jit(do_not_specialize=["blocks", "width"])
def report_kernel(bad, status, blocks, width, SPAN: tl.constexpr):
    """The one program owns the status: the first row that needs more intervals than there are."""
    first = tl.full((), 2**62, tl.int64)
    at = tl.zeros((), tl.int32)
    while at < blocks:
        number = at + tl.arange(0, SPAN)
        first = tl.minimum(first, tl.min(tl.load(bad + number, mask=number < blocks, other=2**62), 0))
        at += SPAN
    if first < 2**62:
        if tl.load(status) == 0:
            tl.store(status, 8)
            tl.store(status + 1, first)
            for field in tl.static_range(2, 7):
                tl.store(status + field, 0)
            tl.store(status + 7, first - divide(first, width) * width)


def intervals(
    document_ids: Tensor, image_ids: Tensor | None, attend: tuple[int, int, int, int, int],
    prefix_lengths: int | Tensor | None, parent_ids: Tensor | None, pair: bool, status,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """``(kv_lo, kv_hi, kv_lo2, kv_hi2)``, int32 (G, W): the keys that each row sees; the second pair only with `pair`."""
    kind, window, sinks, chunk_size, images = attend
    document_ids = document_ids.contiguous()
    images = images if image_ids is not None else 0
    image_ids = image_ids.contiguous() if images else None
    count, width = document_ids.numel(), document_ids.shape[-1]
    kv_lo, kv_hi = torch.empty_like(document_ids, dtype=torch.int32), torch.empty_like(document_ids, dtype=torch.int32)
    kv_lo2, kv_hi2 = (torch.empty_like(kv_lo), torch.empty_like(kv_lo)) if pair else (None, None)
    if not count:
        return kv_lo, kv_hi, kv_lo2, kv_hi2
    device = document_ids.device
    lengths = None if prefix_lengths is None or isinstance(prefix_lengths, int) else torch.as_tensor(prefix_lengths, device=device).contiguous()
    prefix = prefix_lengths if isinstance(prefix_lengths, int) else 0
    parent_ids = None if parent_ids is None else torch.as_tensor(parent_ids, device=device).contiguous()
    parents = 0 if parent_ids is None else parent_ids.numel()
    if not parents:
        parent_ids = None
    # without a second pair a row is one interval, unless something may lie apart from its own surroundings
    last = not pair and parent_ids is None and not sinks and prefix_lengths is None
    blocks = triton.cdiv(count, _BLOCK)
    summary = torch.empty(_FIELDS * blocks, dtype=torch.int32, device=device)
    previous = torch.empty(count, dtype=torch.int32, device=device)
    known = None if last else torch.empty(9 * count, dtype=torch.int32, device=device)
    bounds = None if parent_ids is None else torch.zeros(document_ids.shape[0] * parents * 2, dtype=torch.int32, device=device)
    bad = torch.empty(blocks, dtype=torch.int64, device=device) if status is not None and not last else None
    sizes = (window, sinks, chunk_size, prefix, 0 if lengths is None else lengths.numel() if lengths.dim() else -1, parents)
    flags = (kind == 1, window > 0, sinks > 0, chunk_size > 0, images, prefix_lengths is not None)
    with on_device_of(document_ids):
        summary_kernel[(blocks,)](document_ids, image_ids, summary, previous, count, width, blocks, not last, images > 0, _BLOCK, **SCAN)
        intervals_kernel[(blocks,)](
            document_ids, image_ids, lengths, summary, previous, known, bounds, kv_lo, kv_hi, count, width, blocks,
            *sizes, *flags, not last, last, _BLOCK, _SPAN, **SCAN,
        )  # fmt: skip
        if not last:
            cut_kernel[(blocks,)](
                document_ids, image_ids, lengths, parent_ids, known, bounds, bad, kv_lo, kv_hi, kv_lo2, kv_hi2, count, width,
                *sizes, *flags, True, _BLOCK, **SCAN,
            )  # fmt: skip
        if bad is not None:
            found = torch.zeros(8, dtype=torch.int64, device=device) if status is RAISE else status
            report_kernel[(1,)](bad, found, blocks, width, _SPAN, num_warps=4)
            if status is RAISE:
                record = tuple(found.tolist())
                if record[0]:
                    raise RecordedError(record)
    return kv_lo, kv_hi, kv_lo2, kv_hi2
