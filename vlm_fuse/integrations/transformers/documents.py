"""Which tokens of a row belong to one document, told by position_ids that begin anew, as transformers tells packed rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: the names of a decoder's cache: since transformers 5.24, and before
CACHES = ("cache", "past_key_values")
_KEPT = "_vlm_fuse_documents"


class Documents(NamedTuple):
    """What the host knows of a batch of rows."""

    numbers: Tensor  # (B, L) int64, counted from 0 in each row; padding has the number of the document before it
    packed: bool  # a row has several
    all_kept: bool  # no padding


def numbers(position_ids: Tensor, kept: Tensor | None) -> Tensor:
    """``(B, L)`` documents counted in each row. No host read.

    Args:
        position_ids: ``(B, L)`` ints. Without `kept` a document begins wherever they do not go on by one, as in transformers'
            ``find_packed_sequence_indices``; with it where they go back, so that a hole begins none.
        kept: ``(B, L)`` bool, False at padding, which begins nothing.
    """
    if kept is None:
        starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
        return torch.nn.functional.pad(starts, (1, 0)).cumsum(-1)
    return (_steps(position_ids, kept) <= 0).cumsum(-1)


def _steps(position_ids: Tensor, kept: Tensor) -> Tensor:
    """How far each token's position lies behind that of the token before it; 1 where there is none, and at padding."""
    columns = torch.arange(position_ids.shape[1], device=position_ids.device)
    last = torch.where(kept, columns, -1).cummax(-1).values
    before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    return torch.where(kept & (before >= 0), position_ids - position_ids.gather(1, before.clamp(min=0)), 1)


def going_back(position_ids: Tensor, kept: Tensor) -> Tensor:
    """``(B, L)`` where a token's position lies before that of the token before it: the row is packed. No host read.

    That positions stand still does not say it: those of time do so in an image.
    """
    return _steps(position_ids, kept) < 0


def places(own: Tensor, attention_mask: Tensor | None) -> Tensor:
    """``(B, L)`` how far each token stands behind the first of its document. No host read.

    Args:
        own: ``(B, L)`` as of `numbers`; padding before the first document has that one's number.
        attention_mask: ``(B, L)``, nonzero = token.
    """
    columns = torch.arange(own.shape[1], device=own.device).expand_as(own)
    beginning = columns if attention_mask is None else torch.where(attention_mask != 0, columns, own.shape[1])
    first = torch.full_like(columns, own.shape[1]).scatter_reduce(1, own, beginning, "amin")
    return columns - first.gather(1, own)


def documents(position_ids: Tensor, attention_mask: Tensor | None) -> Documents:
    """What the host knows of the rows, by one read for all masks and layers of a forward: it stays with the positions' tensor.

    Args:
        position_ids: ``(B, L)`` ints.
        attention_mask: ``(B, L)``, nonzero = token.
    """
    key = (position_ids._version, None if attention_mask is None else (id(attention_mask), attention_mask._version))
    found = getattr(position_ids, _KEPT, None)
    if found is not None and found[0] == key:
        return found[1]
    kept = None if attention_mask is None else attention_mask.to(position_ids.device) != 0
    if kept is None:
        own = numbers(position_ids, None)
        made = Documents(own, own[:, -1].any().tolist(), True)
    else:
        packed, all_kept = torch.stack([going_back(position_ids, kept).any(), kept.all()]).tolist()
        made = Documents(numbers(position_ids, None if all_kept else kept), packed, all_kept)
    setattr(position_ids, _KEPT, (key, made, attention_mask))  # with the mask, whose id would else be given to another
    return made


def with_text_row(position_ids, cache):
    """M-RoPE's positions with the text's row in front, which transformers needs to see packed rows; others as they are.

    Args:
        position_ids: ``(3, B, L)``: a document begins where all three are 0.

    Returns:
        Tensor: ``(4, B, L)``. No host read.
    """
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 3 or position_ids.shape[0] != 3 or position_ids.shape[2] < 2:
        return position_ids
    if not is_empty(cache):
        return position_ids
    columns = torch.arange(position_ids.shape[2], device=position_ids.device)
    starts = torch.where((position_ids == 0).all(0), columns, 0).cummax(-1).values
    return torch.cat([(columns - starts)[None].to(position_ids.dtype), position_ids])


def is_empty(cache) -> bool:
    """No cache, or one that has seen nothing yet, as far as the host can know: transformers makes one in training too."""
    if cache is None:
        return True
    length = getattr(cache, "get_seq_length", lambda: None)()
    return type(length) is int and length == 0
