"""A piece of a sample: its tokens, and of what the vision tower takes the part that belongs to the images in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from .processor_outputs import BATCHED, LOSS_MASKS, TOKEN_KEYS, VIDEO, batched_images, grid_of

if TYPE_CHECKING:
    from .samples import SampleFormat


def cut(form: SampleFormat, sample: Mapping, start: int, stop: int, named: str) -> dict:
    """Tokens `start` to `stop` of the sample without its padding; see `SampleFormat.cut`."""
    read = form.read(sample, named)
    if not 0 <= start <= stop <= len(read.input_ids):
        raise ValueError(f"{named}: has {len(read.input_ids)} tokens; cannot cut {start} to {stop}")
    kept: dict[str, list[int]] = {"image": [], "video": []}
    seen = {"image": 0, "video": 0}
    kinds = form.kinds_of(read)
    for begin, end in form.spans_of(read):
        kind = "video" if bool((kinds[begin:end] == VIDEO).any()) else "image"
        if begin < start < end or begin < stop < end:
            raise ValueError(f"{named}: tokens {start} to {stop} cut through {kind} {seen[kind]}, tokens {begin} to {end}")
        if start <= begin and end <= stop:
            kept[kind].append(seen[kind])
        seen[kind] += 1
    piece = {name: value for name, value in sample.items() if name not in (*TOKEN_KEYS, *LOSS_MASKS, *read.vision, "attention_mask", "position_ids")}
    piece["input_ids"] = read.input_ids[start:stop]
    piece.update({name: values[start:stop] for name, values in read.by_token.items()})
    if read.labels is not None:
        piece["labels"] = read.labels[start:stop]
    for name, value in read.vision.items():
        kind = "video" if "video" in name or name == "second_per_grid_ts" else "image"
        part = _part(named, name, value, read.vision, kept[kind], seen[kind], read.image_sizes if kind == "image" else None)
        if len(part):
            piece[name] = part
    return piece


def _part(named: str, name: str, value, vision: Mapping, kept: list[int], count: int, sizes: list[int] | None):
    """What of one vision input belongs to the images `kept` out of `count`."""
    grid_name = "video_grid_thw" if name == "pixel_values_videos" else "image_grid_thw"
    batched = name in BATCHED and batched_images(vision)
    inner = value[0] if batched else value
    if name in ("pixel_values", "pixel_values_videos") and grid_name in vision:
        parts = grid_of(vision[grid_name]).prod(axis=1)
        if len(inner) != parts.sum():
            raise ValueError(f"{named}: {name} has {len(inner)} patches, {grid_name} {int(parts.sum())}")
    else:
        parts = _parts_of_images(len(inner), count, sizes)
    if parts is None:
        raise ValueError(
            f"{named}: {name} has {len(inner)} parts for {count} images, so that nobody knows which belong to which; cut before the processor, or give "
            "rows_per_image as a function"
        )
    ends = np.cumsum(parts)
    places = [place for image in kept for place in range(int(ends[image] - parts[image]), int(ends[image]))]
    chosen = [inner[place] for place in places] if isinstance(inner, (list, tuple)) else inner[places]
    return chosen if not batched or not places else chosen[None] if hasattr(chosen, "ndim") else [chosen]


def _parts_of_images(total: int, count: int, sizes: list[int] | None) -> np.ndarray | None:
    """Parts of a vision input that are each image's: one, or its tiles or rows, where every part becomes as many rows."""
    if total == count:
        return np.ones(count, dtype=np.int64)
    rows = np.asarray([size for size in sizes or () if size], dtype=np.int64)
    if len(rows) != count or not total or rows.sum() % total or (rows % (rows.sum() // total)).any():
        return None
    return rows // (rows.sum() // total)
