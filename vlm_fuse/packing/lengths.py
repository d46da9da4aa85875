"""`pack_lengths`: which samples share a row, from their lengths alone."""

from __future__ import annotations

import heapq
import warnings
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .. import checks
from .best_fit import best_fit
from .splitting import Piece, split

OVERLONG = ("error", "skip", "split")


class PackStatistics(NamedTuple):
    """What a packing is worth."""

    samples: int
    rows: int
    tokens: int  # of the samples
    fill: float  # tokens / (rows * capacity)
    padded_tokens: int  # a batch of each row's samples would have, each padded to its longest
    padding_avoided: float  # share of padded_tokens that is padding, which packed rows do without
    documents_per_row: float
    most_documents: int
    skipped: int


class PackedRows(list):
    """``[[sample, ...] per row]``: a list, with what else is known.

    Attributes:
        capacity: tokens of a row.
        skipped: indices of the samples that are in no row (overlong="skip").
        tokens, images, patches: of each row, ``(rows,)`` int64; tokens as they lie in the row, each document rounded up.
        statistics: a PackStatistics.
    """

    def __init__(self, rows, capacity: int, skipped: tuple[int, ...], totals: np.ndarray, statistics: PackStatistics):
        super().__init__(rows)
        self.capacity = capacity
        self.skipped = skipped
        self.tokens, self.images, self.patches = (np.ascontiguousarray(column) for column in totals.T)
        self.statistics = statistics

    def __reduce__(self):
        totals = np.stack([self.tokens, self.images, self.patches], axis=1)
        return PackedRows, (list(self), self.capacity, self.skipped, totals, self.statistics)


def pack_lengths(
    lengths,
    capacity: int,
    *,
    image_counts=None,
    max_images: int | None = None,
    patch_counts=None,
    max_patches: int | None = None,
    max_documents: int | None = None,
    multiple_of: int = 1,
    rows_multiple_of: int = 1,
    overlong: str = "error",
    image_spans=None,
    seed: int | None = None,
) -> PackedRows:
    """Which samples share a row: best fit, the longest first, within the budgets of a row.

    Every sample goes to the row in which the fewest tokens stay free and everything fits. With further budgets those come first
    that take most of all budgets together. Nothing but numbers is looked at, and the same numbers and seed give the same rows,
    on every backend, rank and worker.

    Args:
        lengths: ``(samples,)`` tokens of each sample, placeholders included: ints, an array or a tensor on the CPU.
        capacity: tokens of a row.
        image_counts, max_images: ``(samples,)`` images of each sample, and how many a row may have.
        patch_counts, max_patches: ``(samples,)`` vision patches (what the vision tower computes) of each sample, and of a row. A piece of
            a split sample counts with the share that its images have of the tokens in `image_spans`.
        max_documents: samples of a row, where `cu_seqlens` is to have a fixed size.
        multiple_of: every document is padded to a multiple (2 * context-parallel size) and counts with its padding.
        rows_multiple_of: rounds the number of rows up (ranks * rows of a batch), by moving half of the samples of rows that have
            most into new ones, so that none need be repeated or left out. Fewer samples than that: as many rows as samples.
        overlong: what happens to a sample that fits into no row: "error", "skip" (a warning counts them, `skipped` lists them), or
            "split" into pieces that fit, before an image or, where no image is near, within the text; never within an image.
        image_spans: for "split", of each sample the ``(start, stop)`` tokens of its images, as `image_spans` finds them.
        seed: shuffles rows, samples of a row, and which of equal samples comes first. None: the longest first.

    Returns:
        PackedRows: a list of rows, each a list of sample indices; for a part of a split sample a ``Piece(sample, start, stop)``.
            Every sample stands in one row (its pieces in one each), or in `skipped`.

    Raises:
        ValueError: a sample that fits into no row (names it, what it needs and the budget); an image longer than a row; numbers
            that do not agree in length, or below 0; unknown words.
        TypeError: lengths that are not whole numbers.

    Example:
        >>> from vlm_fuse import packing
        >>> rows = packing.pack_lengths([700, 300, 600, 400, 200], 1000)
        >>> list(rows)
        [[0, 1], [2, 3], [4]]
        >>> rows.statistics.fill
        0.7333333333333333

    Source: best-fit-decreasing bin packing; "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830) for its use on training
    data; FFDSum of "Heuristics for Vector Bin Packing" (Panigrahy et al., 2011) for the order with several budgets;
    huggingface/nanoVLM's ``ConstantLengthDataset`` for the budget of images.
    """
    checks.choice("overlong", overlong, OVERLONG)
    capacity, multiple_of = _count("capacity", capacity, 1), _count("multiple_of", multiple_of, 1)
    rows_multiple_of = _count("rows_multiple_of", rows_multiple_of, 1)
    if capacity % multiple_of:
        raise ValueError(f"capacity: {capacity} is no multiple of multiple_of={multiple_of}; take {capacity // multiple_of * multiple_of or multiple_of}")
    sizes = _sizes(lengths, image_counts, patch_counts)
    limits = {"tokens": capacity, "images": max_images, "patches": max_patches, "documents": max_documents}
    names = [name for name, limit in limits.items() if limit is not None]
    budgets = tuple(_count(f"max_{name}", limits[name], 0) if name != "tokens" else capacity for name in names)
    for name, given, counts in (("max_images", max_images, image_counts), ("max_patches", max_patches, patch_counts)):
        if given is not None and counts is None:
            raise ValueError(f"{name}: a budget of what nobody has counted; give {'image_counts' if name == 'max_images' else 'patch_counts'} as well")
    items: list = list(range(len(sizes)))
    over = _over(sizes, limits, multiple_of)
    skipped: tuple[int, ...] = ()
    if over.any():
        if overlong == "error":
            raise ValueError(_too_long(int(over.argmax()), sizes, limits, int(over.sum())))
        if overlong == "skip":
            skipped = tuple(np.flatnonzero(over).tolist())
            warnings.warn(f"pack_lengths: {len(skipped)} of {len(sizes)} samples fit into no row and are left out, the first is {skipped[0]}", stacklevel=2)
            items = np.flatnonzero(~over).tolist()
        else:
            items, pieces = _split(sizes, over, image_spans, capacity)
            sizes = np.concatenate([sizes, pieces])
            over = _over(sizes[len(over) :], limits, multiple_of)
            if over.any():
                sample, start, stop = items[int(over.argmax()) - len(pieces)]
                raise ValueError(_too_long(int(over.argmax()) - len(pieces), sizes, limits, 1, f"tokens {start} to {stop} of sample {sample}"))
    where = np.asarray([item if isinstance(item, int) else len(sizes) - len(items) + place for place, item in enumerate(items)], dtype=np.int64)
    return _packed(items, sizes[where], names, budgets, capacity, multiple_of, rows_multiple_of, skipped, seed)


def _packed(items: list, sizes: np.ndarray, names, budgets, capacity: int, multiple_of: int, rows_multiple_of: int, skipped, seed) -> PackedRows:
    rng = None if seed is None else np.random.default_rng(seed)
    taken = -(-sizes[:, 0] // multiple_of) * multiple_of
    table = {"tokens": taken, "images": sizes[:, 1], "patches": sizes[:, 2], "documents": np.ones(len(items), dtype=np.int64)}
    tie = np.arange(len(items)) if rng is None else rng.permutation(len(items))
    needs = np.stack([table[name] for name in names], axis=1)
    # decreasing by the sum of the shares of every budget (FFDSum); of tokens alone that is decreasing length
    order = np.lexsort((tie, -(needs / np.maximum(budgets, 1)).sum(axis=1)))
    row_of = best_fit(needs, order, budgets)
    count = _spread(row_of, rows_multiple_of)
    number = np.arange(count) if rng is None else rng.permutation(count)
    within = np.arange(len(items)) if rng is None else rng.permutation(len(items))
    by_row = np.lexsort((within, number[row_of])) if count else np.empty(0, dtype=np.int64)
    cuts = np.cumsum(np.bincount(row_of, minlength=count)[np.argsort(number)])[:-1] if count else []
    rows = [[items[i] for i in part.tolist()] for part in np.split(by_row, cuts)] if count else []
    place = number[row_of] if count else row_of
    totals = np.zeros((count, 3), dtype=np.int64)
    for column, values in enumerate((taken, sizes[:, 1], sizes[:, 2])):
        np.add.at(totals[:, column], place, values)
    return PackedRows(rows, capacity, skipped, totals, _statistics(sizes[:, 0], place, count, capacity, len(skipped)))


def _spread(row_of: np.ndarray, multiple: int) -> int:
    """The number of rows, made a multiple: half of the samples of the row with most move to a new one, as often as it takes."""
    counts = np.bincount(row_of)
    wanted = min(-(-len(counts) // multiple) * multiple, len(row_of))
    if wanted == len(counts):
        return wanted
    ends = np.cumsum(counts)
    members = np.argsort(row_of, kind="stable")
    fullest = [(-count, row, end - count, end) for row, (count, end) in enumerate(zip(counts.tolist(), ends.tolist()))]
    heapq.heapify(fullest)
    for new in range(len(counts), wanted):
        _, row, start, stop = heapq.heappop(fullest)
        moved, kept = members[start + 1 : stop : 2].copy(), members[start:stop:2].copy()
        row_of[moved] = new
        middle = start + len(kept)
        members[start:middle], members[middle:stop] = kept, moved
        heapq.heappush(fullest, (start - middle, row, start, middle))
        heapq.heappush(fullest, (middle - stop, new, middle, stop))
    return wanted


def _statistics(lengths: np.ndarray, row_of: np.ndarray, rows: int, capacity: int, skipped: int) -> PackStatistics:
    documents = np.bincount(row_of, minlength=rows)
    longest = np.zeros(rows, dtype=np.int64)
    np.maximum.at(longest, row_of, lengths)
    tokens, padded = int(lengths.sum()), int((longest * documents).sum())
    return PackStatistics(
        len(lengths), rows, tokens, tokens / (rows * capacity) if rows else 1.0, padded, 1 - tokens / padded if padded else 0.0,
        len(lengths) / rows if rows else 0.0, int(documents.max()) if rows else 0, skipped,
    )  # fmt: skip


def _sizes(lengths, image_counts, patch_counts) -> np.ndarray:
    """``(samples, 3)`` int64: tokens, images, patches."""
    tokens = _numbers("lengths", lengths)
    table = np.zeros((len(tokens), 3), dtype=np.int64)
    table[:, 0] = tokens
    for column, (name, given) in enumerate((("image_counts", image_counts), ("patch_counts", patch_counts)), 1):
        if given is None:
            continue
        counts = _numbers(name, given)
        if len(counts) != len(tokens):
            raise ValueError(f"{name}: {len(counts)} numbers for {len(tokens)} lengths; give one for each sample")
        table[:, column] = counts
    return table


def _numbers(name: str, given) -> np.ndarray:
    found = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
    if found.ndim != 1:
        raise ValueError(f"{name}: expected one number for each sample, got an array of shape {found.shape}")
    if not found.size:
        return np.empty(0, dtype=np.int64)
    if found.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected whole numbers, got {found.dtype}")
    if found.min() < 0:
        raise ValueError(f"{name}: sample {int(found.argmin())} has {int(found.min())}, below 0")
    if found.max() >= 2**62:
        raise ValueError(f"{name}: sample {int(found.argmax())} has {int(found.max())}, more than any memory holds")
    return found.astype(np.int64)


def _count(name: str, value, least: int) -> int:
    try:
        number = value.__index__() if not isinstance(value, bool) else None
    except AttributeError:
        number = None
    if number is None or not least <= number < 2**62:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    return number


def _over(sizes: np.ndarray, limits: dict, multiple_of: int) -> np.ndarray:
    """Which samples fit into no row."""
    over = -(-sizes[:, 0] // multiple_of) * multiple_of > limits["tokens"]
    for column, name in ((1, "images"), (2, "patches")):
        if limits[name] is not None:
            over |= sizes[:, column] > limits[name]
    if limits["documents"] == 0:
        over |= True
    return over


def _too_long(sample: int, sizes: np.ndarray, limits: dict, count: int, named: str | None = None) -> str:
    needs = dict(zip(("tokens", "images", "patches"), sizes[sample].tolist()))
    name = next((name for name, need in needs.items() if limits[name] is not None and need > limits[name]), None)
    named = f"sample {sample}" if named is None else named
    if name is None and limits["documents"] == 0:
        return "max_documents: 0, so that no sample fits into a row"
    if name is None:
        found = f"{named} has {needs['tokens']} tokens, padded to a multiple more than the {limits['tokens']} of a row"
    else:
        found = f"{named} has {needs[name]} {name}, more than the {limits[name]} of a row"
    others = f" ({count} samples in all do)" if count > 1 else ""
    # a sample is split by its tokens alone
    return f"lengths: {found}{others}; raise the budget, or choose overlong='skip'" + (" or 'split'" if name in (None, "tokens") else "")


def _split(sizes: np.ndarray, over: np.ndarray, image_spans, capacity: int) -> tuple[list, np.ndarray]:
    """(the samples that fit, then the pieces of the others; the ``(pieces, 3)`` sizes of the pieces)."""
    if image_spans is None:
        raise ValueError("image_spans: overlong='split' needs to know which tokens are images; give the spans of each sample")
    if len(image_spans) != len(sizes):
        raise ValueError(f"image_spans: {len(image_spans)} entries for {len(sizes)} lengths; give one list for each sample")
    pieces, table = [], []
    for sample in np.flatnonzero(over).tolist():
        tokens, images, patches = sizes[sample].tolist()
        spans = [(int(start), int(stop)) for start, stop in image_spans[sample]]
        rows = sum(stop - start for start, stop in spans)
        for start, stop in split(tokens, spans, capacity, named=f"sample {sample}"):
            inside = [end - begin for begin, end in spans if start <= begin and end <= stop]
            pieces.append(Piece(sample, start, stop))
            # patches go with the rows that they become
            table.append((stop - start, len(inside), -(-patches * sum(inside) // rows) if rows else 0))
    return [*np.flatnonzero(~over).tolist(), *pieces], np.asarray(table, dtype=np.int64).reshape(-1, 3)
