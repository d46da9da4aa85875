"""The token plan on the CUDA module: from tokens and sizes to one source (and the facts) of every output row.

Two launches make all that is asked for at once, three where images are expanded or stand in front, and one more looks for
document ids that return.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import LAYOUTS, RAISE, Batch, RecordedError
from .cuda_module import module

#: kinds of placeholder that a warp can count, one a lane.
_MOST_KINDS = 32

#: in the order in which the module takes them
_FACTS = ("text_index", "position_ids", "document_ids", "image_ids", "kind_ids", "attention_mask", "labels", "cu_seqlens")
_DTYPES = {"position_ids": torch.int64, "kind_ids": torch.int8, "attention_mask": torch.bool}


def _scratch(batch: Batch, check: bool) -> Tensor:
    if batch.kind_count > _MOST_KINDS:
        raise NotImplementedError(f"the CUDA backend takes up to {_MOST_KINDS} kinds of placeholder, got {batch.kind_count}")
    return torch.empty(module.plan_scratch(*batch, check), dtype=torch.int64, device=batch.tokens.device)


def _shape(batch: Batch, width: int) -> tuple[int, int]:
    return (1 if LAYOUTS[batch.layout] == "packed" else batch.tokens.shape[0], width)


def count(batch: Batch) -> tuple[int, int, int, tuple[int, ...]]:
    """Kept rows of the longest sample, of all samples, documents, and the placeholders of each kind. Waits for the device."""
    scratch = _scratch(batch, False)
    totals = torch.empty(3 + batch.kind_count, dtype=torch.int64, device=batch.tokens.device)
    module.count(*batch, totals, scratch)
    longest, rows, documents, *placeholders = totals.tolist()
    return longest, rows, documents, tuple(placeholders)


def plan(batch: Batch, width: int, status=RAISE) -> Tensor:
    """``(G, W)`` int32 source_index: feature row k >= 0, -1 - j for token j, or PAD."""
    device, at_once = batch.tokens.device, status is RAISE
    scratch = _scratch(batch, status is not None)
    record = torch.empty(8, dtype=torch.int64, device=device) if at_once else status
    source_index = torch.empty(_shape(batch, width), dtype=torch.int32, device=device)
    module.plan(*batch, width, source_index, (None,) * len(_FACTS), record, at_once, scratch)
    if at_once:
        found = tuple(record.tolist())
        if found[0]:
            raise RecordedError(found)
    return source_index


def facts(batch: Batch, width: int, names: tuple[str, ...], documents: int) -> tuple[Tensor, ...]:
    """The named facts of the output rows, in that order. `documents` sizes cu_seqlens where document_ids were given."""
    if not names:
        return ()
    device, scratch = batch.tokens.device, _scratch(batch, False)
    sequences = batch.tokens.shape[0] if batch.document_ids is None else documents
    made: dict[str, Tensor] = {}
    for name in names:
        shape = (sequences + 1,) if name == "cu_seqlens" else _shape(batch, width)
        dtype = batch.labels.dtype if name == "labels" else _DTYPES.get(name, torch.int32)
        made[name] = torch.empty(shape, dtype=dtype, device=device)
    module.plan(*batch, width, None, tuple(made.get(name) for name in _FACTS), None, False, scratch)
    return tuple(made[name] for name in names)
