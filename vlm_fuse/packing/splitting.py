"""Samples longer than a row, cut into pieces: before an image or within text, never within an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor


class Piece(NamedTuple):
    """Part of a sample: its tokens from `start` up to, not including, `stop`, and the images that stand there."""

    sample: int
    start: int
    stop: int


def image_spans(input_ids, image_token_id: int | Sequence[int], *, image_sizes: Sequence[int] | None = None, marks: Sequence[int] = ()) -> list[tuple[int, int]]:
    """Which tokens of a sample are images.

    Args:
        input_ids: ``(T,)`` ints: a list, an array or a tensor on the CPU.
        image_token_id: the id of the placeholder, or ids of several.
        image_sizes: placeholders of each image in reading order, where two images may stand side by side. Default: each run of
            neighbouring placeholders is one image.
        marks: ids that belong to the image next to them (start and end marks, tile tags), so that no cut parts them.

    Returns:
        list: ``(start, stop)`` of each image, ascending; tokens between two spans are text.

    Raises:
        ValueError: sizes that do not agree with the number of placeholders.

    Example:
        >>> from vlm_fuse import packing
        >>> packing.image_spans([1, 7, 9, 9, 8, 5, 9, 9, 9], 9, marks=(7, 8))
        [(1, 5), (6, 9)]
        >>> packing.image_spans([9, 9, 9, 2], 9, image_sizes=[1, 2])
        [(0, 1), (1, 3)]
    """
    ids = np.asarray(input_ids.cpu() if isinstance(input_ids, Tensor) else input_ids).reshape(-1)
    tokens = (image_token_id,) if isinstance(image_token_id, int) else tuple(image_token_id)
    places = np.flatnonzero(np.isin(ids, tokens))
    if image_sizes is None:
        first = np.flatnonzero(np.diff(places, prepend=-2) > 1)
    else:
        sizes = np.asarray(image_sizes.cpu() if isinstance(image_sizes, Tensor) else image_sizes, dtype=np.int64).reshape(-1)
        if sizes.sum() != len(places):
            raise ValueError(f"image_sizes: {len(sizes)} images of {int(sizes.sum())} placeholders, but input_ids has {len(places)}; give the sizes of this sample's images")
        first = (np.cumsum(sizes) - sizes)[sizes > 0]
    last = [*first[1:].tolist(), len(places)]
    spans = [(int(places[begin]), int(places[end - 1]) + 1) for begin, end in zip(first.tolist(), last)]
    marked = np.isin(ids, tuple(marks))
    wide: list[tuple[int, int]] = []
    for number, (start, stop) in enumerate(spans):
        before = wide[-1][1] if wide else 0
        after = spans[number + 1][0] if number + 1 < len(spans) else len(ids)
        while start > before and marked[start - 1]:
            start -= 1
        # of the marks between two images the latter are the next one's: an end mark, then a start mark
        between = stop
        while between < after and marked[between]:
            between += 1
        if between == after and number + 1 < len(spans):
            between = stop + (after - stop) // 2
        wide.append((start, between))
    return wide


def split(length: int, spans: Sequence[tuple[int, int]], capacity: int, *, named: str = "the sample") -> list[tuple[int, int]]:
    """``(start, stop)`` of pieces of at most `capacity` tokens that together are the sample.

    A piece ends before the last image that begins in the second half of what fits, else where the row ends; if that is within an
    image, before it. So an image stays with the text behind it, and no piece but the last is short for no reason.

    Raises:
        ValueError: an image longer than a row; spans out of order.

    Example:
        >>> from vlm_fuse.packing import splitting
        >>> splitting.split(100, [(10, 40), (50, 90)], 60)
        [(0, 50), (50, 100)]
    """
    _check_spans(length, spans, capacity, named)
    pieces, start = [], 0
    while length - start > capacity:
        end = start + capacity
        cut = max((begin for begin, stop in spans if start + capacity // 2 < begin <= end or begin < end < stop), default=end)
        pieces.append((start, cut))
        start = cut
    pieces.append((start, length))
    return pieces


def _check_spans(length: int, spans: Sequence[tuple[int, int]], capacity: int, named: str) -> None:
    before = 0
    for number, (start, stop) in enumerate(spans):
        if not before <= start < stop <= length:
            raise ValueError(f"image_spans: {named}, image {number} is tokens {start} to {stop}; spans are in order, do not overlap and lie within {length} tokens")
        if stop - start > capacity:
            raise ValueError(
                f"image_spans: {named}, image {number} alone has {stop - start} tokens, more than the {capacity} of a row; raise capacity, or shrink the image"
            )
        before = stop
