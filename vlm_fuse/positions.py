"""Positions of tokens that do not simply count from the start of their document."""

from __future__ import annotations

import torch
from torch import Tensor


def after_parents(position_ids: Tensor, document_ids: Tensor, parent_ids: Tensor) -> Tensor:
    """Positions that go on where the parent document ends (branches after a shared prompt).

    Args:
        position_ids: ``(G, W)`` int64, counted from the start of each document.
        document_ids: ``(G, W)`` int32, -1 = padding.
        parent_ids: ``(documents,)`` ints by document id, -1 = none; the parent stands earlier in the same row.

    Returns:
        Tensor: ``(G, W)`` int64. No host synchronisation.
    """
    count = len(parent_ids)
    if not count or not document_ids.numel():
        return position_ids
    own = document_ids.long()
    inside = (own >= 0) & (own < count)
    slot = torch.where(inside, own, count)  # one more place, for rows without a parent entry
    length = torch.zeros(own.shape[0], count + 1, dtype=torch.int64, device=own.device)
    length.scatter_add_(1, slot, inside.long())
    length[:, count] = 0
    parents = torch.cat([parent_ids.long(), parent_ids.new_full((1,), -1)])
    above = torch.where((parents >= 0) & (parents < count), parents, count)
    # the sum of the lengths up the chain, which doubles with each step
    offset = length[:, above]
    for _ in range(count.bit_length()):
        offset = offset + torch.where(above == count, 0, offset[:, above])
        above = above[above]
    return position_ids + torch.where(inside, offset.gather(1, slot), 0)
