"""What is wrong with a batch: the record of the first bad sample, found by one program from the counts of all chunks."""

import triton
import triton.language as tl

from ..batch import COUNTS_DIFFER, DOCUMENT_RETURNS, IMAGE_CUT, TOO_FEW_ROWS, TOO_LONG, TOO_MANY_ROWS
from .triton_scan import (
    EACH,
    EXPAND,
    FALLS,
    IMAGES_FIRST,
    PLACEHOLDERS,
    ROWS,
    STARTS,
    UNKNOWN,
    before_chunk,
    divide,
    ends_up_to,
    field_of,
    image_start,
    images_beginning_before,
    listed_base,
    mode_of,
)

_TOO_FEW, _TOO_MANY, _DIFFER = tl.constexpr(TOO_FEW_ROWS), tl.constexpr(TOO_MANY_ROWS), tl.constexpr(COUNTS_DIFFER)
_CUT, _RETURNS, _LONG = tl.constexpr(IMAGE_CUT), tl.constexpr(DOCUMENT_RETURNS), tl.constexpr(TOO_LONG)
_NEVER = tl.constexpr(2**62)


@triton.jit
def _write(record, code, sample, kind, placeholders, rows, total_placeholders, total_rows, extra):
    zero = tl.zeros((), tl.int64)
    tl.store(record, zero + code)
    tl.store(record + 1, zero + sample)
    tl.store(record + 2, zero + kind)
    tl.store(record + 3, zero + placeholders)
    tl.store(record + 4, zero + rows)
    tl.store(record + 5, zero + total_placeholders)
    tl.store(record + 6, zero + total_rows)
    tl.store(record + 7, zero + extra)


@triton.jit
def _at_sample(at_sample, prefix, field, sample, here, samples, length, chunk, total, CHUNKS: tl.constexpr):
    """A count before the first token of a sample; `total` behind the last sample."""
    inside = here & (sample < samples)
    local = tl.load(at_sample + field * samples + sample, mask=inside, other=0)
    base = tl.load(prefix + field * CHUNKS + divide(sample * length, chunk), mask=inside, other=0)
    return tl.where(inside, local + base, total)


@triton.jit
def _is_border(image_ends, kinds, kind: tl.constexpr, row, search_steps, MODES: tl.constexpr):
    """Whether an image of the kind ends at row `row`, or nothing has begun."""
    images = field_of(kinds, kind, 3)
    if mode_of(MODES, kind) == EACH:
        each = field_of(kinds, kind, 4)
        border = (divide(row, tl.maximum(each, 1)) * each == row) & (row <= images * each)
    else:
        offset = field_of(kinds, kind, 5)
        base = listed_base(image_ends, offset)
        ended = ends_up_to(image_ends, offset, images, base, row, search_steps)
        last = tl.load(image_ends + offset + ended - 1, mask=ended > 0, other=0) - base
        border = (ended > 0) & (last == row)
    return border | (row == 0)


@triton.jit
def _kind_of_samples(
    image_ends, feature_counts, count_ends, kinds, at_sample, prefix, kind: tl.constexpr, sample, here, counted, total,
    samples, length, chunk, search_steps,
    SCHEME: tl.constexpr, MODES: tl.constexpr, UNUSED: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """(code, placeholders, rows) of one kind in each sample; code 0 where the sample is good."""
    rows, images = field_of(kinds, kind, 2), field_of(kinds, kind, 3)
    if SCHEME == PLACEHOLDERS:
        have = rows
    else:
        have = tl.maximum(images, 0)
    if SCHEME == IMAGES_FIRST:
        taken = sample * (have > 0).to(tl.int64)
        reached = taken + (have > 0).to(tl.int64)
    else:
        taken = _at_sample(at_sample, prefix, kind, sample, here, samples, length, chunk, total, CHUNKS)
        reached = _at_sample(at_sample, prefix, kind, sample + 1, here, samples, length, chunk, total, CHUNKS)
    wanted = reached - taken
    few = here & (reached > have)
    code = tl.where(few, _TOO_FEW, 0)
    left = have - tl.minimum(taken, have)
    if SCHEME == PLACEHOLDERS and mode_of(MODES, kind) != UNKNOWN:
        border = _is_border(image_ends, kinds, kind, reached, search_steps, MODES)
        cut = here & (reached <= rows) & (border == 0)
        if UNUSED:
            cut = cut & (reached != total)
        code = tl.where(cut, _CUT, code)
        first = images_beginning_before(image_ends, kinds, kind, taken, search_steps, MODES)
        after = images_beginning_before(image_ends, kinds, kind, reached, search_steps, MODES)
        begun = image_start(image_ends, kinds, kind, tl.where(cut, after, 0), MODES) - image_start(image_ends, kinds, kind, tl.where(cut, first, 0), MODES)
        left = tl.where(cut, begun, left)
    if feature_counts is not None:
        own = tl.load(feature_counts + kind * samples + sample, mask=here, other=0)
        stop = tl.load(count_ends + kind * samples + sample, mask=here, other=0)
        asked = wanted
        if SCHEME == IMAGES_FIRST:
            asked = wanted * 0
        told = asked  # placeholders, where an image is cut
        differs = here & (asked < asked)
        cut = differs
        if SCHEME == EXPAND:
            # the rows of the images that the sample's placeholders name, beginning where the sample's rows begin
            if mode_of(MODES, kind) != UNKNOWN:
                first = images_beginning_before(image_ends, kinds, kind, stop - own, search_steps, MODES)
                after = first + wanted
                there = here & (counted > 0) & (after <= images)
                span = image_start(image_ends, kinds, kind, tl.where(there, after, 0), MODES) - image_start(image_ends, kinds, kind, tl.where(there, first, 0), MODES)
                asked = tl.where(there, span, tl.maximum(rows, own) + 1)
            else:
                asked = tl.where(wanted > 0, tl.maximum(rows, own) + 1, 0)
        if SCHEME != IMAGES_FIRST:
            differs = here & (asked > own)
            if not UNUSED:
                differs = here & (asked != own)
        if SCHEME != PLACEHOLDERS:
            if mode_of(MODES, kind) != UNKNOWN:
                cut = here & (_is_border(image_ends, kinds, kind, stop, search_steps, MODES) == 0) & (stop <= rows)
            else:
                cut = here & (stop != 0) & (stop <= rows)
        code = tl.where(counted > 0, tl.where(cut, _CUT, tl.where(differs, _DIFFER, 0)), code)
        left = tl.where(counted > 0, own, left)
        wanted = tl.where(counted > 0, tl.where(cut, told, asked), wanted)
    return code, wanted, left


@triton.jit
def check_samples(
    image_ends, feature_counts, count_ends, block_ends, kinds, summary, at_sample, prefix, record, status,
    samples, chunks, chunk, length, search_steps, width,
    K: tl.constexpr, SCHEME: tl.constexpr, MODES: tl.constexpr, KEEP: tl.constexpr, PACKED: tl.constexpr, UNUSED: tl.constexpr,
    DOCUMENTS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program writes the record of the first error: to the status, or with DOCUMENTS to `record` for `returns_kernel`."""
    number = tl.arange(0, CHUNKS)
    for c in tl.static_range(K):
        values = tl.load(summary + c * CHUNKS + number, mask=number < chunks, other=0)
        tl.store(prefix + c * CHUNKS + number, tl.cumsum(values, 0) - values)
    values = tl.load(summary + (2 * K + ROWS) * CHUNKS + number, mask=number < chunks, other=0)
    tl.store(prefix + K * CHUNKS + number, tl.cumsum(values, 0) - values)
    tl.debug_barrier()
    total_rows = tl.sum(values, 0)
    if DOCUMENTS:
        target = record
        free = True
        tl.store(record, tl.zeros((), tl.int64))
    else:
        target = status
        free = tl.load(status) == 0
    best = tl.full((), _NEVER, tl.int64)  # sample of the best record so far; samples if it speaks of totals
    for c in tl.static_range(K):
        rows, images = field_of(kinds, c, 2), field_of(kinds, c, 3)
        total = before_chunk(summary, c, chunks, chunks, CHUNKS)
        if SCHEME == PLACEHOLDERS:
            have = rows
        else:
            have = tl.maximum(images, 0)
        used = total
        if SCHEME == IMAGES_FIRST:
            used = samples * (have > 0).to(tl.int64)
        counted = tl.zeros((), tl.int64)
        owned = counted
        if feature_counts is not None:
            counted = (tl.load(feature_counts + c * samples) >= 0).to(tl.int64)
            owned = tl.load(count_ends + c * samples + samples - 1)
        bad = tl.full((), _NEVER, tl.int64)
        at = tl.zeros((), tl.int64)
        while at < samples:
            sample = at + tl.arange(0, BLOCK)
            code, _, _ = _kind_of_samples(
                image_ends, feature_counts, count_ends, kinds, at_sample, prefix, c, sample, sample < samples, counted + sample * 0,
                total, samples, length, chunk, search_steps, SCHEME, MODES, UNUSED, CHUNKS,
            )  # fmt: skip
            bad = tl.minimum(bad, tl.min(tl.where(code > 0, sample, _NEVER), 0))
            at = tl.where(bad < samples, bad * 0 + samples, at + BLOCK)
        if (bad < samples) & (bad < best):
            best = bad
            if free:
                code, wanted, left = _kind_of_samples(
                    image_ends, feature_counts, count_ends, kinds, at_sample, prefix, c, bad, bad < samples, counted,
                    total, samples, length, chunk, search_steps, SCHEME, MODES, UNUSED, CHUNKS,
                )  # fmt: skip
                told_total, told_rows = used, have
                if (counted > 0) | (code == _CUT):
                    told_total = total
                    told_rows = rows
                _write(target, code, bad, c, wanted, left, told_total, told_rows, 0)
        if (bad == _NEVER) & (best == _NEVER):
            # totals: told only where no sample is bad
            if counted > 0:
                wrong = owned > rows
                if not UNUSED:
                    wrong = owned != rows
                if wrong:
                    best = bad * 0 + samples
                    if free:
                        _write(target, _DIFFER, -1, c, owned, rows, total, rows, 0)
            else:
                if not UNUSED:
                    if used < have:
                        best = bad * 0 + samples
                        if free:
                            _write(target, _TOO_MANY, -1, c, 0, 0, used, have, 0)
    if not KEEP:
        if best == _NEVER:
            if SCHEME == IMAGES_FIRST:
                total_rows += tl.load(block_ends + samples)
            longest = total_rows
            where = tl.full((), -1, tl.int64)
            if not PACKED:
                longest = tl.zeros((), tl.int64)
                at = tl.zeros((), tl.int64)
                while at < samples:
                    sample = at + tl.arange(0, BLOCK)
                    here = sample < samples
                    begin = _at_sample(at_sample, prefix, K, sample, here, samples, length, chunk, total_rows, CHUNKS)
                    end = _at_sample(at_sample, prefix, K, sample + 1, here, samples, length, chunk, tl.sum(values, 0), CHUNKS)
                    given = end - begin
                    if SCHEME == IMAGES_FIRST:
                        given += tl.load(block_ends + sample + 1, mask=here, other=0) - tl.load(block_ends + sample, mask=here, other=0)
                    given = tl.where(here, given, -1)
                    most = tl.max(given, 0)
                    if most > longest:
                        longest = most
                        where = tl.min(tl.where(given == most, sample, _NEVER), 0)
                    at += BLOCK
            if longest > width:
                if free:
                    _write(target, _LONG, where, 0, 0, 0, 0, 0, longest)


@triton.jit(do_not_specialize=["length", "chunks"])
def returns_kernel(
    document_ids, run_token, summary, record, status, length, chunks,
    K: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The one program owns the status: it looks for a document id that returns, and reports that or the record it was given.

    Ids that never fall within a sample cannot return: the usual batch costs one sum. Otherwise runs are compared in
    blocks, those of other samples skipped.
    """
    code = tl.load(record)
    runs = before_chunk(summary, 2 * K + STARTS, chunks, chunks, CHUNKS)
    found = tl.full((), _NEVER, tl.int64)
    if before_chunk(summary, 2 * K + FALLS, chunks, chunks, CHUNKS) > 0:
        at = tl.zeros((), tl.int64)
        while at < runs:
            run = at + tl.arange(0, BLOCK)
            here = run < runs
            token = tl.load(run_token + run, mask=here, other=0)
            sample = tl.where(here, divide(token, length), -1)
            given = tl.load(document_ids + token, mask=here, other=-1)
            first_sample = tl.min(tl.where(here, sample, 2**31 - 1), 0)
            earlier = tl.zeros((), tl.int64)
            while earlier <= at:
                before = earlier + tl.arange(0, BLOCK)
                last = divide(tl.load(run_token + tl.minimum(earlier + BLOCK, runs) - 1), length)
                if last >= first_sample:
                    there = before < runs
                    token_before = tl.load(run_token + before, mask=there, other=0)
                    sample_before = tl.where(there, divide(token_before, length), -2)
                    given_before = tl.load(document_ids + token_before, mask=there, other=-2)
                    same = (given[:, None] == given_before[None, :]) & (sample[:, None] == sample_before[None, :])
                    same = same & (before[None, :] < run[:, None])
                    hit = tl.max(same.to(tl.int32), 1) > 0
                    found = tl.minimum(found, tl.min(tl.where(hit, run, _NEVER), 0))
                earlier += BLOCK
            at = tl.where(found < runs, runs, at + BLOCK)
    if tl.load(status) == 0:
        # the first bad sample wins, and any sample wins over totals and the length
        token = tl.load(run_token + tl.minimum(found, runs - 1), mask=runs > 0, other=0)
        bad_sample = tl.load(record + 1)
        beats = (code == 0) | (code == _LONG) | (bad_sample < 0) | (divide(token, length) < bad_sample)
        if (found < runs) & beats:
            _write(status, _RETURNS, divide(token, length), 0, 0, 0, 0, 0, tl.load(document_ids + token).to(tl.int64))
        else:
            for field in tl.static_range(8):
                if code > 0:
                    tl.store(status + field, tl.load(record + field))
