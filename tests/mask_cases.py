"""Generated interval masks: of documents with every kind of Attend, and of arbitrary intervals."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from vlm_fuse import Attend, IntervalMask

ATTENDS = (
    Attend(),
    Attend("full"),
    Attend(window=3),
    Attend("full", window=4),
    Attend(chunk_size=5),
    Attend(window=3, sinks=2),
    Attend(images="bidirectional"),
    Attend(window=3, images="bidirectional"),
    Attend(window=3, images="bidirectional_windowed"),
)


@st.composite
def document_lines(draw, most: int = 40, block: int = 4):
    """One row of document ids: padding on either side, documents of one row, of none, and such that end on a block's edge."""
    lengths = draw(st.lists(st.one_of(st.integers(0, 9), st.sampled_from((1, block, 2 * block))), max_size=6))
    line = [-1] * draw(st.sampled_from((0, 0, 1, block))) + [d for d, length in enumerate(lengths) for _ in range(length)]
    return (line + [-1] * draw(st.sampled_from((0, 0, 1, block, 7))))[:most]


@st.composite
def document_masks(draw, most: int = 40, samples: int = 3, block: int = 4, attends=ATTENDS) -> IntervalMask:
    lines = draw(st.lists(document_lines(most, block), min_size=1, max_size=samples))
    width = max(map(len, lines))
    lines = [line + [-1] * (width - len(line)) for line in lines]
    images = [[draw(st.sampled_from((-1, -1, 0, 1))) for _ in range(0, width, 3)] for _ in lines]
    images = [[image for image in line for _ in range(3)][:width] for line in images]
    ids, image_ids = (torch.tensor(x, dtype=torch.int32).view(len(lines), width) for x in (lines, images))
    return IntervalMask.from_document_ids(ids, draw(st.sampled_from(attends)), image_ids=image_ids)


@st.composite
def interval_masks(draw, most: int = 24) -> IntervalMask:
    """Any one or two intervals a row, as many keys as there may be."""
    samples, rows, keys = draw(st.integers(0, 3)), draw(st.integers(0, most)), draw(st.integers(0, most))
    pair = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    lo, hi, lo2, hi2 = torch.randint(0, keys + 1, (samples, rows, 4), generator=generator).sort(-1).values.int().unbind(-1)
    none = (torch.rand(samples, rows, generator=generator) < 0.2) | (lo >= hi)
    lo, hi = torch.where(none, 0, lo), torch.where(none, 0, hi)
    second = ~none & (hi < lo2) & (lo2 < hi2) & pair
    return IntervalMask(lo, hi, keys, *((lo2 * second, hi2 * second) if pair else ()))


def any_masks():
    return st.one_of(document_masks(), interval_masks())


def by_hand(mask: IntervalMask) -> list[list[list[bool]]]:
    """[sample][row][key], from the tensors alone."""
    parts = [part.tolist() for part in (mask.kv_lo, mask.kv_hi, mask.kv_lo2, mask.kv_hi2) if part is not None]
    pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
    return [
        [[any(lo[b][q] <= key < hi[b][q] for lo, hi in pairs) for key in range(mask.kv_length)] for q in range(mask.kv_lo.shape[1])]
        for b in range(mask.kv_lo.shape[0])
    ]
