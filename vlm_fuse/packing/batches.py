"""`CollatedBatch`: a dict that goes to the device as a whole."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..token_plan import TokenPlan
from ..transfer import sent
from .shipping import shipped, unshipped


class CollatedBatch(dict):
    """What the collators return. Lists of tensors and the plan move with the tensors; everything else stays as it is.

    Example:
        >>> import torch
        >>> from vlm_fuse.packing import PackingCollator
        >>> batch = PackingCollator()([{"input_ids": [1, 2]}, {"input_ids": [3]}])
        >>> batch.to("cpu")["input_ids"]
        tensor([[1, 2, 3]])
    """

    def to(self, device: torch.device | str, non_blocking: bool = True) -> CollatedBatch:
        """The batch on another device. From pinned memory the host does not wait for copies to a GPU."""
        device = torch.device(device)
        return CollatedBatch({name: _moved(value, device, non_blocking) for name, value in self.items()})

    def __reduce_ex__(self, protocol):
        if get_worker_info() is None:
            return CollatedBatch, (dict(self),)
        return _from_worker, shipped(dict(self))

    def pin_memory(self) -> CollatedBatch:
        """The batch in page-locked memory; a DataLoader with pin_memory=True does the same. Needs a GPU."""
        return CollatedBatch({name: _pinned(value) for name, value in self.items()})


def _from_worker(*parts) -> CollatedBatch:
    return CollatedBatch(unshipped(*parts))


def _moved(value, device: torch.device, non_blocking: bool):
    if isinstance(value, Tensor):
        return sent(value, device, non_blocking)
    if isinstance(value, TokenPlan):
        return value.to(device, non_blocking)
    if isinstance(value, list):
        return [_moved(part, device, non_blocking) for part in value]
    return value


def _pinned(value):
    if isinstance(value, (Tensor, TokenPlan)):
        return value.pin_memory()
    return [_pinned(part) for part in value] if isinstance(value, list) else value
