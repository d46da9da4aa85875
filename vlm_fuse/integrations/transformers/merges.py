"""What rewritten methods call in place of `masked_scatter`, of an assignment under a mask, and of the check of their counts."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

import vlm_fuse

from ... import ops

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor
else:  # nothing is one
    DTensor = ()

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def masked_scatter(inputs_embeds: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """``inputs_embeds.masked_scatter(mask, source)``; by `vlm_fuse.merge` where the mask marks whole rows.

    Args:
        inputs_embeds: ``(B, L, D)``.
        mask: bool, broadcast over D or expanded to it.
        source: D elements a marked row, in any shape; what is too much is not used, as there.
    """
    rows = _rows(mask, inputs_embeds)
    if rows is None or not _features(source, inputs_embeds):
        return inputs_embeds.masked_scatter(mask, source)
    source = source.reshape(-1, inputs_embeds.shape[-1])
    merged = vlm_fuse.merge(None, inputs_embeds, source, placeholder_mask=rows, unused_features="allow").inputs_embeds
    if not (inputs_embeds.is_cpu or is_compiling()):
        vlm_fuse.raise_errors(inputs_embeds.device, wait=False)  # of earlier forwards; and sends for what this one has flagged
    return merged


def assigned(inputs_embeds: Tensor, mask, source) -> Tensor:
    """`inputs_embeds` after ``inputs_embeds[mask] = source``: a new tensor where the mask marks whole rows."""
    rows = _rows(mask, inputs_embeds) if isinstance(mask, Tensor) and mask.dim() == 2 and isinstance(source, Tensor) else None
    # one row is broadcast to all that are marked
    if rows is None or source.dim() != 2 or source.shape[0] == 1 or source.shape[1] != inputs_embeds.shape[2] or not _features(source, inputs_embeds):
        inputs_embeds[mask] = source
        return inputs_embeds
    return vlm_fuse.merge(None, inputs_embeds, source, placeholder_mask=rows).inputs_embeds


def added(hidden_states: Tensor, mask: Tensor, source: Tensor) -> Tensor | None:
    """A copy of `hidden_states` with the source's rows added under a ``(B, L)`` mask; None: not of a form that `merge` takes."""
    rows = _rows(mask, hidden_states) if mask.dim() == 2 else None
    if rows is None or source.dim() != 2 or source.shape[0] == 1 or not _features(source, hidden_states):
        return None
    return vlm_fuse.merge(None, hidden_states, source, placeholder_mask=rows, combine="add").inputs_embeds


def countable(mask: Tensor, numel, width) -> bool:
    """Whether `counted` can say if the mask has ``numel / width`` rows."""
    if type(numel) not in (int, torch.SymInt) or not width or numel % width:
        return False
    return _row_mask(mask) is not None


def counted(mask: Tensor, numel, width, message: Callable[[], str]) -> Tensor:
    """The mask, if it marks as many rows as there are features. No host read; on a GPU a mismatch is flagged.

    Raises:
        ValueError: on a CPU at once, with the model's message and the sample. On a GPU `vlm_fuse.raise_errors` raises it, or
            a later forward of a patched model, once the flag has arrived.

    In traced code it is another mask, made by the op that checks, so that the check is not removed as unused.
    """
    if os.environ.get("TRANSFORMERS_DISABLE_TORCH_CHECK", "0") == "1":
        return mask
    rows = _row_mask(mask)
    if is_compiling():
        found = vlm_fuse.plan(None, placeholder_mask=rows, feature_rows=numel // width).source_index >= 0
        return found if mask.dim() == 2 else found.unsqueeze(-1).expand(mask.shape)
    try:
        vlm_fuse.plan(None, placeholder_mask=rows, feature_rows=numel // width)
    except ValueError as error:
        found = str(error).partition("; pass unused_features")[0]  # which is merge's, not the model's
        said = message()
        raise ValueError(f"{said} ({found})" if said else found) from None
    return mask


def _row_mask(mask) -> Tensor | None:
    """The ``(B, L)`` mask of a mask that is the same along the last of three dimensions, told by its strides alone."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        return None
    if mask.dim() == 2:
        return mask
    if mask.dim() == 3 and (mask.shape[2] == 1 or (mask.shape[2] > 1 and mask.stride(2) == 0)):
        return mask[..., 0]
    return None


def _rows(mask: Tensor, inputs_embeds: Tensor) -> Tensor | None:
    """The ``(B, L)`` mask of marked rows of ``(B, L, D)`` embeddings; None: `merge` is not what is asked."""
    if inputs_embeds.dim() != 3 or inputs_embeds.dtype not in _DTYPES or isinstance(inputs_embeds, DTensor) or _transformed():
        return None
    rows = _row_mask(mask)
    return rows if rows is not None and rows.shape == inputs_embeds.shape[:2] and rows.device == inputs_embeds.device else None


def _transformed() -> bool:
    """Inside a transform of torch.func, or among forward-mode gradients, of which `merge` knows reverse mode alone."""
    return ops.functorch_active() or (not is_compiling() and forward_ad._current_level >= 0)


def _features(source: Tensor, inputs_embeds: Tensor) -> bool:
    width = inputs_embeds.shape[2]
    return not isinstance(source, DTensor) and source.dtype == inputs_embeds.dtype and source.device == inputs_embeds.device and width > 0 and source.numel() % width == 0

