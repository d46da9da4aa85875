"""The interval mask as cu_seqlens, for variable-length attention (flash-attn, torch.nn.attention.varlen)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import CAUSAL_SEGMENT, EMPTY_SEGMENT, FULL_SEGMENT, OTHER_SEGMENT, WINDOWED_FULL_SEGMENT, WINDOWED_SEGMENT


class Varlen(NamedTuple):
    """Arguments of variable-length attention on rows flattened to ``(B * Q, heads, D)``.

    Attributes:
        cu_seqlens: int32 ``(n + 1,)``, where each run of query rows begins, and the end.
        max_seqlen: host int, rows of the longest run.
        cu_seqlens_k, max_seqlen_k: the same of the keys, flattened to ``(B * keys, heads, D)``.
        causal: whether a row sees no key ahead; with fewer rows than keys the last row sees the last key.
        window_size: (left, right) as flash-attn counts them, without the row itself; -1: no limit. (-1, 0) is causal.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    cu_seqlens_k: Tensor
    max_seqlen_k: int
    causal: bool
    window_size: tuple[int, int]


class Segment(NamedTuple):
    """Query rows of one sample that share no key with the rows before or behind, and the keys that they see."""

    sample: int
    row_begin: int
    row_end: int
    key_begin: int
    key_end: int
    kind: int
    window: int

    @property
    def rows(self) -> int:
        return self.row_end - self.row_begin

    @property
    def keys(self) -> int:
        return self.key_end - self.key_begin


def _fits(segment: Segment, kind: int, window: int) -> bool:
    """Whether variable-length attention gives the segment its keys under this rule."""
    if segment.kind == kind and segment.window == window:
        return True
    if kind == WINDOWED_SEGMENT:
        return segment.kind == CAUSAL_SEGMENT and segment.keys <= window
    if kind == FULL_SEGMENT:
        return segment.rows == 1 and segment.kind == CAUSAL_SEGMENT
    if kind == WINDOWED_FULL_SEGMENT:
        return segment.rows == segment.keys <= window and (segment.kind == FULL_SEGMENT or segment.rows == 1)
    return False


def rule_of(segments: list[Segment]) -> tuple[int, int]:
    """(class, window): the one rule that variable-length attention applies to every document.

    Raises:
        ValueError: there is none; the message says why.
    """
    deciding: Segment | None = None
    for kind in (OTHER_SEGMENT, WINDOWED_SEGMENT, WINDOWED_FULL_SEGMENT, FULL_SEGMENT, CAUSAL_SEGMENT):
        deciding = next((segment for segment in segments if segment.kind == kind), None)
        if deciding is not None:
            break
    if deciding is None:
        return CAUSAL_SEGMENT, 0
    if deciding.kind == OTHER_SEGMENT:
        raise ValueError(
            f"varlen: {_rows(deciding)} are neither causal nor full nor windowed as a whole (images or a prefix seen both ways, a second interval, or padding inside a "
            "document); use block_mask(), dense() or vlm_fuse.attention"
        )
    for segment in segments:
        if segment.kind != EMPTY_SEGMENT and not _fits(segment, deciding.kind, deciding.window):
            told = [f"{_rows(one)} are {_WORDS[one.kind].format(one.window)}" for one in (deciding, segment)]
            raise ValueError(f"varlen: one call has one rule for all documents, but {told[0]} and {told[1]}; use block_mask(), dense() or vlm_fuse.attention")
    return deciding.kind, deciding.window


_WORDS = {CAUSAL_SEGMENT: "causal", FULL_SEGMENT: "full", WINDOWED_SEGMENT: "causal in a window of {}", WINDOWED_FULL_SEGMENT: "full in a window of {}"}


def _rows(segment: Segment) -> str:
    return f"rows {segment.row_begin} to {segment.row_end - 1} of sample {segment.sample}"


def varlen(segments: list[Segment], samples: int, rows: int, keys: int, device: torch.device) -> Varlen:
    """Every run of rows that sees nothing is one more document (of padding, which then sees the keys that nobody else sees)."""
    kind, window = rule_of(segments)
    row_ends, key_ends = [0], [0]

    def add(row_end: int, key_end: int) -> None:
        row_ends.append(row_end)
        key_ends.append(key_end)

    for segment, after in zip(segments, [*segments[1:], None]):
        base, row_end = segment.sample * keys, segment.sample * rows + segment.row_end
        begin, end = base + segment.key_begin, base + segment.key_end
        if segment.kind == EMPTY_SEGMENT:
            begin, end = base, base + (after.key_begin if after is not None and after.sample == segment.sample else keys)
        if begin > key_ends[-1]:  # keys that nobody sees are a document without rows
            add(row_ends[-1], begin)
        add(row_end, end)
    if key_ends[-1] < samples * keys:
        add(row_ends[-1], samples * keys)
    cu_seqlens = _offsets(row_ends, device)
    cu_seqlens_k = cu_seqlens if row_ends == key_ends else _offsets(key_ends, device)
    causal = kind in (CAUSAL_SEGMENT, WINDOWED_SEGMENT)
    left = window - 1 if window else -1  # flash-attn does not count the row itself
    return Varlen(cu_seqlens, _longest(row_ends), cu_seqlens_k, _longest(key_ends), causal, (left, 0 if causal else left))


def _offsets(ends: list[int], device: torch.device) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32).to(device, non_blocking=True)


def _longest(ends: list[int]) -> int:
    return max((after - before for before, after in zip(ends, ends[1:])), default=0)
