"""The rows themselves, in CUDA C++.

Launches: `rows` 1 (2 where a bad token id must raise at once). `rows_backward` 1; a weight gradient is the ids of the rows,
a stable sort of them, and one launch for the sums. More than 48 feature tensors apart in memory (64 gradients): one launch
for each so many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import RAISE, RecordedError
from .cuda_module import module


def rows(
    out: Tensor | torch.dtype, text: Tensor | None, weight: Tensor | None, tokens: Tensor | None, scale: float | None, features, starts,
    source_index: Tensor, text_index: Tensor | None, add: bool, only_features: bool, status,
) -> Tensor:  # fmt: skip
    """Every output row: a copy of its feature row or of its token's embedding, converted; with add the sum of both."""
    if status is RAISE:
        status = None
        if weight is not None:
            if isinstance(out, torch.dtype):
                out = weight.new_empty(*source_index.shape, weight.shape[-1], dtype=out)
            found = torch.zeros(8, dtype=torch.int64, device=out.device)
            module.rows(out, text, weight, tokens, scale, features, starts, source_index, text_index, add, only_features, found, True)
            record = tuple(found.tolist())
            if record[0]:
                raise RecordedError(record)
    return module.rows(out, text, weight, tokens, scale, features, starts, source_index, text_index, add, only_features, status, False)


def _with_weight(gradients_of, grad, source_index, text_index, tokens, scale, starts, add, grad_text, grad_weight, grad_features):
    made = gradients_of(grad, source_index, text_index, tokens, scale, starts, add, grad_text, grad_features)
    if grad_weight is None or made is None:
        return made
    if type(grad_weight) is tuple:
        grad_weight = grad.new_empty(*grad_weight[0], dtype=grad_weight[1])
    _weight_gradient(grad, source_index, text_index, tokens, scale, add, grad_weight, False)
    return grad_weight, *made[1:]


def rows_backward(*arguments) -> tuple[Tensor | None, ...]:
    """Every gradient row is the row of `grad` that came from it (for the embedding weight: the sum of them), or zero.

    `arguments`: grad, source_index, text_index, tokens, scale, starts, add, grad_text, grad_weight, grad_features. A gradient: a
    tensor, the (shape, dtype) of one that is made here, or None where none is wanted. Returned: that of the text or weight, and
    those of the features.
    """
    return _with_weight(module.rows_backward, *arguments)


def gradients(*arguments) -> tuple[Tensor | None, ...] | None:
    """As `rows_backward`; None where `grad` is not an ordinary tensor or a mode is active."""
    return _with_weight(module.gradients, *arguments)


def accumulate_weight(grad: Tensor, source_index: Tensor, text_index: Tensor | None, tokens: Tensor, scale: float | None, add: bool, weight_grad: Tensor) -> None:
    """Add the embedding weight's gradient to what is in `weight_grad`; rows of ids that do not occur are not touched."""
    _weight_gradient(grad, source_index, text_index, tokens, scale, add, weight_grad, True)


def _weight_gradient(grad, source_index, text_index, tokens, scale, add, target, accumulate) -> None:
    ids = torch.empty(source_index.numel(), dtype=torch.int32, device=grad.device)
    module.weight_ids(grad, source_index, text_index, tokens, scale, (), add, target, ids)
    ids, order = torch.sort(ids, stable=True)
    module.weight_gradient(grad, source_index, text_index, tokens, scale, (), add, target, ids, order, accumulate)
