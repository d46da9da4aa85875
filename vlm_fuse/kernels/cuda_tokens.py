"""The usual call of merge in one launch: rows, source_index and what a training step reads, from the token ids.

Recognised in one native call. Before sm_90 there are two launches: the first counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attending import Attend
from ..batch import LAYOUTS, RAISE, Batch, RecordedError
from .cuda_merge import rows_backward
from .cuda_module import module

#: rows_of(input_ids, inputs_embeds, weight, image_embeds, out, source_index) -> rows of image_embeds where all is of the usual kind, or None
rows_of = None if module is None else module.rows_of

_KEEP = LAYOUTS.index("keep")


class MergeTokens:
    """One call, ready to be launched: `rows` writes the rows and, with them, the tensors of the plan."""

    MAKES_TENSORS = False
    rows_backward = staticmethod(rows_backward)

    def __init__(self, batch: Batch, source_index: Tensor, facts: tuple[Tensor | None, ...], kv: tuple[Tensor | None, ...], text_index, window, workspace):
        self.batch = batch
        self._rest = (source_index, text_index, *facts, *kv), window, workspace

    def rows(self, *arguments) -> None:
        *rows, status = arguments
        if status is not RAISE:
            module.merge_tokens(*rows, status, *self.batch, *self._rest)
            return
        found = torch.zeros(8, dtype=torch.int64, device=rows[0].device)
        module.merge_tokens(*rows, found, *self.batch, *self._rest)
        record = tuple(found.tolist())
        if record[0]:
            raise RecordedError(record)


def _window(attend, holes: bool) -> int | None:
    """Of a mask that is one causal interval a row; None: another mask."""
    if holes or not isinstance(attend, Attend) or attend != Attend(window=attend.window):
        return None
    return attend.window or 0


def merge_usual(
    chosen, input_ids, inputs_embeds, weight, image_embeds, attention_mask, labels, document_ids, image_token_id, out
) -> tuple | None:
    """(the call, source_index, versions, step facts, text_index or None, (kv_lo, kv_hi) or None), or None where one launch cannot serve it."""
    scheme, layout, left, unused, settings = chosen
    found = module.usual_tokens(
        input_ids, inputs_embeds, weight, image_embeds, attention_mask, labels, document_ids, image_token_id, layout, left, unused, settings.length, out
    )
    if found is None:
        return None
    kinds, versions, (groups, width), workspace = found
    batch = tuple.__new__(Batch, (input_ids, attention_mask, document_ids, labels, kinds, None, None, scheme, layout, left, unused))
    new, shape = input_ids.new_empty, (groups, width)
    source_index = new(shape, dtype=torch.int32)
    facts = (
        None if labels is None else new(shape, dtype=labels.dtype),
        new(shape, dtype=torch.int64),
        new(shape, dtype=torch.int32),
        new(shape, dtype=torch.bool),
        new(input_ids.shape[0] + 1, dtype=torch.int32),
    )
    window = _window(settings.attend, layout == _KEEP and attention_mask is not None)
    kv = (None, None) if window is None else (new(shape, dtype=torch.int32), new(shape, dtype=torch.int32))
    text_index = new(shape, dtype=torch.int32) if settings.combine == "add" else None
    labels_out, position_ids, document_out, mask_out, cu_seqlens = facts
    call = MergeTokens(
        batch, source_index, (position_ids, document_out, mask_out, labels_out, cu_seqlens), kv, text_index, window or 0,
        new(workspace, dtype=torch.uint8) if workspace else None,
    )  # fmt: skip
    return call, source_index, versions, facts, text_index, None if window is None else kv
