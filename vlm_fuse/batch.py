"""The batch that a token plan is made from, and the numbers that every backend agrees on. Data only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SCHEMES = ("placeholders", "expand", "images_first")
LAYOUTS = ("keep", "padded", "packed")

#: source_index of a row without a source: a row of zeros.
PAD = -(2**31)

#: label that no loss counts (PyTorch's default ``ignore_index``).
IGNORE_INDEX = -100

#: dtypes of rows, in the order in which schemas and kernels number them.
ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: integers that describe one kind of placeholder in `Batch.kinds`.
KIND_FIELDS = 5


class Batch(NamedTuple):
    """What a plan is made from, normalised by planning.py: contiguous tensors on one device."""

    tokens: Tensor  # (B, T) int32 or int64 input_ids, or a bool placeholder_mask (its one kind's token is 1)
    attention_mask: Tensor | None  # (B, T) bool or integer, nonzero = token
    document_ids: Tensor | None  # (B, T) int32 or int64, below 0 = padding
    labels: Tensor | None  # (B, T) int32 or int64
    kinds: tuple[int, ...]  # KIND_FIELDS a kind: token, first_row, rows, images (-1: sizes unknown), rows_each (-1: listed)
    image_rows: Tensor | None  # (I,) int64 sizes of the images of the kinds whose rows_each is -1
    feature_counts: Tensor | None  # (K, B) int64 rows that each sample owns, -1 for a kind without counts
    scheme: int  # index into SCHEMES
    layout: int  # index into LAYOUTS
    left: bool  # padding_side == "left"
    unused: bool  # unused_features == "allow"

    def kind(self, index: int) -> tuple[int, ...]:
        """(token, first_row, rows, images, rows_each) of kind `index`."""
        return self.kinds[index * KIND_FIELDS : (index + 1) * KIND_FIELDS]

    @property
    def kind_count(self) -> int:
        return len(self.kinds) // KIND_FIELDS


#: fields of a record, the form in which every backend reports an error.
RECORD_FIELDS = ("code", "sample", "kind", "placeholders", "rows", "total_placeholders", "total_rows", "extra")

TOO_FEW_ROWS, TOO_MANY_ROWS, COUNTS_DIFFER, IMAGE_CUT, DOCUMENT_RETURNS, TOO_LONG, OUTSIDE_VOCABULARY, TOO_MANY_INTERVALS = range(1, 9)

#: of M-RoPE positions. In these `kind` is 0 for images, 1 for videos, and `extra` the row of the grids (NO_GRID: how many there are).
#: BAD_GRID has t, h, w and the merge size in the fields behind the kind; UNKNOWN_TYPE the column and, as `extra`, the type.
BAD_GRID, NO_GRID, GRID_CUT, GRID_UNUSED, UNKNOWN_TYPE = range(9, 14)

#: what the rows of a segment of a mask see of its keys, as `segments` says.
EMPTY_SEGMENT, CAUSAL_SEGMENT, FULL_SEGMENT, WINDOWED_SEGMENT, WINDOWED_FULL_SEGMENT, OTHER_SEGMENT = range(6)


class _Raise:
    def __repr__(self) -> str:
        return "RAISE"


#: as `status`: raise RecordedError at once, before anything of the caller's is written.
RAISE = _Raise()


class RecordedError(Exception):
    """An error as a backend found it; checks.py turns the record into the message that users read."""

    def __init__(self, record: tuple[int, ...]):
        super().__init__(record)
        self.record = record


def report(record: tuple[int, ...] | None, status) -> None:
    """Raise the record, write it to the status tensor, or neither."""
    if record is None or status is None:
        return
    if status is RAISE:
        raise RecordedError(record)
    if int(status[0]) == 0:
        status.copy_(torch.tensor(record, dtype=torch.int64))
