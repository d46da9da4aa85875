"""`add_features`: feature rows added at the placeholders of rows that are merged already (DeepStack)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, ops, settled
from . import features as forms
from .autograd import RowCall, merge_rows
from .batch import PAD
from .token_plan import TokenPlan


def add_features(hidden_states: Tensor, image_embeds, plan: TokenPlan) -> Tensor:
    """Hidden states with the feature rows added where the images stand, in the layout of the plan.

    Args:
        hidden_states: ``(G, W, D)`` in the layout of the merged rows.
        image_embeds: the forms that `merge` takes, with the row counts of the plan. A bare tensor serves a plan of one
            kind; kinds that a dict leaves out add nothing.
        plan: the TokenPlan of the batch.

    Returns:
        Tensor: ``(G, W, D)`` of the dtype of hidden_states; sums are made in float32 (float64 where either is) and
        rounded once. All other rows are copied as they are.

    Raises:
        ValueError: shapes, devices or row counts that do not fit the plan.
        TypeError: dtypes.

    Example:
        >>> import torch, vlm_fuse
        >>> made = vlm_fuse.plan(torch.tensor([[1, 9, 9]]), image_token_id=9)
        >>> vlm_fuse.add_features(torch.ones(1, 3, 2), torch.full((2, 2), 4.0), made)[0, :, 0]
        tensor([1., 5., 5.])

    Source: DeepStack (arXiv 2406.04334), as in Qwen3-VL.
    """
    settled.is_plan(plan)
    checks.dtype_of("hidden_states", hidden_states, checks.ROW_DTYPES)
    shape = plan.source_index.shape
    if hidden_states.dim() != 3 or hidden_states.shape[:2] != shape:
        raise ValueError(f"hidden_states: expected (G, W, D) with (G, W) = {tuple(shape)}, the plan's rows, got {tuple(hidden_states.shape)}")
    checks.same_device("hidden_states", hidden_states, plan.device, "the plan")
    kinds = settled.kinds_of(plan, image_embeds, None, whole=False)
    for kind in kinds:
        checks.feature_tensors(kind.tensors, hidden_states.shape[-1], hidden_states.device)
    features, starts = forms.tables(kinds, plan.feature_starts)
    source_index = plan.source_index
    for index, kind in enumerate(kinds):
        if not kind.tensors:
            # rows of a kind that is left out pass through as they are, also a negative zero
            first, after = plan.feature_starts[index : index + 2]
            source_index = torch.where((source_index >= first) & (source_index < after), PAD, source_index)
    _, _, _, validate, backend, *_ = plan._settings
    call = RowCall(None, None, starts, source_index, None, True, hidden_states.dtype, ops.mode_of(validate, hidden_states), backend)
    return merge_rows(ops.direct(backend, hidden_states, features), hidden_states, None, features, call)
