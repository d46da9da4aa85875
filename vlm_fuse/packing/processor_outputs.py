"""Under which names, and in which forms, processors and datasets give what belongs to a sample."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

#: tokens that the loss counts, under the names that processors and trainers give them: nanoVLM, transformers' chat templates, TRL.
LOSS_MASKS = ("loss_mask", "assistant_masks", "completion_mask")

#: one number a token, beside input_ids: joined like them. (cross_attention_mask and the like are not.)
TOKEN_KEYS = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")

#: stand in the names of what the vision (or audio) tower takes.
VISION = (
    "pixel", "image", "video", "patch", "tile", "crop", "second_per_grid", "aspect_ratio", "spatial_shapes", "target_sizes", "audio", "input_features",
    "feature_attention_mask",
)  # fmt: skip

#: have a batch around the images, where `batched_images` says so.
BATCHED = ("pixel_values", "pixel_attention_mask")

#: kinds of tokens, as mm_token_type_ids has them.
IMAGE, VIDEO = 1, 2


def writable(array: np.ndarray) -> Tensor:
    """The array as a tensor; copied where it is read-only (memory-mapped, or a table's), of which torch would warn."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def has(sample: Mapping, name: str) -> bool:
    value = sample.get(name)
    return value is not None and len(value) > 0


def of_tower(name: str, value) -> bool:
    """Arrays and lists under a name of `VISION`; an id or a path is none."""
    return any(part in name for part in VISION) and (isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 0)


def is_pictures(name: str) -> bool:
    """Whether images come under this name: pixels of whatever sort, nanoVLM's list, or rows that a tower made of them."""
    return ("pixel" in name and "video" not in name) or name in ("images", "image_embeds", "image_features")


def grid_of(value) -> np.ndarray:
    """``(images, 3)`` int64: frames, rows and columns of patches."""
    return np.asarray(value.cpu() if isinstance(value, Tensor) else value, dtype=np.int64).reshape(-1, 3)


def tiles(image) -> int:
    """Images that an entry of a list is: a list or a (tiles, C, H, W) tensor holds several."""
    if isinstance(image, (list, tuple)):
        return sum(tiles(part) for part in image)
    return len(image) if getattr(image, "ndim", 0) == 4 else 1


def tiles_of_images(sample: Mapping) -> list[int]:
    """Tiles of each image of a sample, as far as the shapes tell: an entry of a list is one image."""
    name = "images" if has(sample, "images") else "pixel_values"
    if not has(sample, name):
        return []
    values = sample[name]
    if name == "pixel_values" and batched_images(sample):
        return [1] * len(values[0])
    return [tiles(image) for image in values] if isinstance(values, (list, tuple)) else [1] * len(values)


def batched_images(vision: Mapping) -> bool:
    """Whether pixel_values is (1, images, C, H, W), with a batch around the images (Idefics, SmolVLM), and not (images, tiles, C, H, W) of
    LLaVA, where the sizes of the images come beside."""
    values = vision.get("pixel_values")
    return _dims(values) == 5 and len(values) == 1 and "image_sizes" not in vision


def _dims(value) -> int:
    """Of a tensor or an array, also as lists of them."""
    if isinstance(value, (list, tuple)):
        return 1 + _dims(value[0]) if value else 1
    return getattr(value, "ndim", 0)
