"""The rows themselves: every output row copied from its source, and every gradient row gathered back.

Launches: `rows` 1 (2 where a bad token id must raise at once). `rows_backward` 3: a fill, the inverse of the plan, all
gradient rows; a weight gradient adds a stable sort of the ids, a search for each id's rows, and one launch for the sums.
"""

from __future__ import annotations

import functools
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batch import OUTSIDE_VOCABULARY, RAISE, RecordedError
from .triton_launch import INTERPRETED, LANES, on_device_of, row_shape, unit
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
            wide = _widen(x, WIDE)
            x = tl.where(cols < text_limit, _widen(base, WIDE) + wide, wide)  # no text: -0.0 stays what it is
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


@functools.lru_cache(maxsize=64)
def _scale_bits(scale: float | None, dtype: torch.dtype) -> int:
    """The scale rounded to the weight's dtype, as the bits of a double: an argument of no other type carries all of them."""
    if scale is None:
        return 0
    (rounded,) = torch.tensor([scale], dtype=dtype, device="cpu").tolist()
    return struct.unpack("<q", struct.pack("<d", rounded))[0]


def rows(
    out: Tensor, text: Tensor | None, weight: Tensor | None, tokens: Tensor | None, scale: float | None, features, starts,
    source_index: Tensor, text_index: Tensor | None, add: bool, only_features: bool, status,
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
    check = fused and status is not None and status is not RAISE
    if check:
        # the one program that looks at every id should be done before the others are: give it threads
        warps = max(warps, min(4, block // (8 * LANES)))
    checked = 64 if INTERPRETED.value else 32 * warps * _CHECKED.value
    with on_device_of(out):
        if fused and status is RAISE:
            found = torch.zeros(8, dtype=torch.int64, device=out.device)
            vocabulary_kernel[(1,)](
                source_index, text_index, tokens, token_count, read.rows, count, found, add, text_index is not None, 64 if INTERPRETED.value else 2048, num_warps=4
            )
            record = tuple(found.tolist())
            if record[0] == OUTSIDE_VOCABULARY:
                raise RecordedError(record)
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


# --- the way back -----------------------------------------------------------------------------------------------------


# slices of one buffer: their alignment depends on how many feature rows there are
_SLICES = ["row_of_feature", "row_of_token"]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICES)
def inverse_kernel(
    source_index, text_index, tokens, row_of_feature, row_of_token, ids,
    rows, feature_rows, text_rows, token_count, vocabulary,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK output rows: it notes each at its feature row and its token, and the id of the embedding it read."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = row < rows
    source = tl.load(source_index + row, mask=here, other=_NO_ROW)
    token = -1 - source  # PAD gives a token beyond every text
    first_of_token = here
    if ADD:
        if text_index is None:
            token = row.to(tl.int32)
        else:
            stands = tl.load(text_index + row, mask=here, other=-1)
            before = tl.load(text_index + row - 1, mask=here & (row > 0), other=-1)
            token = tl.where(source >= 0, stands, token)
            first_of_token = here & ((source < 0) | (before != stands))
    if row_of_feature is not None:
        tl.store(row_of_feature + source, row.to(tl.int32), mask=here & (source >= 0) & (source < feature_rows))
    if row_of_token is not None:
        tl.store(row_of_token + token, row.to(tl.int32), mask=first_of_token & (token >= 0) & (token < text_rows))
    if ids is not None:
        known = here & (token >= 0) & (token < token_count)
        found = tl.load(tokens + token, mask=known, other=-1).to(tl.int64)
        known &= (found >= 0) & (found < vocabulary)
        tl.store(ids + row, tl.where(known, found, vocabulary).to(tl.int32), mask=here)
    # written once: a feature row has one output row, a token one or neighbouring ones of which only the first is noted


@triton.jit
def _gather_row(
    target, grad, row, limit, text_index, rows, token, grad_width, grad_stride0, grad_stride1, grad_column,
    D: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, SPLIT: tl.constexpr, STRIDED: tl.constexpr,
    SUM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write one gradient row: output row `row` of grad converted, with SUM the sum of it and those after it of the same token."""
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        pointer = grad + offset_of(row, grad_width, grad_stride0, grad_stride1, UNIT, SPLIT)
        x = tl.load(pointer + _columns(cols, grad_column, STRIDED), mask=cols < limit, other=0.0, eviction_policy="evict_first")
        if SUM:
            total = _widen(x, WIDE)
            following = row + 1
            more = (limit > 0) & (following < rows)
            if more:
                more = tl.load(text_index + following) == token
            while more:
                pointer = grad + offset_of(following, grad_width, grad_stride0, grad_stride1, UNIT, SPLIT)
                total += _widen(tl.load(pointer + _columns(cols, grad_column, STRIDED), mask=cols < D, other=0.0), WIDE)
                following += 1
                more = following < rows
                if more:
                    more = tl.load(text_index + following) == token
            tl.store(target + cols, convert(total, target.dtype.element_ty), mask=cols < D)
        else:
            tl.store(target + cols, convert(x, target.dtype.element_ty), mask=cols < D)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_SLICES)
def gather_kernel(
    grad, row_of_feature, row_of_token, text_index, grad_text, grad_features, table,
    rows, text_rows, first, entries, grad_width, grad_stride0, grad_stride1, grad_column,
    D: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, SPLIT: tl.constexpr, STRIDED: tl.constexpr,
    ALIGNED: tl.constexpr, DTYPES: tl.constexpr, SUM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program owns one gradient row: those of the text first, then those of the features."""
    program = tl.program_id(0)
    if program < text_rows:
        if grad_text is not None:
            row = program
            if row_of_token is not None:
                row = tl.load(row_of_token + program)
            _gather_row(
                grad_text + program.to(tl.int64) * D, grad, tl.maximum(row, 0), tl.where(row >= 0, D, 0), text_index, rows, program,
                grad_width, grad_stride0, grad_stride1, grad_column, D, BLOCK, UNIT, SPLIT, STRIDED, SUM, WIDE,
            )  # fmt: skip
    else:
        number = program - text_rows
        if DTYPES == 0:
            if grad_features is not None:
                row = tl.load(row_of_feature + first + number)
                _gather_row(
                    grad_features + number.to(tl.int64) * D, grad, tl.maximum(row, 0), tl.where(row >= 0, D, 0), text_index, rows, 0,
                    grad_width, grad_stride0, grad_stride1, grad_column, D, BLOCK, UNIT, SPLIT, STRIDED, False, WIDE,
                )  # fmt: skip
        else:
            at = find_entry(table, entries, number)
            local = number - tl.load(at + 1).to(tl.int32)
            row = tl.load(row_of_feature + tl.load(at + 3).to(tl.int32) + local)
            address = tl.load(at)
            code = tl.load(at + 7)
            offset = local.to(tl.int64) * D
            for option in tl.static_range(4):
                if (DTYPES >> option) & 1:
                    if (DTYPES == 1 << option) or code == option:
                        _gather_row(
                            _typed(address, option, ALIGNED) + offset, grad, tl.maximum(row, 0), tl.where(row >= 0, D, 0), text_index, rows, 0,
                            grad_width, grad_stride0, grad_stride1, grad_column, D, BLOCK, UNIT, SPLIT, STRIDED, False, WIDE,
                        )  # fmt: skip
    # written once: programs and gradient rows are one to one


@triton.jit(do_not_specialize=_VARYING)
def weight_kernel(
    grad, order, begins, grad_weight, scale, grad_width, grad_stride0, grad_stride1, grad_column,
    D: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, SPLIT: tl.constexpr, STRIDED: tl.constexpr,
    SCALED: tl.constexpr, WIDE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK columns of one embedding row and adds its output rows in ascending order."""
    token = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    low = tl.load(begins + token)
    high = tl.load(begins + token + 1)
    total = tl.zeros((BLOCK,), WIDE)
    at = low
    while at < high:
        # four loads in flight; a row beyond the last adds zeros, which change no sum that began at zero
        x0 = _sorted_row(grad, order, at, high, cols, grad_width, grad_stride0, grad_stride1, grad_column, D, UNIT, SPLIT, STRIDED)
        x1 = _sorted_row(grad, order, at + 1, high, cols, grad_width, grad_stride0, grad_stride1, grad_column, D, UNIT, SPLIT, STRIDED)
        x2 = _sorted_row(grad, order, at + 2, high, cols, grad_width, grad_stride0, grad_stride1, grad_column, D, UNIT, SPLIT, STRIDED)
        x3 = _sorted_row(grad, order, at + 3, high, cols, grad_width, grad_stride0, grad_stride1, grad_column, D, UNIT, SPLIT, STRIDED)
        total = total + _widen(x0, WIDE)
        total = total + _widen(x1, WIDE)
        total = total + _widen(x2, WIDE)
        total = total + _widen(x3, WIDE)
        at += 4
    if SCALED:
        total = total * scale.to(tl.int64).to(tl.float64, bitcast=True).to(WIDE)
    target = grad_weight + token.to(tl.int64) * D
    wanted = cols < D
    if ACCUMULATE:
        wanted = cols < tl.where(low < high, D, 0)
        total = _widen(tl.load(target + cols, mask=wanted, other=0.0), WIDE) + total
    tl.store(target + cols, convert(total, grad_weight.dtype.element_ty), mask=wanted)
    # written once: programs tile (V, D)


@triton.jit
def _sorted_row(
    grad, order, at, high, cols, width, stride0, stride1, column,
    D: tl.constexpr, UNIT: tl.constexpr, SPLIT: tl.constexpr, STRIDED: tl.constexpr,
):  # fmt: skip
    row = tl.load(order + at, mask=at < high, other=0).to(tl.int32)
    pointer = grad + offset_of(row, width, stride0, stride1, UNIT, SPLIT)
    return tl.load(pointer + _columns(cols, column, STRIDED), mask=cols < tl.where(at < high, D, 0), other=0.0)


def rows_backward(
    grad: Tensor, source_index: Tensor, text_index: Tensor | None, tokens: Tensor | None, scale: float | None, starts, add: bool,
    grad_text: Tensor | None, grad_weight: Tensor | None, grad_features,
) -> None:  # fmt: skip
    """Every gradient row is the row of `grad` that came from it (for the embedding weight: the sum of them), or zero."""
    count, dim = source_index.numel(), grad.shape[-1]
    wanted = [(first, out) for first, out in zip(starts, grad_features) if out is not None and out.numel()]
    text_rows = grad_text.numel() // dim if grad_text is not None and dim else 0
    if not dim or (not wanted and not text_rows and (grad_weight is None or not grad_weight.numel())):
        return
    if not count:
        for out in (grad_text, grad_weight, *(out for _, out in wanted)):
            if out is not None:
                out.zero_()
        return
    strides, constants = _read_grad(grad)
    feature_rows = max((first + out.numel() // dim for first, out in wanted), default=0)
    summed = add and text_index is not None
    copied = add and text_index is None  # row r of the text is row r of the output
    block, warps = row_shape(dim)
    with on_device_of(grad):
        noted = text_rows if not copied else 0
        inverse = torch.full((feature_rows + noted,), -1, dtype=torch.int32, device=grad.device) if feature_rows + noted else None
        row_of_feature = inverse[:feature_rows] if feature_rows else None
        row_of_token = inverse[feature_rows:] if noted else None
        vocabulary = grad_weight.shape[0] if grad_weight is not None else 0
        ids = torch.empty(count, dtype=torch.int32, device=grad.device) if vocabulary else None
        if inverse is not None or ids is not None:
            span = 64 if INTERPRETED.value else 1024
            inverse_kernel[(triton.cdiv(count, span),)](
                source_index, text_index, tokens, row_of_feature, row_of_token, ids,
                count, feature_rows, noted, tokens.numel() if tokens is not None else 0, vocabulary, add, span, num_warps=4,
            )  # fmt: skip
        if wanted or text_rows:
            _gather(grad, row_of_feature, row_of_token, text_index, grad_text, wanted, count, text_rows, dim, strides, constants, summed, block, warps)
        if vocabulary:
            _add_up(grad, ids, grad_weight, scale, False)


def _read_grad(grad: Tensor) -> tuple[tuple, tuple]:
    """(strides, what of them is constant) of `grad` as kernels take it."""
    read = entry(grad)
    width = unit(read.stride0, read.stride1)
    return (read.width, read.stride0 // width, read.stride1 // width, read.column), (width, read.width > 0, read.column != 1)


def _add_up(grad, ids, target, scale, accumulate: bool) -> None:
    """The rows of `grad`, sorted by id, as the gradient of an embedding table."""
    vocabulary, dim = target.shape
    strides, constants = _read_grad(grad)
    order_of = torch.sort(ids, stable=True)
    begins = torch.searchsorted(order_of.values, torch.arange(vocabulary + 1, dtype=torch.int32, device=grad.device))
    wide = tl.float64 if torch.float64 in (grad.dtype, target.dtype) else tl.float32
    columns = min(row_shape(dim)[0], 1024)
    weight_kernel[(vocabulary, triton.cdiv(dim, columns))](
        grad, order_of.indices, begins, target, _scale_bits(scale, target.dtype), *strides,
        dim, columns, *constants, scale is not None, wide, accumulate, num_warps=max(1, columns // 512), enable_fp_fusion=False,
    )  # fmt: skip


def accumulate_weight(grad: Tensor, source_index: Tensor, text_index: Tensor | None, tokens: Tensor, scale: float | None, add: bool, weight_grad: Tensor) -> None:
    """Add the embedding weight's gradient to what is in `weight_grad`; rows of ids that do not occur are not touched."""
    count = source_index.numel()
    if not count or not weight_grad.numel():
        return
    with on_device_of(grad):
        ids = torch.empty(count, dtype=torch.int32, device=grad.device)
        span = 64 if INTERPRETED.value else 1024
        inverse_kernel[(triton.cdiv(count, span),)](
            source_index, text_index, tokens, None, None, ids, count, 0, 0, tokens.numel(), weight_grad.shape[0], add, span, num_warps=4
        )
        _add_up(grad, ids, weight_grad, scale, True)


def _gather(grad, row_of_feature, row_of_token, text_index, grad_text, wanted, count, text_rows, dim, strides, constants, summed, block, warps):
    first, direct, table, aligned, dtypes, entries = 0, None, None, False, 0, len(wanted)
    total = sum(out.numel() // dim for _, out in wanted)
    if entries == 1:
        first, direct = wanted[0]
    elif entries:
        begins, listed = 0, []
        for start, out in wanted:
            # `first` is the number among the rows to write, `width` the number of the feature row
            listed.append(entry(out.view(-1, dim), begins)._replace(width=start))
            begins += out.numel() // dim
        packed: Rows = pack(listed, grad)
        table, aligned, dtypes = packed.table, packed.ALIGNED, packed.DTYPES
    doubles = {grad.dtype, grad_text.dtype} if summed and grad_text is not None else set()
    gather_kernel[(text_rows + total,)](
        grad, row_of_feature, row_of_token, text_index, grad_text if text_rows else None, direct, table,
        count, text_rows, first, entries, *strides, dim, block, *constants,
        aligned, dtypes, summed, tl.float64 if torch.float64 in doubles else tl.float32, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
