"""The usual call of merge in one launch: rows, source_index and what a training step reads, from the token ids.

Recognised in one native call. Before sm_90 there are two launches: the first counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attending import CAUSAL, NO_LIMIT, Attend
from ..batch import LAYOUTS, RAISE, Batch, RecordedError
from .cuda_merge import gradients
from .cuda_module import module

#: rows_of(input_ids, inputs_embeds, weight, image_embeds, out, source_index) -> rows of image_embeds where all is of the usual kind, or None
rows_of = None if module is None else module.rows_of

_KEEP = LAYOUTS.index("keep")


class MergeTokens:
    """One call, ready to be launched: `rows` writes the rows and, with them, the tensors of the plan.

    A launched one stays in the graph for its `gradients`, and holds no tensor.
    """

    MAKES_TENSORS = True
    gradients = staticmethod(gradients)

    def __init__(self, call, batch: Batch):
        self._call = call
        self.batch: Batch | None = batch  # for the words of an error

    def rows(self, out, text, weight, tokens, scale, features, starts, source_index, text_index, add, only_features, status) -> Tensor:
        """As `cuda_merge.rows`, of the tensors that the call was recognised with."""
        if status is not RAISE:
            self.batch = None
            return module.merge_tokens(self._call, out, scale, only_features, status)
        found = torch.zeros(8, dtype=torch.int64, device=source_index.device)
        made = module.merge_tokens(self._call, out, scale, only_features, found)
        record = tuple(found.tolist())
        if record[0]:
            raise RecordedError(record)
        self.batch = None
        return made


def _window(attend, holes: bool) -> int | None:
    """Of a mask that is one causal interval a row; None: another mask."""
    if attend is CAUSAL:
        return None if holes else 0
    if holes or not isinstance(attend, Attend) or attend != Attend(window=attend.window):
        return None
    return min(attend.window or 0, NO_LIMIT)


def merge_usual(chosen, given: tuple, out: Tensor | None) -> tuple | None:
    """(the call, the batch, versions, what it will have written), or None where one launch cannot serve it.

    `given`: input_ids, inputs_embeds, weight, image_embeds, attention_mask, labels, document_ids, image_token_id.
    Written are source_index, text_index, position_ids, document_ids, attention_mask, labels, cu_seqlens, intervals; None where it is
    not made. `intervals` int32 (2, at least G * W): kv_lo, kv_hi.
    """
    scheme, layout, left, unused, settings = chosen
    input_ids, _, _, _, attention_mask, labels, document_ids, _ = given
    window = _window(settings.attend, layout == _KEEP and attention_mask is not None)
    found = module.usual_tokens(*given, layout, left, unused, settings.length, out, settings.combine == "add", window)
    if found is None:
        return None
    call, kinds, versions, made = found
    batch = tuple.__new__(Batch, (input_ids, attention_mask, document_ids, labels, kinds, None, None, scheme, layout, left, unused))
    return MergeTokens(call, batch), batch, versions, made
