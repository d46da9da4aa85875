"""The definition of the mask's intervals in plain PyTorch: who sees whom among the rows of the output."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .batch import TOO_MANY_INTERVALS, report

_CAUSAL, _FULL = 0, 1
_IMAGES_CAUSAL, _IMAGES_BIDIRECTIONAL, _IMAGES_WINDOWED = 0, 1, 2


class _Documents(NamedTuple):
    """For every row (G, W): its document's bounds, and the kept rows around it. Padding rows hold anything."""

    kept: Tensor
    start: Tensor  # first row of the document
    stop: Tensor  # row after its last kept row
    run: Tensor  # number of the unbroken run of kept rows
    run_start: Tensor
    run_stop: Tensor
    next_kept: Tensor  # (G, W + 1) first kept row at or after
    last_kept: Tensor  # (G, W + 1) last kept row before


def _from_left(values: Tensor) -> Tensor:
    return values.cummax(1).values if values.shape[1] else values


def _from_right(values: Tensor) -> Tensor:
    return values.flip(1).cummin(1).values.flip(1) if values.shape[1] else values


def _documents(document_ids: Tensor) -> _Documents:
    width = document_ids.shape[1]
    row = torch.arange(width, device=document_ids.device).expand(document_ids.shape)
    kept = document_ids >= 0
    edge = torch.full_like(row[:, :1], -1)
    last_kept = torch.cat([edge, _from_left(torch.where(kept, row, -1))], 1) if width else edge[:, :0]
    next_kept = torch.cat([_from_right(torch.where(kept, row, width)), edge + 1 + width], 1) if width else edge[:, :0]

    def id_at(index: Tensor) -> Tensor:
        safe = index.clamp(0, max(width - 1, 0))
        return torch.where((index >= 0) & (index < width), document_ids.gather(1, safe), -1)

    before, after = last_kept[:, :-1], next_kept[:, 1:]
    begins = kept & (id_at(before) != document_ids)
    ends = kept & (id_at(after) != document_ids)
    run_begins = begins | (kept & (before < row - 1))
    run_ends = ends | (kept & (after > row + 1))
    return _Documents(
        kept,
        _from_left(torch.where(begins, row, -1)),
        _from_right(torch.where(ends, row + 1, width)),
        run_begins.long().cumsum(1),
        _from_left(torch.where(run_begins, row, -1)),
        _from_right(torch.where(run_ends, row + 1, width)),
        next_kept,
        last_kept,
    )


def _image_runs(image_ids: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(is image, first row, row after the last) of the unbroken run of rows of one image in one document."""
    width = image_ids.shape[1]
    row = torch.arange(width, device=image_ids.device).expand(image_ids.shape)
    is_image = (image_ids >= 0) & (document_ids >= 0)
    changes = (image_ids[:, 1:] != image_ids[:, :-1]) | (document_ids[:, 1:] != document_ids[:, :-1])
    begins, ends = is_image.clone(), is_image.clone()
    begins[:, 1:] &= changes
    ends[:, :-1] &= changes
    return is_image, _from_left(torch.where(begins, row, -1)), _from_right(torch.where(ends, row + 1, width))


def _candidates(document_ids: Tensor, docs: _Documents, image_ids, attend, prefix_lengths, parent_ids) -> list[tuple[Tensor, Tensor]]:
    """The intervals whose union a row sees, padding inside documents not yet cut out."""
    kind, window, sinks, chunk, images = attend
    row = torch.arange(document_ids.shape[1], device=document_ids.device).expand(document_ids.shape)
    start, stop = docs.start, docs.stop
    lo, hi = start, row + 1 if kind == _CAUSAL else stop
    if chunk:
        lo = start + (row - start).div(chunk, rounding_mode="floor") * chunk
        if kind == _FULL:
            hi = torch.minimum(stop, lo + chunk)
    if window:
        lo = torch.maximum(lo, row - window + 1)
        if kind == _FULL:
            hi = torch.minimum(hi, row + window)
    found = []
    if images != _IMAGES_CAUSAL and image_ids is not None:
        is_image, first, after = _image_runs(image_ids, document_ids)
        if images == _IMAGES_WINDOWED:
            hi = torch.where(is_image, torch.maximum(hi, after), hi)
        else:
            found.append((torch.where(is_image, first, 0), torch.where(is_image, after, 0)))
    found.append((lo, hi))
    if sinks:
        found.append((start, torch.minimum(start + sinks, row + 1)))
    own = document_ids.clamp(min=0).long()
    if prefix_lengths is not None:
        length = torch.as_tensor(prefix_lengths, device=document_ids.device)
        length = length if length.ndim == 0 else length.long()[own.clamp(max=len(length) - 1)] * (own < len(length))
        found.append((start, torch.minimum(start + length, stop)))
    if parent_ids is not None and document_ids.numel():
        parents = torch.as_tensor(parent_ids, device=document_ids.device).long()
        parent = torch.where(own < len(parents), parents[own.clamp(max=len(parents) - 1)], -1)
        size = max(int(own.max()) + 1, int(parents.max()) + 1)
        bounds = torch.zeros(2, document_ids.shape[0], size, dtype=torch.int64, device=document_ids.device)
        sample = torch.arange(document_ids.shape[0], device=document_ids.device)[:, None].expand(document_ids.shape)
        for bound, values in zip(bounds, (start, stop)):
            bound[sample[docs.kept], own[docs.kept]] = values[docs.kept]
        lo, hi = (torch.where(parent >= 0, bound.gather(1, parent.clamp(min=0)), 0) for bound in bounds)
        found.append((lo, hi))
    return found


def intervals(document_ids, image_ids, attend, prefix_lengths, parent_ids, pair, status):
    """``(kv_lo, kv_hi, kv_lo2, kv_hi2)``, int32 (G, W): the keys that each row sees; the second pair only with `pair`."""
    docs = _documents(document_ids)
    width = document_ids.shape[1]
    nothing = torch.full_like(docs.start, width)
    pieces, too_many = [], torch.zeros_like(docs.kept)
    for lo, hi in _candidates(document_ids, docs, image_ids, attend, prefix_lengths, parent_ids):
        if not width:
            break
        full = docs.kept & (lo < hi)
        first = docs.next_kept.gather(1, lo.clamp(0, width))
        last = docs.last_kept.gather(1, hi.clamp(0, width))
        full &= (first < width) & (last >= first)
        first, last = first.clamp(max=width - 1), last.clamp(min=0)
        apart = docs.run.gather(1, last) - docs.run.gather(1, first)
        too_many |= full & (apart > 1)
        middle = docs.run_stop.gather(1, first)
        pieces.append((torch.where(full, first, nothing), torch.where(full, torch.where(apart == 0, last + 1, middle), nothing)))
        two = full & (apart > 0)
        pieces.append((torch.where(two, docs.run_start.gather(1, last), nothing), torch.where(two, last + 1, nothing)))
    lo1, hi1, lo2, hi2 = (torch.zeros_like(docs.start) for _ in range(4))
    if pieces:
        lows, highs = torch.stack([p[0] for p in pieces]), torch.stack([p[1] for p in pieces])
        order = lows.argsort(0)
        found = torch.zeros_like(lo1)  # intervals so far
        for lo, hi in zip(lows.gather(0, order), highs.gather(0, order)):
            real = lo < hi
            top = torch.where(found > 1, hi2, hi1)
            joins = real & (found > 0) & (lo <= top)
            hi1 = torch.where(joins & (found == 1), torch.maximum(hi1, hi), hi1)
            hi2 = torch.where(joins & (found > 1), torch.maximum(hi2, hi), hi2)
            fresh = real & ~joins
            lo1, hi1 = torch.where(fresh & (found == 0), lo, lo1), torch.where(fresh & (found == 0), hi, hi1)
            lo2, hi2 = torch.where(fresh & (found == 1), lo, lo2), torch.where(fresh & (found == 1), hi, hi2)
            found = found + fresh.long()
        too_many |= found > (2 if pair else 1)
    bad = too_many.reshape(-1).nonzero()[:, 0]
    if len(bad):
        report((TOO_MANY_INTERVALS, int(bad[0]), 0, 0, 0, 0, 0, int(bad[0]) % max(width, 1)), status)
    lo1, hi1, lo2, hi2 = (x.int() for x in (lo1, hi1, lo2, hi2))
    return (lo1, hi1, lo2, hi2) if pair and bool((hi2 > 0).any()) else (lo1, hi1, None, None)
