"""Errors found on the device: flagged without a host synchronisation, raised when somebody waits for them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .batch import RAISE, RECORD_FIELDS

_flags: dict[torch.device, Tensor] = {}
_copies: dict[torch.device, tuple[Tensor, object]] = {}  # of flags, on their way to the host


def flag(device: torch.device) -> Tensor:
    """``(8,)`` int64 on the device: the first error's record, zeros while there is none."""
    found = _flags.get(device)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            found = _flags[device] = torch.zeros(len(RECORD_FIELDS), dtype=torch.int64, device=device)
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            _wait(device)  # once: another stream may flag an error in it before this one has filled it
    return found


def _wait(device: torch.device) -> None:
    """For all streams of the device."""
    torch.get_device_module(device).synchronize(device)


def for_mode(validate: str, device: torch.device):
    """What a backend gets as `status`: RAISE for "sync", the device's flag for "async", None for "off"."""
    if validate == "sync":
        return RAISE
    return flag(device) if validate == "async" else None


def raise_errors(device: torch.device | str | None = None, wait: bool = True) -> None:
    """Wait for the device, and raise the first error that calls with ``validate="async"`` have flagged on it.

    Args:
        device: the device to ask; None: every device on which something ran asynchronously.
        wait: False: raise only what the host can know without waiting. Each such call sends for the flag, and a later one finds it:
            an error is raised by the first call after the device has got so far.

    Raises:
        ValueError: feature rows and placeholders do not agree, a document id returns, a length is too small, or a mask
            row needs more than two intervals.
        IndexError: a token id outside the embedding table.

    The flag is cleared, so that the next call starts afresh.

    Example:
        >>> import torch, vlm_fuse
        >>> ids, rows = torch.tensor([[5, 7, 7]]), torch.zeros(1, 4)
        >>> out = vlm_fuse.merge(ids, torch.ones(1, 3, 4), rows, image_token_id=7, validate="async")
        >>> vlm_fuse.raise_errors()
        Traceback (most recent call last):
        ValueError: ...
    """
    wanted = None if device is None else torch.device(device)
    for place, found in list(_flags.items()):
        if wanted is not None and (place.type != wanted.type or (wanted.index is not None and place.index not in (None, wanted.index))):
            continue
        if not wait and place.type != "cpu" and not _arrived(place, found):
            continue
        _copies.pop(place, None)
        _wait(place)
        record = tuple(found.tolist())
        if record[0]:
            found.zero_()
            _wait(place)
            raise checks.explain(record)


def _arrived(device: torch.device, flag_: Tensor) -> bool:
    """Whether a copy of the flag that was sent for earlier is here and tells of an error. Sends for another where none is on its way."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    copy, event = _copies.get(device, (None, None))
    if event is not None and not event.query():
        return False
    if copy is not None and int(copy[0]):
        return True
    if copy is None:
        copy = torch.empty(flag_.shape, dtype=flag_.dtype, device="cpu", pin_memory=True)
    copy.copy_(flag_, non_blocking=True)
    event = torch.get_device_module(device).Event()
    event.record()
    _copies[device] = copy, event
    return False
