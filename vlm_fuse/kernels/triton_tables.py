"""Tables of rows: one tensor as direct arguments, several through a small device table of base pointers.

Nothing is concatenated: a kernel finds the tensor that a row lies in by its first row. Tensors that are neighbours in
memory (most lists are views of one tensor) become one entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import is_capturing, unit

FIELDS = tl.constexpr(8)  # address, first, rows, width, stride0, stride1, column, dtype code

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


class Entry(NamedTuple):
    """`rows` rows from number `first` on. Row k lies at (k // width) * stride0 + (k % width) * stride1 elements."""

    tensor: Tensor
    first: int
    rows: int
    width: int  # 0: not split, row k lies at k * stride1
    stride0: int
    stride1: int
    column: int  # stride of the columns


def entry(tensor: Tensor, first: int = 0) -> Entry:
    """A (n, D) or (i, P, D) tensor of any strides as rows."""
    if tensor.dim() == 3:
        images, each, _ = tensor.shape
        stride0, stride1, column = tensor.stride()
        if each == 1 or images <= 1 or stride0 == each * stride1:
            return Entry(tensor, first, images * each, 0, 0, stride0 if each == 1 else stride1, column)
        return Entry(tensor, first, images * each, each, stride0, stride1, column)
    stride1, column = tensor.stride()
    return Entry(tensor, first, tensor.shape[0], 0, 0, stride1, column)


def join(tensors: Sequence[Tensor], starts: Sequence[int]) -> list[Entry]:
    """The entries of a list of tensors; neighbours in memory with neighbouring row numbers as one."""
    if len(tensors) == 1 and tensors[0].numel():
        return [entry(tensors[0], starts[0])]
    found: list[Entry] = []
    for index, tensor in enumerate(tensors):
        new = entry(tensor, starts[index])
        if index + 1 < len(tensors):
            # a tensor never answers for rows that the next one owns
            new = new._replace(rows=max(0, min(new.rows, starts[index + 1] - starts[index])))
        if not new.rows or not tensor.numel():
            continue
        if found and _touches(found[-1], new):
            found[-1] = found[-1]._replace(rows=found[-1].rows + new.rows)
        else:
            found.append(new)
    return found


def _touches(last: Entry, new: Entry) -> bool:
    return (
        last.first + last.rows == new.first
        and not last.width
        and not new.width
        and last[5:] == new[5:]
        and last.tensor.dtype == new.tensor.dtype
        and last.tensor.data_ptr() + last.rows * last.stride1 * last.tensor.element_size() == new.tensor.data_ptr()
        and last.tensor.untyped_storage().data_ptr() == new.tensor.untyped_storage().data_ptr()
    )


@triton.jit(do_not_specialize=["a", "b", "c", "d", "e", "f", "g", "h", "index"])
def _fill_kernel(table, index, a, b, c, d, e, f, g, h):
    # one program writes one entry; entries are distinct
    at = table + index * 8
    tl.store(at, a)
    tl.store(at + 1, b)
    tl.store(at + 2, c)
    tl.store(at + 3, d)
    tl.store(at + 4, e)
    tl.store(at + 5, f)
    tl.store(at + 6, g)
    tl.store(at + 7, h)


def to_device(entries: Sequence[Entry], device_of: Tensor) -> Tensor:
    """(entries, FIELDS) int64 on the device: one pinned asynchronous copy, or launches while a stream is captured.

    A captured copy would read host memory again at every replay; kernel arguments are part of the graph.
    """
    listed = [(e.tensor.data_ptr(), *e[1:], _CODES[e.tensor.dtype]) for e in entries]
    if is_capturing(device_of):
        table = torch.empty(len(listed), len(listed[0]), dtype=torch.int64, device=device_of.device)
        for index, fields in enumerate(listed):
            _fill_kernel[(1,)](table, index, *fields, num_warps=1)
        return table
    table = torch.tensor(listed, dtype=torch.int64, pin_memory=device_of.is_cuda)
    return table.to(device_of.device, non_blocking=True)


class Rows(NamedTuple):
    """What a kernel takes for the rows of one tensor or many: arguments, then constants."""

    direct: Tensor | None
    table: Tensor | None
    entries: int
    one: Entry
    UNIT: int
    SPLIT: bool
    STRIDED: bool
    ALIGNED: bool
    DTYPES: int  # bit c: dtype code c occurs in the table; 0: direct


_NONE = Rows(None, None, 0, Entry(None, 0, 0, 0, 0, 0, 1), 1, False, False, False, 0)  # type: ignore[arg-type]


def pack(entries: Sequence[Entry], device_of: Tensor) -> Rows:
    """Direct arguments for one entry, a device table for several."""
    if not entries:
        return _NONE
    if len(entries) == 1:
        one = entries[0]
        width = unit(one.stride0, one.stride1)
        one_in_units = one._replace(stride0=one.stride0 // width, stride1=one.stride1 // width)
        return Rows(one.tensor, None, 1, one_in_units, width, one.width > 0, one.column != 1, False, 0)
    return Rows(
        None,
        to_device(entries, device_of),
        len(entries),
        _NONE.one,
        unit(*(s for e in entries for s in (e.stride0, e.stride1))),
        any(e.width for e in entries),
        any(e.column != 1 for e in entries),
        all(e.tensor.data_ptr() % 16 == 0 for e in entries),
        sum(1 << code for code in {_CODES[e.tensor.dtype] for e in entries}),
    )


@triton.jit
def offset_of(row, width, stride0, stride1, UNIT: tl.constexpr, SPLIT: tl.constexpr):
    """Elements before row `row` (int32) of a tensor whose strides count in UNIT."""
    if SPLIT:
        block = row // width
        offset = (block.to(tl.int64) * stride0 + (row - block * width).to(tl.int64) * stride1) * UNIT
    else:
        offset = row.to(tl.int64) * stride1 * UNIT
    return offset


@triton.jit
def find_entry(table, entries, number):
    """Address of the last entry whose first row is not beyond `number` (of the first entry where there is none)."""
    low = tl.zeros((), tl.int32)
    high = low + entries
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(table + middle * FIELDS + 1) <= number:
            low = middle
        else:
            high = middle
    return table + low * FIELDS


@triton.jit
def table_offset(at, local, UNIT: tl.constexpr, SPLIT: tl.constexpr):
    """Elements before row `local` (int32) of the entry at `at`; a multiple of UNIT."""
    offset = local.to(tl.int64) * tl.load(at + 5)
    if SPLIT:
        width = tl.load(at + 3).to(tl.int32)
        if width > 0:
            block = local // width
            offset = block.to(tl.int64) * tl.load(at + 4) + (local - block * width).to(tl.int64) * tl.load(at + 5)
    return tl.multiple_of(offset, UNIT)
