"""Counting along the tokens: every chunk of tokens is summarised once, and the sum of the summaries before it is its base.

No atomics and no waiting between programs: a summary is written by one launch and read by the next.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_launch import INTERPRETED

# tokens that a program looks at at once, and the most chunks there are: longer batches get longer chunks
BLOCK = 16 if INTERPRETED.value else 512
CHUNKS = 8 if INTERPRETED.value else 1024

KIND_LANES = tl.constexpr(8)
KIND_FIELDS = tl.constexpr(6)  # token, first_row, rows, images, rows_each, images listed before

PLACEHOLDERS, EXPAND, IMAGES_FIRST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
UNKNOWN, EACH = tl.constexpr(0), tl.constexpr(1)  # what is known of a kind's image sizes; anything else: listed

# fields of a summary behind placeholders and runs of each kind
ROWS, STARTS, LAST_START, LAST_KEPT, FALLS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
MORE_FIELDS = 5

# sizes of a step: never part of a specialisation. The kinds are a tuple, whose integers Triton always specialises;
# `encode_kinds` makes them all odd and none of them 1, so that nothing is left to specialise on.
VARYING = [
    "samples", "length", "count", "chunk", "chunks", "search_steps", "width", "rows", "documents_wanted", "token_steps", "sample_steps",
]  # fmt: skip


def encode_kinds(fields: list[int]) -> tuple[int, ...]:
    return tuple(2 * value + 3 for value in fields) or (3,)


@triton.jit
def divide(a, b):
    """a // b of numbers in [0, 2**32): a 64-bit division is a call, and its registers are spilled."""
    return (a.to(tl.uint32) // b.to(tl.uint32)).to(tl.int64)


@triton.jit
def field_of(kinds, kind: tl.constexpr, FIELD: tl.constexpr):
    return tl.zeros((), tl.int64) + ((kinds[kind * KIND_FIELDS + FIELD] - 3) >> 1)


@triton.jit
def mode_of(MODES: tl.constexpr, kind: tl.constexpr):
    return (MODES >> (2 * kind)) & 3


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def running_max(values):
    return tl.associative_scan(values, 0, _larger)


@triton.jit
def before_chunk(summary, field, chunk, chunks, CHUNKS: tl.constexpr):
    """Sum of a field over the chunks before `chunk`."""
    number = tl.arange(0, CHUNKS)
    values = tl.load(summary + field * CHUNKS + number, mask=number < chunks, other=0)
    return tl.sum(tl.where(number < chunk, values, 0), 0)


@triton.jit
def pick(lanes, INDEX: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, KIND_LANES) == INDEX, lanes, 0), 0)


@triton.jit
def add_lane(lanes, INDEX: tl.constexpr, value):
    return lanes + tl.where(tl.arange(0, KIND_LANES) == INDEX, value, 0)


@triton.jit
def kept_of(attention_mask, document_ids, token, here):
    """Which tokens are kept: nonzero in the mask, not below 0 as a document."""
    kept = here
    if attention_mask is not None:
        kept = kept & (tl.load(attention_mask + token, mask=here, other=0) != 0)
    if document_ids is not None:
        kept = kept & (tl.load(document_ids + token, mask=here, other=-1) >= 0)
    return kept


@triton.jit
def last_kept_before(attention_mask, document_ids, token, low, BLOCK: tl.constexpr):
    """The last kept token in [low, token), or -1. Only tokens that nobody keeps are looked at twice."""
    found = tl.full((), -1, tl.int64)
    at = token
    while (found < 0) & (at > low):
        at = at - BLOCK
        index = at + tl.arange(0, BLOCK)
        kept = kept_of(attention_mask, document_ids, index, (index >= low) & (index < token))
        found = tl.max(tl.where(kept, index, -1), 0)
    return found


@triton.jit
def ends_up_to(image_ends, offset, images, base, value, search_steps):
    """How many of `images` cumulated sizes (less `base`) are not above `value`."""
    low = value * 0
    high = low + tl.maximum(images, 0)
    step = tl.zeros((), tl.int32)
    while step < search_steps:
        middle = (low + high) >> 1
        open_ = low < high
        end = tl.load(image_ends + offset + middle, mask=open_, other=0) - base
        low, high = tl.where(open_ & (end <= value), middle + 1, low), tl.where(open_ & (end > value), middle, high)
        step += 1
    return low


@triton.jit
def listed_base(image_ends, offset):
    """Sum of the sizes listed before a kind's."""
    return tl.load(image_ends + offset - 1, mask=offset > 0, other=0)


@triton.jit
def image_with_row(image_ends, kinds, kind: tl.constexpr, row, search_steps, MODES: tl.constexpr):
    """Image of a kind in which its row `row` lies (where sizes are known)."""
    images = field_of(kinds, kind, 3)
    if mode_of(MODES, kind) == EACH:
        each = field_of(kinds, kind, 4)
        image = tl.where(each > 0, divide(row, tl.maximum(each, 1)), images)
    else:
        offset = field_of(kinds, kind, 5)
        image = ends_up_to(image_ends, offset, images, listed_base(image_ends, offset), row, search_steps)
    return image


@triton.jit
def images_beginning_before(image_ends, kinds, kind: tl.constexpr, row, search_steps, MODES: tl.constexpr):
    """How many images of a kind begin before its row `row`."""
    images = field_of(kinds, kind, 3)
    if mode_of(MODES, kind) == EACH:
        each = field_of(kinds, kind, 4)
        number = tl.where(each > 0, divide(row + each - 1, tl.maximum(each, 1)), images)
    else:
        offset = field_of(kinds, kind, 5)
        number = 1 + ends_up_to(image_ends, offset, images - 1, listed_base(image_ends, offset), row - 1, search_steps)
    return tl.where(row > 0, tl.minimum(number, images), 0)


@triton.jit
def image_start(image_ends, kinds, kind: tl.constexpr, image, MODES: tl.constexpr):
    """Rows of a kind before image `image`; image may be the number of images."""
    if mode_of(MODES, kind) == EACH:
        start = image * field_of(kinds, kind, 4)
    else:
        offset = field_of(kinds, kind, 5)
        start = tl.load(image_ends + offset + image - 1, mask=image > 0, other=0) - tl.where(image > 0, listed_base(image_ends, offset), 0)
    return start


@triton.jit
def expanded(
    image_ends, feature_counts, count_ends, kinds, kind: tl.constexpr, here, sample, ordinal, inside, samples, search_steps,
    MODES: tl.constexpr,
):  # fmt: skip
    """(image, its first row in the kind, its rows) of placeholders of `kind`; rows 0 where there is no such image."""
    images, total = field_of(kinds, kind, 3), field_of(kinds, kind, 2)
    image = ordinal
    if feature_counts is not None:
        counted = (tl.load(feature_counts + kind * samples) + ordinal * 0) >= 0
        end = tl.load(count_ends + kind * samples + sample, mask=here, other=0)
        first = end - tl.load(feature_counts + kind * samples + sample, mask=here, other=0)
        begun = images_beginning_before(image_ends, kinds, kind, first, search_steps, MODES)
        image = tl.where(counted, begun + inside, image)
    known = here & (image >= 0) & (image < images)
    image = tl.where(known, image, 0)
    start = image * 0
    stop = start
    if mode_of(MODES, kind) == EACH:
        start = image_start(image_ends, kinds, kind, image, MODES)
        stop = start + field_of(kinds, kind, 4)
    else:
        offset = field_of(kinds, kind, 5)
        base = listed_base(image_ends, offset)
        start = tl.where(image > 0, tl.load(image_ends + offset + image - 1, mask=known & (image > 0), other=0) - base, 0)
        stop = tl.load(image_ends + offset + image, mask=known, other=0) - base
    known = known & (stop <= total) & (start >= 0)
    if feature_counts is not None:
        known = known & ((stop <= end) | (counted == 0))
    return image, start, tl.where(known, tl.maximum(stop - start, 0), 0)


@triton.jit(do_not_specialize=VARYING)
def count_kernel(
    tokens, attention_mask, document_ids, image_ends, feature_counts, count_ends, kinds, summary, at_sample,
    samples, length, count, chunk, chunks, search_steps,
    K: tl.constexpr, SCHEME: tl.constexpr, MODES: tl.constexpr, TOKENS: tl.constexpr, RUNS: tl.constexpr, OPEN: tl.constexpr, PRESENT: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A program owns the summary of one chunk of tokens, and the counts at the samples that begin in it.

    TOKENS: placeholders, runs and document starts are counted, and rows too unless the scheme is expand, where an image's
    size is known only once its placeholder has a number; a second launch without TOKENS then counts the rows.
    OPEN: document starts are counted: kept tokens of another id than the kept one before them, or the first of their sample.
    """
    here_chunk = tl.program_id(0)
    low = here_chunk.to(tl.int64) * chunk
    high = tl.minimum(low + chunk, count)
    placeholders = tl.zeros((KIND_LANES,), tl.int64)
    base = tl.zeros((KIND_LANES,), tl.int64)
    at_first = tl.zeros((KIND_LANES,), tl.int64)
    runs = tl.zeros((KIND_LANES,), tl.int64)
    first_sample = divide(low, length)
    if not TOKENS:
        first_chunk = divide(first_sample * length, chunk)
        for c in tl.static_range(K):
            base = add_lane(base, c, before_chunk(summary, c, here_chunk, chunks, CHUNKS))
            begun = before_chunk(summary, c, first_chunk, chunks, CHUNKS) + tl.load(at_sample + c * samples + first_sample)
            at_first = add_lane(at_first, c, begun)
    rows = tl.zeros((), tl.int64)
    starts = tl.zeros((), tl.int64)
    falls = tl.zeros((), tl.int64)
    last_start = tl.full((), -1, tl.int64)
    last_kept = tl.full((), -2, tl.int64)  # -2: not looked for yet
    at = low
    while at < high:
        token = at + tl.arange(0, BLOCK)
        here = token < high
        sample = divide(token, length)
        begins_sample = here & (token - sample * length == 0)
        kept = kept_of(attention_mask, document_ids, token, here)
        gives = kept.to(tl.int64)
        if PRESENT and SCHEME != IMAGES_FIRST:
            value = tl.load(tokens + token, mask=here, other=0).to(tl.int64)
            if RUNS and TOKENS:
                same = here & (token > sample * length)
                before_value = tl.load(tokens + token - 1, mask=same, other=0).to(tl.int64)
                if document_ids is not None:
                    given = tl.load(document_ids + token, mask=same, other=0)
                    same = same & (given == tl.load(document_ids + token - 1, mask=same, other=0))
            for c in tl.static_range(K):
                is_kind = here & (value == field_of(kinds, c, 0))
                upto = tl.cumsum(is_kind.to(tl.int32), 0).to(tl.int64)
                ordinal = pick(placeholders, c) + upto - 1
                if TOKENS:
                    tl.store(at_sample + c * samples + sample, ordinal + 1 - is_kind.to(tl.int64), mask=begins_sample)
                    if RUNS:
                        begins = is_kind & ((same & (before_value == value)) == 0)
                        runs = add_lane(runs, c, tl.sum(begins.to(tl.int64), 0))
                else:
                    ordinal = ordinal + pick(base, c)
                    at_begin = tl.load(at_sample + c * samples + sample, mask=here, other=0) + pick(base, c)
                    at_begin = tl.where(sample == first_sample, pick(at_first, c), at_begin)
                    _, _, size = expanded(
                        image_ends, feature_counts, count_ends, kinds, c, is_kind, sample, ordinal, ordinal - at_begin,
                        samples, search_steps, MODES,
                    )  # fmt: skip
                    gives = tl.where(is_kind, size * kept.to(tl.int64), gives)
                placeholders = add_lane(placeholders, c, tl.sum(is_kind.to(tl.int64), 0))
        row_before = rows + tl.cumsum(gives, 0) - gives
        if SCHEME != EXPAND or not TOKENS:
            tl.store(at_sample + K * samples + sample, row_before, mask=begins_sample)
            rows = rows + tl.sum(gives, 0)
        if OPEN:
            if (last_kept == -2) & (tl.max(kept.to(tl.int32), 0) > 0):
                last_kept = last_kept_before(attention_mask, document_ids, low, first_sample * length, BLOCK)
            behind = token - 1
            kept_behind = kept_of(attention_mask, document_ids, behind, here & (behind >= low))
            previous = tl.maximum(running_max(tl.where(kept_behind, behind, -1)), last_kept)
            joined = kept & (previous >= sample * length)
            begins = kept & (joined == 0)
            if document_ids is not None:
                own = tl.load(document_ids + token, mask=kept, other=0)
                other = tl.load(document_ids + previous, mask=joined, other=0)
                begins = kept & ((joined & (own == other)) == 0)
                falls += tl.sum((joined & (own < other)).to(tl.int64), 0)
            starts += tl.sum(begins.to(tl.int64), 0)
            last_start = tl.maximum(last_start, tl.max(tl.where(begins, row_before, -1), 0))
            newest = tl.max(tl.where(kept, token, -1), 0)
            last_kept = tl.where(newest >= 0, newest, last_kept)
        at += BLOCK
    mine = summary + here_chunk
    if TOKENS:
        for c in tl.static_range(K):
            tl.store(mine + c * CHUNKS, pick(placeholders, c))
            tl.store(mine + (K + c) * CHUNKS, pick(runs, c))
        tl.store(mine + (2 * K + STARTS) * CHUNKS, starts)
        tl.store(mine + (2 * K + FALLS) * CHUNKS, falls)
        tl.store(mine + (2 * K + LAST_KEPT) * CHUNKS, tl.maximum(last_kept, -1))
    if SCHEME != EXPAND or not TOKENS:
        tl.store(mine + (2 * K + ROWS) * CHUNKS, rows)
        tl.store(mine + (2 * K + LAST_START) * CHUNKS, last_start)
    # written once: chunks tile the tokens, and every sample begins in one chunk
