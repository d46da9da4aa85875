"""Labels of a batch, how many each document has, and weights with which their mean is the mean over samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..batch import IGNORE_INDEX


def before_shift(labels: Tensor) -> Tensor:
    """``(T,)`` labels that are shifted (``labels[i]`` is the target of token i) as labels of the tokens themselves.

    What the last one aims at lies behind the sample, and is left out.
    """
    if not len(labels):
        return labels
    return torch.cat([labels.new_full((1,), IGNORE_INDEX), labels[:-1]])


def without_first(labels: Tensor) -> Tensor:
    """``(T,)`` labels, none at the first token, as of a packed row."""
    return torch.cat([labels.new_full((min(1, len(labels)),), IGNORE_INDEX), labels[1:]])


def token_counts(labels: Tensor, document_ids: Tensor, documents: int) -> Tensor:
    """``(documents,)`` int64: tokens of each document that have a label."""
    counted = document_ids[(labels != IGNORE_INDEX) & (document_ids >= 0)]
    return torch.from_numpy(np.bincount(counted.numpy(), minlength=documents).astype(np.int64))


def loss_weights(labels: Tensor, document_ids: Tensor, counts: Tensor) -> Tensor:
    """``(G, W)`` float32: ``(weights * loss).sum()`` is the mean over documents of each one's mean loss.

    Each document with labels weighs the same in all, whatever its length; one without has no mean and does not count.
    """
    documents = max(int((counts > 0).sum()), 1)
    each = 1.0 / (counts.double().clamp(min=1) * documents)
    there = (labels != IGNORE_INDEX) & (document_ids >= 0)
    weights = torch.zeros(labels.shape, dtype=torch.float32)
    weights[there] = each[document_ids[there].long()].float()
    return weights
