"""What the vision tower takes, joined over the samples of a batch in reading order."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from numbers import Number

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from .processor_outputs import BATCHED, batched_images, is_pictures, writable


def join(parts: Sequence[dict]) -> dict:
    """``{name: all images of the batch}`` from the vision inputs of each sample.

    Tensors and arrays are joined along the images; where images differ in size (tiles of LLaVA-NeXT, Pixtral's pictures) the pixels of
    the smaller are zero-padded behind, as their processors do within a sample. Lists of images stay one list, lists of numbers become tensors.
    """
    # a text without images may come with empty ones, which have no form to go by; nanoVLM's list is asked for all the same
    names = dict.fromkeys(name for part in parts for name, value in part.items() if len(value) or name == "images")
    return {name: _joined([(part, part[name]) for part in parts if len(part.get(name, ()))], name) for name in names}


def _joined(found: list[tuple[dict, object]], name: str):
    values = [value for _, value in found]
    if all(_is_list_of_images(name, value) for value in values):
        return [image for value in values for image in value]
    try:
        tensors = [_tensor(value) for value in values]
    except (TypeError, ValueError):
        return values  # words, paths: one a sample
    dims = dict.fromkeys(tensor.dim() for tensor in tensors)
    if len(dims) > 1:
        raise ValueError(f"{name}: the samples have it with {' and '.join(map(str, dims))} dimensions; give all of them the same form")
    along = int(name in BATCHED and all(batched_images(part) for part, _ in found))
    sizes = dict.fromkeys((*tensor.shape[:along], *tensor.shape[along + 1 :]) for tensor in tensors)
    if len(sizes) > 1 and not (is_pictures(name) and tensors[0].dim() > 2):
        # zeros are no pixels there: a frame more of a video, a patch more at position 0
        shown = " and ".join(map(str, list(sizes)[:4]))
        raise ValueError(f"{name}: the samples have it in sizes {shown}; let the processor make them alike, or put such samples in batches of their own")
    return _concatenated(tensors, along)


def _is_list_of_images(name: str, value) -> bool:
    """nanoVLM's ``images``: tensors of tiles, or pictures."""
    return name == "images" and isinstance(value, (list, tuple)) and not any(isinstance(image, Number) for image in value)


def _tensor(value) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (Tensor, np.ndarray)):
        return _concatenated([_tensor(image)[None] for image in value], 0)
    made = writable(np.ascontiguousarray(value))
    return made.float() if made.dtype == torch.float64 and not isinstance(value, np.ndarray) else made


def _concatenated(tensors: list[Tensor], along: int) -> Tensor:
    """Joined along one dimension, zero where a tensor is smaller in another."""
    if len(tensors) == 1 and get_worker_info() is None:
        return tensors[0]
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors))]
    shape[along] = sum(tensor.shape[along] for tensor in tensors)
    alike = all(size == own for tensor in tensors for dim, (size, own) in enumerate(zip(shape, tensor.shape)) if dim != along)
    out = _allocated(shape, dtype)
    if alike:
        return torch.cat(tensors, along, out=out)
    out.zero_()
    start = 0
    for tensor in tensors:
        place = out.narrow(along, start, tensor.shape[along])
        place[tuple(slice(size) for size in tensor.shape)] = tensor
        start += tensor.shape[along]
    return out


def _allocated(shape: list[int], dtype: torch.dtype) -> Tensor:
    """New memory; in a worker in shared memory from the start, so that it is not copied once more on its way to the main process.

    Source: torch's ``default_collate``.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)) * dtype.itemsize, device="cpu")
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)
