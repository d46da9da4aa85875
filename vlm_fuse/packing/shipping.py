"""How a batch leaves a worker: its small tensors in one piece of shared memory, instead of a file descriptor for each.

A batch with its plan is some twenty tensors, most of them a few KB. torch hands over each in a shared memory of its own, which
costs the main process more than the tensors are worth, and runs into the limit of open files with many workers.
"""

from __future__ import annotations

import io
import pickle
from typing import NamedTuple

import torch
from torch import Tensor

SMALL = 1 << 20  # bytes up to which copying a tensor once more costs less than handing it over by itself
ALIGNMENT = 64


class Place(NamedTuple):
    """Where a tensor lies in the shared piece."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes


class _Pickler(pickle.Pickler):
    """Writes everything but plain tensors, which it numbers."""

    def __init__(self, file):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: dict[int, tuple[int, Tensor]] = {}

    def persistent_id(self, found):
        if type(found) is not Tensor:
            return None
        return self.tensors.setdefault(id(found), (len(self.tensors), found))[0]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, tensors: list[Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]


def shipped(content: dict) -> tuple:
    """The arguments of `unshipped`; pickled in turn, its tensors by torch's own way."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(content)
    places: list[Place | None] = []
    small, others, end = [], [], 0
    for _, tensor in pickler.tensors.values():
        if tensor.is_cpu and tensor.layout is torch.strided and tensor.is_contiguous() and not tensor.requires_grad and not tensor.is_shared() and tensor.nbytes <= SMALL:
            places.append(Place(tensor.dtype, tuple(tensor.shape), end))
            small.append(tensor)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        else:
            places.append(None)
            others.append(tensor)
    piece = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(max(end, 1), device="cpu"), 0, (end,))
    for tensor, place in zip(small, filter(None, places)):
        piece[place.offset : place.offset + tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))
    return file.getvalue(), places, piece, others


def unshipped(content: bytes, places: list[Place | None], piece: Tensor, others: list[Tensor]) -> dict:
    """What `shipped` was given. No tensor is a view of another: each has its own version counter."""
    storage, rest = piece.untyped_storage(), iter(others)
    tensors = [next(rest) if place is None else _at(storage, place) for place in places]
    return _Unpickler(io.BytesIO(content), tensors).load()


def _at(storage: torch.UntypedStorage, place: Place) -> Tensor:
    return torch.empty(0, dtype=place.dtype).set_(storage, place.offset // place.dtype.itemsize, place.shape)
