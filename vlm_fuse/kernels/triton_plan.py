"""The token plan: from tokens and sizes to one source (and the facts) of every output row.

Launches of `plan` and of `facts` (all names together): count and tokens for "keep"; count, tokens and rows for "padded" and
"packed"; one more with "expand", whose rows can be counted only after the placeholders; with document_ids `plan` looks for
ids that return in one more. `count` takes the counting launches and one for the totals. Sizes listed by image or by sample
are cumulated by torch before (one launch each).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batch import IGNORE_INDEX, LAYOUTS, PAD, RAISE, SCHEMES, Batch, RecordedError
from .triton_check import check_samples, returns_kernel
from .triton_launch import INTERPRETED, SCAN, on_device_of
from .triton_scan import (
    BLOCK,
    CHUNKS,
    EXPAND,
    IMAGES_FIRST,
    KIND_LANES,
    LAST_KEPT,
    LAST_START,
    MORE_FIELDS,
    PLACEHOLDERS,
    ROWS,
    STARTS,
    UNKNOWN,
    VARYING,
    add_lane,
    before_chunk,
    count_kernel,
    divide,
    encode_kinds,
    expanded,
    field_of,
    image_with_row,
    kept_of,
    mode_of,
    pick,
    running_max,
)

_NO_ROW = tl.constexpr(PAD)
_IGNORED = tl.constexpr(IGNORE_INDEX)

_INT32 = ("source_index", "text_index", "document_ids", "image_ids", "cu_seqlens")
_DTYPES = {"position_ids": torch.int64, "kind_ids": torch.int8, "attention_mask": torch.bool, **dict.fromkeys(_INT32, torch.int32)}


@triton.jit
def _emit(
    source_index, text_index, position_ids, document_ids, image_ids, kind_ids, attention_mask, labels, given_labels,
    row, here, kept, token, kind, feature, image, position, document, KEEP: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    """Write the wanted facts of rows: `kept` rows have a token (-1: an image row of images_first), others are padding.

    `position` is that of the padding too; with MARK the first row of a document has no label.
    """
    is_feature = kind >= 0
    if source_index is not None:
        source = tl.where(is_feature, tl.where(feature >= 0, feature, _NO_ROW), -1 - token)
        if not KEEP:
            source = tl.where(kept, source, _NO_ROW)
        tl.store(source_index + row, source.to(tl.int32), mask=here)
    if text_index is not None:
        stands = token
        if not KEEP:
            stands = tl.where(kept, token, -1)
        tl.store(text_index + row, stands.to(tl.int32), mask=here)
    if position_ids is not None:
        tl.store(position_ids + row, position, mask=here)
    if document_ids is not None:
        tl.store(document_ids + row, tl.where(kept, document, -1).to(tl.int32), mask=here)
    if image_ids is not None:
        tl.store(image_ids + row, tl.where(kept & is_feature, image, -1).to(tl.int32), mask=here)
    if kind_ids is not None:
        tl.store(kind_ids + row, tl.where(kept, kind + 1, -1).to(tl.int8), mask=here)
    if attention_mask is not None:
        tl.store(attention_mask + row, kept.to(tl.int8), mask=here)
    if labels is not None:
        labelled = kept & (kind < 0) & (token >= 0)
        if MARK:
            labelled = labelled & (position > 0)
        label = tl.load(given_labels + token, mask=labelled & here, other=_IGNORED)
        tl.store(labels + row, label, mask=here)


@triton.jit(do_not_specialize=VARYING)
def tokens_kernel(
    tokens, attention_mask, document_ids, image_ends, feature_counts, count_ends, block_ends, kinds, summary, at_sample,
    row_start, row_before, first_feature, image_of_token, document_row, run_of_token, run_token, cu_seqlens,
    source_index, text_index, position_ids, out_document_ids, image_ids, kind_ids, out_mask, labels, given_labels,
    prefix, record, status,
    samples, length, count, chunk, chunks, search_steps, width, documents_wanted,
    K: tl.constexpr, SCHEME: tl.constexpr, MODES: tl.constexpr, IMAGES: tl.constexpr, DOCUMENTS: tl.constexpr,
    KEEP: tl.constexpr, PACKED: tl.constexpr, UNUSED: tl.constexpr, CHECK: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A program owns one chunk of tokens and the samples and documents that begin in it; with CHECK the first owns the record.

    With KEEP it writes the output rows, which are the tokens; else what `rows_kernel` reads for each token.
    """
    here_chunk = tl.program_id(0) - CHECK
    if here_chunk < 0:
        if CHECK:
            check_samples(
                image_ends, feature_counts, count_ends, block_ends, kinds, summary, at_sample, prefix, record, status,
                samples, chunks, chunk, length, search_steps, width,
                K, SCHEME, MODES, KEEP, PACKED, UNUSED, DOCUMENTS, BLOCK, CHUNKS,
            )  # fmt: skip
    else:
        low = here_chunk.to(tl.int64) * chunk
        high = tl.minimum(low + chunk, count)
        first_sample = divide(low, length)
        first_chunk = divide(first_sample * length, chunk)
        after_sample = divide(high - 1, length) + 1
        after_chunk = divide(after_sample * length, chunk)
        placeholders = tl.zeros((KIND_LANES,), tl.int64)
        at_first = tl.zeros((KIND_LANES,), tl.int64)
        runs = tl.zeros((KIND_LANES,), tl.int64)
        images_before = tl.zeros((KIND_LANES,), tl.int64)
        counted_images = tl.zeros((), tl.int64)
        for c in tl.static_range(K):
            placeholders = add_lane(placeholders, c, before_chunk(summary, c, here_chunk, chunks, CHUNKS))
            if feature_counts is not None:
                begun = before_chunk(summary, c, first_chunk, chunks, CHUNKS) + tl.load(at_sample + c * samples + first_sample)
                at_first = add_lane(at_first, c, begun)
            if IMAGES:
                images_before = add_lane(images_before, c, counted_images)
                if mode_of(MODES, c) == UNKNOWN:
                    if SCHEME == PLACEHOLDERS:
                        runs = add_lane(runs, c, before_chunk(summary, K + c, here_chunk, chunks, CHUNKS))
                        counted_images += before_chunk(summary, K + c, chunks, chunks, CHUNKS)
                else:
                    counted_images += field_of(kinds, c, 3)
        base_placeholders = placeholders
        base_rows = before_chunk(summary, 2 * K + ROWS, here_chunk, chunks, CHUNKS)
        total_rows = before_chunk(summary, 2 * K + ROWS, chunks, chunks, CHUNKS)
        first_row = before_chunk(summary, 2 * K + ROWS, first_chunk, chunks, CHUNKS) + tl.load(at_sample + K * samples + first_sample)
        after_row = total_rows
        if after_sample < samples:
            after_row = before_chunk(summary, 2 * K + ROWS, after_chunk, chunks, CHUNKS) + tl.load(at_sample + K * samples + after_sample)
        rows = base_rows
        run = tl.zeros((), tl.int64)
        begun_row = tl.full((), -1, tl.int64)  # rows before the document that is open
        last_kept = tl.full((), -1, tl.int64)
        if DOCUMENTS:
            run = before_chunk(summary, 2 * K + STARTS, here_chunk, chunks, CHUNKS)
            lane = tl.arange(0, CHUNKS)
            local = tl.load(summary + (2 * K + LAST_START) * CHUNKS + lane, mask=lane < chunks, other=-1)
            opened = tl.max(tl.where((local >= 0) & (lane < here_chunk), lane, -1), 0)
            if opened >= 0:
                begun_row = before_chunk(summary, 2 * K + ROWS, opened, chunks, CHUNKS) + tl.load(summary + (2 * K + LAST_START) * CHUNKS + opened)
            kept_last = tl.load(summary + (2 * K + LAST_KEPT) * CHUNKS + lane, mask=lane < here_chunk, other=-1)
            last_kept = tl.max(kept_last, 0)
        at = low
        while at < high:
            token = at + tl.arange(0, BLOCK)
            here = token < high
            sample = divide(token, length)
            begins_sample = here & (token - sample * length == 0)
            kept = kept_of(attention_mask, document_ids, token, here)
            gives = kept.to(tl.int64)
            kind = tl.full((BLOCK,), -1, tl.int64)
            feature = tl.full((BLOCK,), -1, tl.int64)
            image = tl.full((BLOCK,), -1, tl.int64)
            if SCHEME != IMAGES_FIRST:
                value = tl.load(tokens + token, mask=here, other=0).to(tl.int64)
                same = here & (token > sample * length)
                if IMAGES:
                    before_value = tl.load(tokens + token - 1, mask=same, other=0).to(tl.int64)
                    if document_ids is not None:
                        given = tl.load(document_ids + token, mask=same, other=0)
                        same = same & (given == tl.load(document_ids + token - 1, mask=same, other=0))
                for c in tl.static_range(K):
                    is_kind = here & (value == field_of(kinds, c, 0))
                    kind = tl.where(is_kind, c, kind)
                    ordinal = pick(placeholders, c) + tl.cumsum(is_kind.to(tl.int32), 0).to(tl.int64) - 1
                    inside = ordinal
                    if feature_counts is not None:
                        at_begin = tl.load(at_sample + c * samples + sample, mask=here, other=0) + pick(base_placeholders, c)
                        inside = ordinal - tl.where(sample == first_sample, pick(at_first, c), at_begin)
                    if SCHEME == EXPAND:
                        number, start, size = expanded(
                            image_ends, feature_counts, count_ends, kinds, c, is_kind, sample, ordinal, inside, samples, search_steps, MODES,
                        )  # fmt: skip
                        gives = tl.where(is_kind, size * kept.to(tl.int64), gives)
                        feature = tl.where(is_kind, field_of(kinds, c, 1) + start, feature)
                    else:
                        start = ordinal
                        own = start < field_of(kinds, c, 2)
                        if feature_counts is not None:
                            counted = (tl.load(feature_counts + c * samples) + ordinal * 0) >= 0
                            owned = tl.load(feature_counts + c * samples + sample, mask=here, other=0)
                            first = tl.load(count_ends + c * samples + sample, mask=here, other=0) - owned
                            start = tl.where(counted, first + inside, ordinal)
                            own = (start >= 0) & (start < field_of(kinds, c, 2)) & ((inside < owned) | (counted == 0))
                        feature = tl.where(is_kind & own, field_of(kinds, c, 1) + start, feature)
                        number = ordinal
                        if IMAGES:
                            if mode_of(MODES, c) == UNKNOWN:
                                begins = is_kind & ((same & (before_value == value)) == 0)
                                number = pick(runs, c) + tl.cumsum(begins.to(tl.int32), 0).to(tl.int64) - 1
                                runs = add_lane(runs, c, tl.sum(begins.to(tl.int64), 0))
                            else:
                                number = image_with_row(image_ends, kinds, c, tl.where(own, start, 0), search_steps, MODES)
                                number = tl.where(own, number, -1 - pick(images_before, c))
                    if IMAGES:
                        image = tl.where(is_kind, pick(images_before, c) + number, image)
                    placeholders = add_lane(placeholders, c, tl.sum(is_kind.to(tl.int64), 0))
            before = rows + tl.cumsum(gives, 0) - gives
            rows = rows + tl.sum(gives, 0)
            start_row = tl.load(at_sample + K * samples + sample, mask=here, other=0) + base_rows
            start_row = tl.where(sample == first_sample, first_row, start_row)
            if SCHEME == IMAGES_FIRST:
                before = before + tl.load(block_ends + sample + 1, mask=here, other=0)
                start_row = start_row + tl.load(block_ends + sample, mask=here, other=0)
            document = sample
            tail = tl.zeros((BLOCK,), tl.int64)
            if DOCUMENTS:
                behind = token - 1
                kept_behind = kept_of(attention_mask, document_ids, behind, here & (behind >= low))
                previous = tl.maximum(running_max(tl.where(kept_behind, behind, -1)), last_kept)
                joined = kept & (previous >= sample * length)
                own_id = tl.load(document_ids + token, mask=kept, other=0)
                begins = kept & ((joined & (own_id == tl.load(document_ids + previous, mask=joined, other=0))) == 0)
                opened_number = run + tl.cumsum(begins.to(tl.int32), 0).to(tl.int64) - 1
                start_row = tl.maximum(running_max(tl.where(begins, before, -1)), begun_row)
                if PACKED:
                    document = opened_number
                else:
                    document = own_id.to(tl.int64)
                if run_token is not None:
                    tl.store(run_token + opened_number, token.to(tl.int32), mask=begins)
                if cu_seqlens is not None:
                    tl.store(cu_seqlens + opened_number, before.to(tl.int32), mask=begins & (opened_number <= documents_wanted))
                if run_of_token is not None:
                    tl.store(run_of_token + token, document.to(tl.int32), mask=here)
                # the padding behind the last kept token of the sample
                end = tl.load(at_sample + K * samples + sample + 1, mask=here & (sample + 1 < after_sample), other=0) + base_rows
                end = tl.where(sample + 1 < after_sample, end, after_row)
                tail = tl.where((before == end) & (kept == 0), token - tl.maximum(previous + 1, sample * length), 0)
                run += tl.sum(begins.to(tl.int64), 0)
                begun_row = tl.maximum(begun_row, tl.max(tl.where(begins, before, -1), 0))
                newest = tl.max(tl.where(kept, token, -1), 0)
                last_kept = tl.where(newest >= 0, newest, last_kept)
            else:
                if cu_seqlens is not None:
                    tl.store(cu_seqlens + sample, start_row.to(tl.int32), mask=begins_sample)
            if row_start is not None:
                sample_row = start_row
                if DOCUMENTS:
                    sample_row = before
                tl.store(row_start + sample, sample_row, mask=begins_sample)
            if KEEP:
                position = tl.where(kept, before - start_row, tail)
                _emit(
                    source_index, text_index, position_ids, out_document_ids, image_ids, kind_ids, out_mask, labels, given_labels,
                    token, here, kept, token, kind, feature, image, position, document, True, DOCUMENTS,
                )  # fmt: skip
            else:
                tl.store(row_before + token, before.to(tl.int32), mask=here)
                if first_feature is not None:
                    tl.store(first_feature + token, feature.to(tl.int32), mask=here)
                if image_of_token is not None:
                    tl.store(image_of_token + token, image.to(tl.int32), mask=here)
                if document_row is not None:
                    tl.store(document_row + token, start_row.to(tl.int32), mask=here)
            at += BLOCK
        if here_chunk == chunks - 1:
            if SCHEME == IMAGES_FIRST:
                total_rows += tl.load(block_ends + samples)
            if row_start is not None:
                tl.store(row_start + samples, total_rows)
            if cu_seqlens is not None:
                first = tl.zeros((), tl.int64) + samples
                if DOCUMENTS:
                    first = run
                while first <= documents_wanted:
                    behind_all = first + tl.arange(0, BLOCK)
                    tl.store(cu_seqlens + behind_all, total_rows.to(tl.int32) + tl.zeros((BLOCK,), tl.int32), mask=behind_all <= documents_wanted)
                    first += BLOCK
    # written once: chunks tile the tokens, every sample and document begins in one chunk, what lies behind them is the last chunk's


@triton.jit(do_not_specialize=VARYING)
def rows_kernel(
    tokens, document_ids, image_ends, block_ends, block_starts, kinds,
    row_start, row_before, first_feature, image_of_token, document_row, run_of_token,
    source_index, text_index, position_ids, out_document_ids, image_ids, kind_ids, out_mask, labels, given_labels,
    samples, length, rows, width, search_steps, sample_steps, token_steps,
    K: tl.constexpr, SCHEME: tl.constexpr, MODES: tl.constexpr, IMAGES: tl.constexpr, DOCUMENTS: tl.constexpr,
    PACKED: tl.constexpr, LEFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK output rows of "padded" or "packed": it finds the token of each, or that it is padding."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = row < rows
    if PACKED:
        total = tl.load(row_start + samples)
        kept = here & (row < total)
        low = row * 0
        high = low + samples
        step = tl.zeros((), tl.int32)
        while step < sample_steps:
            # the last sample that does not begin behind the row
            middle = (low + high) >> 1
            open_ = high - low > 1
            goes = tl.load(row_start + middle, mask=here & open_, other=0) <= row
            low, high = tl.where(open_ & goes, middle, low), tl.where(open_ & (goes == 0), middle, high)
            step += 1
        sample = low
        ordinal = row
        tail = row - total
    else:
        sample = divide(row, width)
        column = row - sample * width
        first = tl.load(row_start + sample, mask=here, other=0)
        given = tl.load(row_start + sample + 1, mask=here, other=0) - first
        padding = column * 0
        if LEFT:
            padding = tl.maximum(width - given, 0)
        kept = here & (column >= padding) & (column - padding < given)
        ordinal = first + column - padding
        tail = column * 0
        if DOCUMENTS:
            tail = tl.where(column >= padding + given, column - padding - given, 0)
            if LEFT:
                tail = tl.where(given == 0, column, 0)
    inside = kept  # rows with a token
    token = row * 0 - 1
    kind = row * 0 - 1
    feature = row * 0 - 1
    image = row * 0 - 1
    if SCHEME == IMAGES_FIRST:
        offset = ordinal - tl.load(row_start + sample, mask=here, other=0)
        block = tl.load(block_ends + sample + 1, mask=here, other=0) - tl.load(block_ends + sample, mask=here, other=0)
        inside = kept & (offset >= block)
        before_images = tl.zeros((), tl.int64)
        for c in tl.static_range(K):
            begin = tl.load(block_starts + c * (samples + 1) + sample, mask=here, other=0)
            size = tl.load(block_starts + c * (samples + 1) + sample + 1, mask=here, other=0) - begin
            mine = kept & (offset < block) & (offset >= 0) & (offset < size)
            local = begin + offset
            kind = tl.where(mine, c, kind)
            feature = tl.where(mine & (local < field_of(kinds, c, 2)), field_of(kinds, c, 1) + local, feature)
            if mode_of(MODES, c) != UNKNOWN:
                if IMAGES:
                    number = image_with_row(image_ends, kinds, c, tl.where(mine, local, 0), search_steps, MODES)
                    image = tl.where(mine, before_images + number, image)
                before_images += field_of(kinds, c, 3)
            offset = offset - size
    low = sample * length
    high = low + length
    step = tl.zeros((), tl.int32)
    while step < token_steps:
        middle = (low + high) >> 1
        open_ = inside & (high - low > 1)
        goes = tl.load(row_before + middle, mask=open_, other=0) <= ordinal
        low, high = tl.where(open_ & goes, middle, low), tl.where(open_ & (goes == 0), middle, high)
        step += 1
    token = tl.where(inside, low, token)
    if SCHEME != IMAGES_FIRST:
        value = tl.load(tokens + token, mask=inside, other=0).to(tl.int64)
        for c in tl.static_range(K):
            kind = tl.where(inside & (value == field_of(kinds, c, 0)), c, kind)
        if first_feature is not None:
            feature = tl.load(first_feature + token, mask=inside & (kind >= 0), other=-1).to(tl.int64)
            if SCHEME == EXPAND:
                feature = tl.where(feature >= 0, feature + ordinal - tl.load(row_before + token, mask=inside, other=0), feature)
        if image_of_token is not None:
            image = tl.load(image_of_token + token, mask=inside, other=-1).to(tl.int64)
    document = sample
    begun = tl.load(row_start + sample, mask=here, other=0)
    if DOCUMENTS:
        if run_of_token is not None:
            document = tl.load(run_of_token + token, mask=inside, other=-1).to(tl.int64)
        if document_row is not None:
            begun = tl.load(document_row + token, mask=inside, other=0).to(tl.int64)
    position = tl.where(kept, ordinal - begun, tail)
    _emit(
        source_index, text_index, position_ids, out_document_ids, image_ids, kind_ids, out_mask, labels, given_labels,
        row, here, kept, token, kind, feature, image, position, document, False, PACKED or DOCUMENTS,
    )  # fmt: skip
    # written once: blocks tile the output rows, and each row is a kept one or padding


@triton.jit(do_not_specialize=VARYING)
def totals_kernel(
    summary, at_sample, block_ends, prefix, totals, samples, length, chunk, chunks,
    K: tl.constexpr, SCHEME: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The one program owns the totals: longest sample, rows, documents, placeholders of each kind."""
    number = tl.arange(0, CHUNKS)
    values = tl.load(summary + (2 * K + ROWS) * CHUNKS + number, mask=number < chunks, other=0)
    tl.store(prefix + number, tl.cumsum(values, 0) - values)
    tl.debug_barrier()
    total = tl.sum(values, 0)
    longest = tl.zeros((), tl.int64)
    at = tl.zeros((), tl.int64)
    while at < samples:
        sample = at + tl.arange(0, BLOCK)
        here = sample < samples
        follows = sample + 1 < samples
        begin = tl.load(at_sample + K * samples + sample, mask=here, other=0)
        begin += tl.load(prefix + divide(sample * length, chunk), mask=here, other=0)
        end = tl.load(at_sample + K * samples + sample + 1, mask=follows, other=0)
        end = tl.where(follows, end + tl.load(prefix + divide((sample + 1) * length, chunk), mask=follows, other=0), total)
        rows = end - begin
        if SCHEME == IMAGES_FIRST:
            rows += tl.load(block_ends + sample + 1, mask=here, other=0) - tl.load(block_ends + sample, mask=here, other=0)
        rows = tl.where(here, rows, 0)
        longest = tl.maximum(longest, tl.max(rows, 0))
        at += BLOCK
    if SCHEME == IMAGES_FIRST:
        total += tl.load(block_ends + samples)
    tl.store(totals, longest)
    tl.store(totals + 1, total)
    tl.store(totals + 2, before_chunk(summary, 2 * K + STARTS, chunks, chunks, CHUNKS))
    for c in tl.static_range(K):
        tl.store(totals + 3 + c, before_chunk(summary, c, chunks, chunks, CHUNKS))


# --- the host's side --------------------------------------------------------------------------------------------------


class _Counted(NamedTuple):
    """A batch as the kernels take it, counted chunk by chunk."""

    batch: Batch
    tokens: Tensor
    attention_mask: Tensor | None
    image_ends: Tensor | None
    count_ends: Tensor | None
    block_starts: Tensor | None  # (K, B + 1) images_first: rows of each kind before each sample's
    block_ends: Tensor | None  # (B + 1,) the same over all kinds
    kinds: tuple[int, ...]
    modes: int
    search_steps: int
    summary: Tensor
    at_sample: Tensor
    chunk: int
    chunks: int
    samples: int
    length: int
    open: bool  # document starts are counted (always where ids are given)


def _bytes(tensor: Tensor | None) -> Tensor | None:
    return tensor.view(torch.uint8) if tensor is not None and tensor.dtype is torch.bool else tensor


def _never_empty(batch: Batch) -> Batch:
    """A batch of no tokens as one of tokens that are not kept: kernels need not know the case."""
    samples, length = batch.tokens.shape
    if samples and length:
        return batch
    shape = (max(samples, 1), 1)
    absent = next(value for value in range(len(batch.kinds) + 1) if value not in batch.kinds[::5])
    tokens = batch.tokens.new_full(shape, 0 if batch.tokens.dtype is torch.bool else absent)
    ids = None if batch.document_ids is None else batch.document_ids.new_full(shape, -1)
    labels = None if batch.labels is None else batch.labels.new_zeros(shape)
    counts = batch.feature_counts
    return batch._replace(
        tokens=tokens,
        attention_mask=tokens.new_zeros(shape, dtype=torch.uint8),
        document_ids=ids,
        labels=labels,
        feature_counts=counts if samples else None,
        # without samples no image is anybody's
        scheme=batch.scheme if samples or SCHEMES[batch.scheme] == "placeholders" else SCHEMES.index("expand"),
    )


def _kind_fields(batch: Batch) -> tuple[list[int], int, int]:
    """(fields of every kind for the kernels, what is known of their sizes, the most images listed for one)."""
    fields: list[int] = []
    modes = listed = most = 0
    for c in range(batch.kind_count):
        token, first, rows, images, each = batch.kind(c)
        if abs(token) >= 2**61:
            raise NotImplementedError(f"the Triton backend takes placeholder ids of up to 61 bits, got {token}")
        if images == 0 or (images < 0 and SCHEMES[batch.scheme] == "expand"):
            images = each = 0  # an empty list needs no tensor
        fields += [token, first, rows, images, each, listed]
        if images >= 0:
            modes |= (1 if each >= 0 else 2) << (2 * c)
            if each < 0:
                listed += images
                most = max(most, images)
    return fields, modes, most


def _blocks(batch: Batch) -> Tensor:
    """(K, B + 1) rows of a kind before each sample's block of images (images_first)."""
    samples = batch.tokens.shape[0]
    starts = torch.zeros(batch.kind_count, samples + 1, dtype=torch.int64, device=batch.tokens.device)
    listed = 0
    for c in range(batch.kind_count):
        _, _, _, images, each = batch.kind(c)
        own = torch.zeros(samples, dtype=torch.int64, device=batch.tokens.device)
        if images >= 0:
            n = min(images, samples)
            own[:n] = each if each >= 0 else batch.image_rows[listed : listed + n]
            listed += images if each < 0 else 0
        if batch.feature_counts is not None and images >= 0:
            counts = batch.feature_counts[c]
            own = torch.where(counts[:1] >= 0, counts, own)
        torch.cumsum(own.clamp(min=0), 0, out=starts[c, 1:])
    return starts


def _count(batch: Batch, runs: bool, documents: bool = False) -> _Counted:
    batch = _never_empty(batch)
    samples, length = batch.tokens.shape
    total, kinds = samples * length, batch.kind_count
    if kinds > KIND_LANES.value:
        raise NotImplementedError(f"the Triton backend takes up to {KIND_LANES.value} kinds of placeholder, got {kinds}")
    fields, modes, most = _kind_fields(batch)
    chunk = BLOCK * triton.cdiv(total, BLOCK * CHUNKS)
    device, expand, first = batch.tokens.device, SCHEMES[batch.scheme] == "expand", SCHEMES[batch.scheme] == "images_first"
    starts = _blocks(batch) if first else None
    counted = _Counted(
        batch,
        _bytes(batch.tokens),
        _bytes(batch.attention_mask),
        batch.image_rows.cumsum(0) if most else None,
        batch.feature_counts.cumsum(1) if batch.feature_counts is not None and kinds else None,
        starts,
        starts.sum(0) if starts is not None else None,
        encode_kinds(fields),
        modes,
        most.bit_length(),
        torch.empty((2 * kinds + MORE_FIELDS) * CHUNKS, dtype=torch.int64, device=device),
        torch.empty((kinds + 1) * samples, dtype=torch.int64, device=device),
        chunk,
        triton.cdiv(total, chunk),
        samples,
        length,
        batch.document_ids is not None or documents,
    )
    for of_tokens in (True, False) if expand else (True,):
        count_kernel[(counted.chunks,)](
            counted.tokens, counted.attention_mask, batch.document_ids, counted.image_ends, _counts(counted), counted.count_ends,
            counted.kinds, counted.summary, counted.at_sample, samples, length, total, chunk, counted.chunks, counted.search_steps,
            kinds, batch.scheme, modes, of_tokens, runs and not expand, counted.open, kinds > 0, BLOCK, CHUNKS, **SCAN,
        )  # fmt: skip
    return counted


def _counts(counted: _Counted) -> Tensor | None:
    return counted.batch.feature_counts if counted.count_ends is not None else None


def count(batch: Batch) -> tuple[int, int, int, tuple[int, ...]]:
    """Kept rows of the longest sample, of all samples, documents, and the placeholders of each kind. Waits for the device."""
    with on_device_of(batch.tokens):
        counted = _count(batch, False, documents=True)
        totals = torch.empty(3 + batch.kind_count, dtype=torch.int64, device=batch.tokens.device)
        prefix = torch.empty(CHUNKS, dtype=torch.int64, device=batch.tokens.device)
        totals_kernel[(1,)](
            counted.summary, counted.at_sample, counted.block_ends, prefix, totals,
            counted.samples, counted.length, counted.chunk, counted.chunks,
            batch.kind_count, counted.batch.scheme, BLOCK, CHUNKS, **SCAN,
        )  # fmt: skip
        longest, rows, documents, *placeholders = totals.tolist()
    return longest, rows, documents, tuple(placeholders)


def _make(batch: Batch, width: int, names: tuple[str, ...], documents: int, status: Tensor | None) -> dict[str, Tensor]:
    """The named facts, source_index among them; with a status the checks as well."""
    samples, device = batch.tokens.shape[0], batch.tokens.device
    keep, packed = LAYOUTS[batch.layout] == "keep", LAYOUTS[batch.layout] == "packed"
    given = batch.document_ids is not None
    shape = (1 if packed else samples, width)
    out = {name: torch.empty(shape, dtype=_DTYPES.get(name) or batch.labels.dtype, device=device) for name in names if name != "cu_seqlens"}
    last = documents if given else samples
    if "cu_seqlens" in names:
        out["cu_seqlens"] = torch.empty(last + 1, dtype=torch.int32, device=device)
    wants = out.get
    images = "image_ids" in names
    counted = _count(batch, images)
    batch, samples, length = counted.batch, counted.samples, counted.length
    total = samples * length

    def scratch(needed: bool, size: int = total, dtype: torch.dtype = torch.int32) -> Tensor | None:
        return torch.empty(size, dtype=dtype, device=device) if needed else None

    row_start = scratch(not keep, samples + 1, torch.int64)
    row_before = scratch(not keep)
    first_feature = scratch(not keep and "source_index" in names and SCHEMES[batch.scheme] != "images_first")
    image_of_token = scratch(not keep and images and SCHEMES[batch.scheme] != "images_first")
    document_row = scratch(not keep and given and ("position_ids" in names or "labels" in names))
    run_of_token = scratch(not keep and given and "document_ids" in names)
    run_token = scratch(given and status is not None)
    check = status is not None
    prefix = scratch(check, (batch.kind_count + 1) * CHUNKS, torch.int64)
    record = (torch.empty(8, dtype=torch.int64, device=device) if given else status) if check else None
    facts_out = [_bytes(wants(name)) for name in ("source_index", "text_index", "position_ids", "document_ids", "image_ids", "kind_ids")]
    facts_out += [_bytes(wants("attention_mask")), wants("labels"), batch.labels if "labels" in names else None]
    own = facts_out if keep and counted.batch.tokens.numel() == shape[0] * width else [None] * len(facts_out)
    tokens_kernel[(counted.chunks + check,)](
        counted.tokens, counted.attention_mask, batch.document_ids, counted.image_ends, _counts(counted), counted.count_ends,
        counted.block_ends, counted.kinds, counted.summary, counted.at_sample,
        row_start, row_before, first_feature, image_of_token, document_row, run_of_token, run_token, wants("cu_seqlens"),
        *own, prefix, record, status if check else None,
        samples, length, total, counted.chunk, counted.chunks, counted.search_steps, width, last,
        batch.kind_count, batch.scheme, counted.modes, images, given, keep, packed, batch.unused, int(check), BLOCK, CHUNKS,
        **SCAN,
    )  # fmt: skip
    if check and given:
        returns_kernel[(1,)](
            batch.document_ids, run_token, counted.summary, record, status, length, counted.chunks,
            batch.kind_count, 16 if INTERPRETED.value else 32, CHUNKS, **SCAN,
        )  # fmt: skip
    rows = shape[0] * width
    if not keep and rows and facts_out != [None] * len(facts_out):
        rows_kernel[(triton.cdiv(rows, BLOCK),)](
            counted.tokens, batch.document_ids, counted.image_ends, counted.block_ends, counted.block_starts, counted.kinds,
            row_start, row_before, first_feature, image_of_token, document_row, run_of_token, *facts_out,
            samples, length, rows, width, counted.search_steps, samples.bit_length(), length.bit_length(),
            batch.kind_count, batch.scheme, counted.modes, images, given, packed, batch.left, BLOCK, **SCAN,
        )  # fmt: skip
    return out


def plan(batch: Batch, width: int, status) -> Tensor:
    """``(G, W)`` int32 source_index: feature row k >= 0, -1 - j for token j, or PAD."""
    with on_device_of(batch.tokens):
        if status is RAISE:
            found = torch.zeros(8, dtype=torch.int64, device=batch.tokens.device)
            source_index = _make(batch, width, ("source_index",), 0, found)["source_index"]
            record = tuple(found.tolist())
            if record[0]:
                raise RecordedError(record)
            return source_index
        return _make(batch, width, ("source_index",), 0, status)["source_index"]


def facts(batch: Batch, width: int, names: tuple[str, ...], documents: int) -> tuple[Tensor, ...]:
    """The named facts of the output rows, in that order. `documents` sizes cu_seqlens where document_ids were given."""
    if not names:
        return ()
    with on_device_of(batch.tokens):
        made = _make(batch, width, tuple(names), documents, None)
    return tuple(made[name] for name in names)
