"""The rows themselves: every output row copied from its source, and every gradient row gathered back.

Launches: `rows` 1 (2 where a bad token id must raise at once). `rows_backward` 3: a fill, the inverse of the plan, all
gradient rows; a weight gradient adds a stable sort of the ids, a search for each id's rows, and one launch for the sums.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batch import OUTSIDE_VOCABULARY, RAISE, RecordedError
from .triton_launch import INTERPRETED, on_device_of, row_shape, unit
from .triton_numbers import convert, to_float32
from .triton_tables import Rows, entry, find_entry, join, offset_of, pack, table_offset

_NO_ROW = tl.constexpr(-(2**31))  # PAD of batch.py
_CHECKED = tl.constexpr(16)  # rows a thread checks at once for ids outside the table

# sizes and strides change from step to step: none of them is part of a specialisation
_VARYING = [
    "rows", "out_width", "out_stride0", "out_stride1", "text_rows", "text_width", "text_stride0", "text_stride1", "text_column",
    "token_count", "vocabulary", "scale", "first", "feature_rows", "feature_width", "feature_stride0", "feature_stride1",
    "feature_column", "entries", "grad_width", "grad_stride0", "grad_stride1", "grad_column", "flat_rows",
]  # fmt: skip


@triton.jit
def _scaled(x, scale, SCALED: tl.constexpr):
    # the product is rounded to the weight's dtype before anything else happens to it
    if SCALED:
        if x.dtype == tl.float64:
            x = x * scale.to(tl.int64).to(tl.float64, bitcast=True)
        else:
            factor = scale.to(tl.int64).to(tl.float64, bitcast=True).to(tl.float32)
            x = convert(to_float32(x) * factor, x.dtype)
    return x


@triton.jit
def _widen(x, WIDE: tl.constexpr):
    if WIDE == tl.float64:
        y = convert(x, tl.float64)
    else:
        y = to_float32(x)
    return y


@triton.jit
def _columns(cols, column, STRIDED: tl.constexpr):
    if STRIDED:
        cols = cols.to(tl.int64) * column
    return cols


@triton.jit
def _load_text(pointer, cols, limit, column, scale, SCALED: tl.constexpr, STRIDED: tl.constexpr, REUSED: tl.constexpr):
    # embedding rows occur again (the same token), rows of a batch do not
    if REUSED:
        x = tl.load(pointer + _columns(cols, column, STRIDED), mask=cols < limit, other=0.0)
    else:
        x = tl.load(pointer + _columns(cols, column, STRIDED), mask=cols < limit, other=0.0, eviction_policy="evict_first")
    x = _scaled(x, scale, SCALED)
    if SCALED:
        x = tl.where(cols < limit, x, 0.0)  # 0 * inf
    return x


@triton.jit
def _write_feature(
    target, pointer, column, limit, text, text_column, text_limit, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, STRIDED: tl.constexpr,
    ADD: tl.constexpr, WIDE: tl.constexpr, SCALED: tl.constexpr, TEXT_STRIDED: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    # limit is D, or 0 for a row that is not there: both constants, so the masked accesses stay 16 bytes wide
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(pointer + _columns(cols, column, STRIDED), mask=cols < limit, other=0.0, eviction_policy="evict_first")
        if ADD:
            base = _load_text(text, cols, text_limit, text_column, scale, SCALED, TEXT_STRIDED, FUSED)
            x = _widen(base, WIDE) + _widen(x, WIDE)
        tl.store(target + cols, convert(x, target.dtype.element_ty), mask=cols < D)


@triton.jit
def _typed(address, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    if CODE == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif CODE == 1:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    elif CODE == 2:
        pointer = address.to(tl.pointer_type(tl.float16))
    else:
        pointer = address.to(tl.pointer_type(tl.float64))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _text_row(token, text_rows, tokens, token_count, vocabulary, FUSED: tl.constexpr):
    """(row of the table, whether it is one) of flat token `token`; the row is 0 where it is none."""
    if FUSED:
        known = (token >= 0) & (token < token_count)
        found = tl.load(tokens + tl.where(known, token, 0), mask=known, other=-1).to(tl.int64)
        known = (found >= 0) & (found < vocabulary)
        row = tl.where(known, found, 0)
    else:
        known = (token >= 0) & (token < text_rows)
        row = tl.where(known, token, 0)
    return row, known


@triton.jit
def _report_outside(
    source_index, text_index, tokens, token_count, vocabulary, rows, status,
    ADD: tl.constexpr, STANDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # one program looks at all rows in order, so that the first bad one wins whatever else runs
    bad = tl.zeros((), tl.int64) + rows
    start = tl.zeros((), tl.int64)
    while start < rows:
        row = start + tl.arange(0, BLOCK)
        here = row < rows
        source = tl.load(source_index + row, mask=here, other=_NO_ROW)
        token = -1 - source
        if ADD:
            if STANDS:
                token = tl.where(source >= 0, tl.load(text_index + row, mask=here, other=-1), token)
            else:
                token = row.to(tl.int32)
        else:
            here &= source < 0
        here &= (token >= 0) & (token < token_count)
        found = tl.load(tokens + token, mask=here, other=0).to(tl.int64)
        outside = here & ((found < 0) | (found >= vocabulary))
        bad = tl.minimum(bad, tl.min(tl.where(outside, row, rows), 0))
        start = tl.where(bad < rows, tl.zeros((), tl.int64) + rows, start + BLOCK)
    if bad < rows:
        if tl.load(status) == 0:
            source = tl.load(source_index + bad)
            token = -1 - source
            if ADD:
                if STANDS:
                    if source >= 0:
                        token = tl.load(text_index + bad)
                else:
                    token = bad.to(tl.int32)
            tl.store(status, 7)
            tl.store(status + 1, token.to(tl.int64))
            for field in tl.static_range(2, 6):
                tl.store(status + field, 0)
            tl.store(status + 6, tl.zeros((), tl.int64) + vocabulary)
            tl.store(status + 7, tl.load(tokens + token).to(tl.int64))


@triton.jit(do_not_specialize=_VARYING)
def vocabulary_kernel(
    source_index, text_index, tokens, token_count, vocabulary, rows, status,
    ADD: tl.constexpr, STANDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The one program owns the status: it reports the first row whose token id lies outside the table."""
    _report_outside(source_index, text_index, tokens, token_count, vocabulary, rows, status, ADD, STANDS, BLOCK)


@triton.jit(do_not_specialize=_VARYING)
def rows_kernel(
    out, source_index, text_index, text, tokens, features, table, status,
    rows, out_width, out_stride0, out_stride1,
    text_rows, text_width, text_stride0, text_stride1, text_column,
    token_count, vocabulary, scale,
    first, feature_rows, feature_width, feature_stride0, feature_stride1, feature_column, entries,
    D: tl.constexpr, BLOCK: tl.constexpr, OUT_UNIT: tl.constexpr, OUT_SPLIT: tl.constexpr,
    TEXT_UNIT: tl.constexpr, TEXT_SPLIT: tl.constexpr, TEXT_STRIDED: tl.constexpr, FUSED: tl.constexpr, SCALED: tl.constexpr,
    UNIT: tl.constexpr, SPLIT: tl.constexpr, STRIDED: tl.constexpr, ALIGNED: tl.constexpr, DTYPES: tl.constexpr,
    ADD: tl.constexpr, STANDS: tl.constexpr, ONLY_FEATURES: tl.constexpr, WIDE: tl.constexpr, CHECK: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """A program owns one output row; with CHECK the first program owns the status instead."""
    row = tl.program_id(0) - CHECK
    if row < 0:
        if CHECK:
            _report_outside(source_index, text_index, tokens, token_count, vocabulary, rows, status, ADD, STANDS, CHECKED)
    else:
        source = tl.load(source_index + row)
        target = out + offset_of(row, out_width, out_stride0, out_stride1, OUT_UNIT, OUT_SPLIT)
        if source >= 0:
            base = target
            base_limit = D
            if ADD:
                token = row
                if STANDS:
                    token = tl.load(text_index + row)
                found, base_known = _text_row(token, text_rows, tokens, token_count, vocabulary, FUSED)
                base_limit = tl.where(base_known, D, 0)
                base = text + offset_of(found, text_width, text_stride0, text_stride1, TEXT_UNIT, TEXT_SPLIT)
            if DTYPES == 0:
                local = source - first
                known = (local >= 0) & (local < feature_rows)
                local = tl.where(known, local, 0)
                if features is None:
                    for start in range(0, D, BLOCK):
                        cols = start + tl.arange(0, BLOCK)
                        x = tl.zeros((BLOCK,), tl.float32)
                        if ADD:
                            x = _load_text(base, cols, base_limit, text_column, scale, SCALED, TEXT_STRIDED, FUSED)
                        tl.store(target + cols, convert(x, target.dtype.element_ty), mask=cols < D)
                else:
                    feature = features + offset_of(local, feature_width, feature_stride0, feature_stride1, UNIT, SPLIT)
                    _write_feature(
                        target, feature, feature_column, tl.where(known, D, 0), base, text_column, base_limit, scale,
                        D, BLOCK, STRIDED, ADD, WIDE, SCALED, TEXT_STRIDED, FUSED,
                    )  # fmt: skip
            else:
                at = find_entry(table, entries, source)
                local = source - tl.load(at + 1).to(tl.int32)
                known = (local >= 0) & (local < tl.load(at + 2))
                local = tl.where(known, local, 0)
                offset = table_offset(at, local, UNIT, SPLIT)
                address = tl.load(at)
                column = tl.load(at + 6)
                code = tl.load(at + 7)
                for option in tl.static_range(4):
                    if (DTYPES >> option) & 1:
                        if (DTYPES == 1 << option) or code == option:
                            _write_feature(
                                target, _typed(address, option, ALIGNED) + offset, column, tl.where(known, D, 0), base, text_column, base_limit, scale,
                                D, BLOCK, STRIDED, ADD, WIDE, SCALED, TEXT_STRIDED, FUSED,
                            )  # fmt: skip
        else:
            if not ONLY_FEATURES:
                token = -1 - source
                if ADD and not STANDS:
                    token = row
                found, known = _text_row(token, text_rows, tokens, token_count, vocabulary, FUSED)
                pointer = text + offset_of(found, text_width, text_stride0, text_stride1, TEXT_UNIT, TEXT_SPLIT)
                limit = tl.where(known, D, 0)  # nothing is read, and zeros are written, where there is no such row
                for start in range(0, D, BLOCK):
                    cols = start + tl.arange(0, BLOCK)
                    x = _load_text(pointer, cols, limit, text_column, scale, SCALED, TEXT_STRIDED, FUSED)
                    tl.store(target + cols, convert(x, target.dtype.element_ty), mask=cols < D)
    # written once: rows and programs are one to one, each takes one of three branches, and the columns of a branch do not overlap


def _scale_bits(scale: float | None, dtype: torch.dtype) -> int:
    """The scale rounded to the weight's dtype, as the bits of a double: an argument of no other type carries all of them."""
    if scale is None:
        return 0
    return struct.unpack("<q", struct.pack("<d", torch.tensor(scale, dtype=dtype).to(torch.float64).item()))[0]  # on the host


def rows(
    out: Tensor, text: Tensor | None, weight: Tensor | None, tokens: Tensor | None, scale: float | None, features, starts,
    source_index: Tensor, text_index: Tensor | None, add: bool, only_features: bool, status, fresh: bool = False,
) -> None:  # fmt: skip
    """Write every output row: a copy of its feature row or of its token's embedding, converted; with add the sum of both."""
    count, dim = source_index.numel(), out.shape[-1]
    if not count or not dim:
        return
    fused = weight is not None
    source = weight if fused else text if text is not None else out
    to, read = entry(out), entry(source)
    packed = pack(join(features, starts), out)
    block, warps = row_shape(dim)
    out_unit, text_unit = unit(to.stride0, to.stride1), unit(read.stride0, read.stride1)
    token_count = tokens.numel() if fused else 0
    checked = 64 if INTERPRETED.value else 32 * warps * _CHECKED.value
    with on_device_of(out):
        if fused and status is RAISE:
            found = torch.zeros(8, dtype=torch.int64, device=out.device)
            vocabulary_kernel[(1,)](
                source_index, text_index, tokens, token_count, read.rows, count, found, add, text_index is not None, checked, num_warps=4
            )
            record = tuple(found.tolist())
            if record[0] == OUTSIDE_VOCABULARY:
                raise RecordedError(record)
        check = fused and status is not None and status is not RAISE
        double = torch.float64 in (source.dtype, *(f.dtype for f in features))
        one = packed.one
        rows_kernel[(count + check,)](
            out, source_index, text_index, source, tokens if fused else None, packed.direct, packed.table, status if check else None,
            count, to.width, to.stride0 // out_unit, to.stride1 // out_unit,
            read.rows, read.width, read.stride0 // text_unit, read.stride1 // text_unit, read.column,
            token_count, read.rows, _scale_bits(scale, source.dtype) if fused else 0,
            one.first, one.rows, one.width, one.stride0, one.stride1, one.column, packed.entries,
            dim, block, out_unit, to.width > 0,
            text_unit, read.width > 0, read.column != 1, fused, fused and scale is not None,
            packed.UNIT, packed.SPLIT, packed.STRIDED, packed.ALIGNED, packed.DTYPES,
            add, text_index is not None, only_features, tl.float64 if double else tl.float32, int(check), checked,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
