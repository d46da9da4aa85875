"""The definition of every op in plain PyTorch: what is computed, not how fast.

Every backend is tested against this file. It needs torch alone and runs on any device.
Names of dimensions: B samples of T tokens, N = B * T; G output rows of width W; D hidden size; K kinds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .batch import (
    COUNTS_DIFFER,
    DOCUMENT_RETURNS,
    IGNORE_INDEX,
    IMAGE_CUT,
    LAYOUTS,
    OUTSIDE_VOCABULARY,
    PAD,
    RAISE,
    SCHEMES,
    TOO_FEW_ROWS,
    TOO_LONG,
    TOO_MANY_ROWS,
    Batch,
    report,
)
from .reference_masks import intervals as intervals  # the backend's functions are found in one module
from .reference_positions import mrope_position_ids as mrope_position_ids
from .reference_renderings import bits as bits
from .reference_renderings import block_map as block_map
from .reference_renderings import dense as dense
from .reference_renderings import segments as segments

#: outputs and gradients are made by the caller.
MAKES_TENSORS = False


def available() -> tuple[bool, str]:
    """Always there: it needs torch alone."""
    return True, "plain PyTorch"


# --- which rows there are ---------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Every row that the batch gives, in order, before a layout decides on its address. One entry a row."""

    sample: Tensor
    token: Tensor  # flat token that the row stands for, -1 for the image rows of images_first
    kind: Tensor  # -1 text, else index of the kind
    feature: Tensor  # feature row, -1 for text and for a placeholder without a feature
    image: Tensor  # image number over the batch, -1 for text
    kept: Tensor  # False: padding (only "keep" has such rows)
    given_id: Tensor  # document id that was given, else the sample


def _first_rows(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


def _image_sizes(batch: Batch, kind: int) -> Tensor | None:
    """Rows of each image of a kind, or None where they are not known."""
    _, _, _, images, rows_each = batch.kind(kind)
    device = batch.tokens.device
    if images < 0:
        return None
    if rows_each >= 0:
        return torch.full((images,), rows_each, dtype=torch.int64, device=device)
    listed_before = sum(batch.kind(k)[3] for k in range(kind) if batch.kind(k)[3] >= 0 and batch.kind(k)[4] < 0)
    return batch.image_rows[listed_before : listed_before + images]


def _counts(batch: Batch, kind: int) -> Tensor | None:
    """Feature rows that each sample owns of a kind, or None where that was not given."""
    if batch.feature_counts is None or batch.feature_counts.shape[1] == 0 or int(batch.feature_counts[kind, 0]) < 0:
        return None
    return batch.feature_counts[kind]


def _placeholders(batch: Batch, kind: int) -> Tensor:
    """(N,) bool: the tokens that are placeholders of a kind."""
    flat = batch.tokens.reshape(-1)
    if SCHEMES[batch.scheme] == "images_first":
        return torch.zeros_like(flat, dtype=torch.bool)
    return flat if flat.dtype == torch.bool else flat.long() == batch.kind(kind)[0]


def _kept_tokens(batch: Batch) -> Tensor:
    kept = torch.ones_like(batch.tokens, dtype=torch.bool)
    if batch.attention_mask is not None:
        kept &= batch.attention_mask != 0
    if batch.document_ids is not None:
        kept &= batch.document_ids >= 0
    return kept.reshape(-1)


def _sample_of_tokens(batch: Batch) -> Tensor:
    samples, tokens = batch.tokens.shape
    return torch.arange(samples, device=batch.tokens.device).repeat_interleave(tokens)


def _given_ids(batch: Batch) -> Tensor:
    return _sample_of_tokens(batch) if batch.document_ids is None else batch.document_ids.reshape(-1).long()


def _within_sample(is_placeholder: Tensor, sample: Tensor, samples: int) -> Tensor:
    """(N,) how many placeholders stand before each token in its sample."""
    per_sample = torch.zeros(samples, dtype=torch.int64, device=sample.device).index_add_(0, sample, is_placeholder.long())
    return is_placeholder.long().cumsum(0) - is_placeholder.long() - _first_rows(per_sample)[sample]


def _images_first_units(batch: Batch, kind: int) -> tuple[Tensor, Tensor]:
    """(image, sample) of the images of a kind that belong to a sample."""
    sizes, counts = _image_sizes(batch, kind), _counts(batch, kind)
    device, samples = batch.tokens.device, batch.tokens.shape[0]
    image = torch.arange(len(sizes), device=device)
    if counts is None:
        return image[:samples], image[:samples]
    if samples == 0:
        return image[:0], image[:0]
    start, stop = _first_rows(counts), counts.cumsum(0)
    sample = torch.searchsorted(stop, _first_rows(sizes), right=True).clamp(max=samples - 1)
    inside = (_first_rows(sizes) >= start[sample]) & (sizes.cumsum(0) <= stop[sample]) & (counts[sample] > 0)
    return image[inside], sample[inside]


def _rows(batch: Batch) -> Rows:
    """One unit a token (and, with images_first, one a image), each repeated for the rows that it gives."""
    keep = LAYOUTS[batch.layout] == "keep"
    samples = batch.tokens.shape[0]
    sample, given = _sample_of_tokens(batch), _given_ids(batch)
    token = torch.arange(batch.tokens.numel(), device=batch.tokens.device)
    kept = _kept_tokens(batch)
    kind, first, image = (torch.full_like(token, -1) for _ in range(3))
    rows = torch.ones_like(token) if keep else kept.long()
    before, pseudo = 0, []  # images of the kinds before this one; units that stand in front of the tokens
    for c in range(batch.kind_count):
        _, first_row, total_rows, images, _ = batch.kind(c)
        sizes, counts, here = _image_sizes(batch, c), _counts(batch, c), _placeholders(batch, c)
        inside = _within_sample(here, sample, samples)
        kind = torch.where(here, c, kind)
        if SCHEMES[batch.scheme] == "placeholders":
            ordinal = here.long().cumsum(0) - 1 if counts is None else _first_rows(counts)[sample] + inside
            own = ordinal < total_rows
            if counts is not None:
                own &= inside < counts[sample]
            first = torch.where(here & own, first_row + ordinal, first)
            if sizes is None:
                begins = here.clone()
                begins[1:] &= ~(here[:-1] & (sample[1:] == sample[:-1]) & (given[1:] == given[:-1]))
                number, images = begins.long().cumsum(0) - 1, int(begins.sum())
            else:
                number = torch.searchsorted(sizes.cumsum(0), ordinal, right=True)
                number = torch.where(own, number, -1 - before)
        elif SCHEMES[batch.scheme] == "expand":
            starts = _first_rows(sizes)
            number = here.long().cumsum(0) - 1
            if counts is not None:
                number = torch.searchsorted(starts, _first_rows(counts))[sample] + inside
            own = here & (number < images)
            safe = number.clamp(0, max(images - 1, 0))
            size = sizes[safe] if images else torch.zeros_like(number)
            start = starts[safe] if images else torch.zeros_like(number)
            own &= start + size <= total_rows
            if counts is not None:
                own &= start + size <= counts.cumsum(0)[sample]
            first = torch.where(own, first_row + start, first)
            rows = torch.where(here, torch.where(own, size, 0) * kept, rows)
        else:
            number = torch.full_like(token, -1)
            if sizes is not None:
                owned, owner = _images_first_units(batch, c)
                pseudo.append((owner, torch.full_like(owner, c), first_row + _first_rows(sizes)[owned], before + owned, sizes[owned]))
        image = torch.where(here, before + number, image)
        before += max(images, 0)
    if pseudo:
        owner, owner_kind, owner_first, owner_image, owner_rows = (torch.cat(parts) for parts in zip(*pseudo))
        none = torch.full_like(owner, -1)
        order = torch.cat([owner, sample]).argsort(stable=True)
        token, kind, first, image, rows, sample, given, kept = (
            torch.cat([a, b])[order]
            for a, b in (
                (none, token), (owner_kind, kind), (owner_first, first), (owner_image, image),
                (owner_rows, rows), (owner, sample), (owner, given), (none.bool(), kept),
            )
        )  # fmt: skip
    unit = torch.arange(len(token), device=token.device).repeat_interleave(rows)
    offset = torch.arange(len(unit), device=token.device) - _first_rows(rows)[unit]
    feature = torch.where(first[unit] >= 0, first[unit] + offset, -1)
    return Rows(sample[unit], token[unit], kind[unit], feature, image[unit], kept[unit], given[unit])


# --- where they go ----------------------------------------------------------------------------------------------------


def _per_sample(batch: Batch, rows: Rows) -> Tensor:
    """(B,) kept rows of each sample."""
    zeros = torch.zeros(batch.tokens.shape[0], dtype=torch.int64, device=rows.sample.device)
    return zeros.index_add_(0, rows.sample, rows.kept.long())


def _address(batch: Batch, rows: Rows, width: int) -> tuple[tuple[int, int], Tensor, Tensor]:
    """(G, W), the flat address of every row in it, and whether it lies inside."""
    index = torch.arange(len(rows.sample), device=rows.sample.device)
    samples = batch.tokens.shape[0]
    if LAYOUTS[batch.layout] == "keep":
        return (samples, width), index, torch.ones_like(index, dtype=torch.bool)
    if LAYOUTS[batch.layout] == "packed":
        return (1, width), index, index < width
    length = _per_sample(batch, rows)
    column = index - _first_rows(length)[rows.sample]
    inside = column < width
    if batch.left:
        column = column + (width - length.clamp(max=width))[rows.sample]
    return (samples, width), rows.sample * width + column, inside


def _document_of_tokens(batch: Batch) -> tuple[Tensor, int]:
    """(N,) number over the batch of the document of every kept token, and how many documents there are."""
    kept = _kept_tokens(batch)
    sample, given = _sample_of_tokens(batch)[kept], _given_ids(batch)[kept]
    begins = torch.ones_like(sample, dtype=torch.bool)
    begins[1:] = (sample[1:] != sample[:-1]) | (given[1:] != given[:-1])
    document = torch.full_like(kept, -1, dtype=torch.int64)
    document[kept] = begins.long().cumsum(0) - 1
    return document, int(begins.sum())


def _document_runs(batch: Batch, rows: Rows) -> Tensor:
    """(kept rows,) number of the document of every kept row: the sample where no ids were given."""
    if batch.document_ids is None:
        return rows.sample[rows.kept]
    return _document_of_tokens(batch)[0][rows.token[rows.kept]]


def count(batch: Batch) -> tuple[int, int, int, tuple[int, ...]]:
    """Kept rows of the longest sample, of all samples, documents, and the placeholders of each kind."""
    rows = _rows(batch)
    length = _per_sample(batch, rows)
    placeholders = tuple(int(_placeholders(batch, c).sum()) for c in range(batch.kind_count))
    return int(length.max()) if len(length) else 0, int(length.sum()), _document_of_tokens(batch)[1], placeholders


def plan(batch: Batch, width: int, status=RAISE) -> Tensor:
    """``(G, W)`` int32 source_index: feature row k >= 0, -1 - j for token j, or PAD."""
    report(find_error(batch, width), status)
    rows = _rows(batch)
    shape, address, inside = _address(batch, rows, width)
    source = torch.where(rows.kind >= 0, rows.feature, -1 - rows.token)
    source = torch.where((rows.kind >= 0) & (rows.feature < 0), PAD, source)
    out = torch.full((shape[0] * shape[1],), PAD, dtype=torch.int32, device=source.device)
    out[address[inside]] = source[inside].int()
    return out.view(shape)


def facts(batch: Batch, width: int, names: tuple[str, ...], documents: int) -> tuple[Tensor, ...]:
    """The named facts of the output rows, in that order. `documents` sizes cu_seqlens where document_ids were given."""
    rows = _rows(batch)
    shape, address, inside = _address(batch, rows, width)
    kept = rows.kept
    runs = _document_runs(batch, rows)
    given, packed = batch.document_ids is not None, LAYOUTS[batch.layout] == "packed"

    def spread(values: Tensor, fill, dtype: torch.dtype, chosen: Tensor = kept) -> Tensor:
        chosen = chosen & inside
        out = torch.full((shape[0] * shape[1],), fill, dtype=dtype, device=values.device)
        out[address[chosen]] = values[chosen].to(dtype)
        return out.view(shape)

    def per_kept(values: Tensor) -> Tensor:
        out = torch.zeros_like(rows.sample)
        out[kept] = values
        return out

    index = torch.arange(len(runs), device=runs.device)
    begins = torch.ones_like(runs, dtype=torch.bool)
    begins[1:] = runs[1:] != runs[:-1]
    position = index - index[begins].repeat_interleave(torch.unique_consecutive(runs, return_counts=True)[1])
    document = per_kept(runs) if given and packed else rows.given_id

    def make(name: str) -> Tensor:
        if name == "text_index":
            return spread(rows.token, -1, torch.int32, torch.ones_like(kept))
        if name == "position_ids":
            out = spread(per_kept(position), 0, torch.int64)
            return _number_tails(out, spread(kept, False, torch.bool)) if given or packed else out
        if name == "document_ids":
            return spread(document, -1, torch.int32)
        if name == "image_ids":
            return spread(rows.image, -1, torch.int32)
        if name == "kind_ids":
            return spread(rows.kind + 1, -1, torch.int8)
        if name == "attention_mask":
            return spread(kept, False, torch.bool)
        if name == "labels":
            label = torch.full_like(rows.token, IGNORE_INDEX)
            text = rows.kind < 0
            label[text] = batch.labels.reshape(-1)[rows.token[text]].long()
            if given or packed:
                label[kept.nonzero()[:, 0][begins]] = IGNORE_INDEX
            return spread(label, IGNORE_INDEX, batch.labels.dtype)
        if name == "cu_seqlens":
            length = _per_sample(batch, rows)
            if given:
                length = torch.zeros(documents, dtype=torch.int64, device=runs.device)
                length = length.index_add_(0, runs[runs < documents], torch.ones_like(runs[runs < documents]))
            return torch.cat([length.new_zeros(1), length.cumsum(0)]).int()
        raise KeyError(name)

    return tuple(make(name) for name in names)


def _number_tails(position_ids: Tensor, kept: Tensor) -> Tensor:
    """The padding after the last kept row of each output row counts 0, 1, 2, ..."""
    column = torch.arange(kept.shape[1], device=kept.device).expand(kept.shape)
    last = torch.where(kept, column, -1).amax(1, keepdim=True) if kept.shape[1] else column
    return torch.where(column > last, column - last - 1, position_ids)


# --- what is wrong with it --------------------------------------------------------------------------------------------


def find_error(batch: Batch, width: int) -> tuple[int, ...] | None:
    """The record of the first bad sample, of totals that do not agree, of documents, of a length too small; or None."""
    in_sample = [_placeholders(batch, c).view(batch.tokens.shape).sum(1).tolist() for c in range(batch.kind_count)]
    found = [f for c in range(batch.kind_count) for f in _kind_errors(batch, c, in_sample[c])]
    returning = _returning_document(batch)
    bad_samples = [f for f in (*found, returning) if f is not None and f[1] >= 0]
    if bad_samples:
        return min(bad_samples, key=lambda f: f[1])  # of equal samples the first: kinds in order, then documents
    if found:
        return found[0]
    if LAYOUTS[batch.layout] != "keep":
        length = _per_sample(batch, _rows(batch)).tolist()
        if LAYOUTS[batch.layout] == "packed" and sum(length) > width:
            return TOO_LONG, -1, 0, 0, 0, 0, 0, sum(length)
        if LAYOUTS[batch.layout] == "padded" and max(length, default=0) > width:
            return TOO_LONG, length.index(max(length)), 0, 0, 0, 0, 0, max(length)
    return None


def _kind_errors(batch: Batch, kind: int, in_sample: list[int]):
    """Records of what does not agree for one kind, first sample first."""
    _, _, rows, images, _ = batch.kind(kind)
    sizes, counts = _image_sizes(batch, kind), _counts(batch, kind)
    sizes = None if sizes is None else sizes.tolist()
    scheme = SCHEMES[batch.scheme]
    if counts is not None:
        yield from _count_errors(batch, kind, in_sample, sizes, counts.tolist())
        return
    have = rows if scheme == "placeholders" else len(sizes or ())
    if scheme == "images_first":
        in_sample = [1 if have else 0] * len(in_sample)
    total = sum(in_sample)
    taken = 0
    for sample, wanted in enumerate(in_sample):
        if scheme == "placeholders" and sizes is not None:
            borders = {0}
            begun, reached = 0, 0
            for size in sizes:
                if taken <= reached < taken + wanted:
                    begun += size
                reached += size
                borders.add(reached)
            last = taken + wanted == total
            if taken + wanted <= rows and taken + wanted not in borders and not (batch.unused and last):
                yield IMAGE_CUT, sample, kind, wanted, begun, total, rows, 0
        if taken + wanted > have:
            yield TOO_FEW_ROWS, sample, kind, wanted, have - min(taken, have), total, have, 0
            return
        taken += wanted
    if taken < have and not batch.unused:
        yield TOO_MANY_ROWS, -1, kind, 0, 0, total, have, 0


def _count_errors(batch: Batch, kind: int, in_sample: list[int], sizes: list[int] | None, counts: list[int]):
    rows, scheme, owned = batch.kind(kind)[2], SCHEMES[batch.scheme], sum(counts)
    total, start = sum(in_sample), 0
    for sample, (wanted, given) in enumerate(zip(in_sample, counts)):
        stop = start + given
        if scheme != "placeholders":
            borders = {0}
            for size in sizes:
                borders.add(max(borders) + size)
            if stop not in borders and stop <= rows:
                yield IMAGE_CUT, sample, kind, wanted, given, total, rows, 0
        if scheme == "expand":
            # the rows of the images that the sample's placeholders name, beginning where the sample's rows begin
            reached, first = 0, 0
            while first < len(sizes) and reached < start:
                reached += sizes[first]
                first += 1
            named = sizes[first : first + wanted]
            wanted = sum(named) if len(named) == wanted else max(rows, given) + 1
        if scheme != "images_first" and (wanted > given or (wanted < given and not batch.unused)):
            yield COUNTS_DIFFER, sample, kind, wanted, given, total, rows, 0
        start = stop
    if owned > rows or (owned < rows and not batch.unused):
        yield COUNTS_DIFFER, -1, kind, owned, rows, total, rows, 0


def _returning_document(batch: Batch) -> tuple[int, ...] | None:
    if batch.document_ids is None:
        return None
    kept = _kept_tokens(batch).view(batch.tokens.shape)
    for sample, (ids, keep) in enumerate(zip(batch.document_ids, kept)):
        ids = ids[keep]
        runs = torch.unique_consecutive(ids)
        seen: set[int] = set()
        if len(runs) > len(torch.unique(runs)):
            for given in runs.tolist():
                if given in seen:
                    return DOCUMENT_RETURNS, sample, 0, 0, 0, 0, 0, given
                seen.add(given)
    return None


# --- the rows themselves ----------------------------------------------------------------------------------------------


def _scaled(weight: Tensor, scale: float | None) -> Tensor:
    return weight if scale is None else weight * torch.tensor(scale, dtype=weight.dtype, device=weight.device)


def _table(tensor: Tensor) -> Tensor:
    """``(rows, D)``, also of a hidden size of 0."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def rows(out, text, weight, tokens, scale, features, starts, source_index, text_index, add, only_features, status) -> None:
    """Write every output row: a copy of its feature row or of its token's embedding, converted; with add the sum of both."""
    dim = out.shape[-1]
    source = source_index.reshape(-1).long()
    target = _table(out) if out.is_contiguous() else torch.empty(len(source), dim, dtype=out.dtype, device=out.device)
    if target.data_ptr() != out.data_ptr() and only_features:
        target.copy_(_table(out))
    is_feature, is_text = source >= 0, (source < 0) & (source != PAD)
    token = -1 - source
    if add:
        token = torch.arange(len(source), device=source.device) if text_index is None else text_index.reshape(-1).long()
        is_text = torch.ones_like(is_text) if text_index is None else is_text | (is_feature & (token >= 0))
    if weight is None:
        table = _table(text)
        is_text &= token < len(table)
        text_rows = table[token[is_text]]
    else:
        ids = tokens.reshape(-1)
        is_text &= token < len(ids)
        known = torch.zeros_like(is_text)
        read = ids[token[is_text]]
        known[is_text] = (read >= 0) & (read < len(weight))
        outside = (is_text & ~known).nonzero()[:, 0]
        if len(outside):
            flat = int(token[outside[0]])
            report((OUTSIDE_VOCABULARY, flat, 0, 0, 0, 0, len(weight), int(ids[flat])), status)
        is_text = known
        text_rows = _scaled(weight[ids[token[is_text]].long()], scale)
    wide = torch.float64 if torch.float64 in {text_rows.dtype, *(f.dtype for f in features)} else torch.float32
    feature_rows = torch.zeros(int(is_feature.sum()), dim, dtype=wide, device=out.device)
    wanted, exact = source[is_feature], torch.zeros(int(is_feature.sum()), dim, dtype=out.dtype, device=out.device)
    for first, after, feature in zip(starts, [*starts[1:], 2**62], features):
        table = _table(feature)
        here = (wanted >= first) & (wanted < min(after, first + len(table)))
        feature_rows[here] = table[wanted[here] - first].to(wide)
        exact[here] = table[wanted[here] - first].to(out.dtype)
    plain = torch.zeros_like(target)
    plain[is_text] = text_rows.to(out.dtype)
    if add:
        summed = torch.zeros(len(source), dim, dtype=wide, device=out.device)
        summed[is_text] = text_rows.to(wide)
        both = is_text[is_feature]  # else there is nothing to add, and -0.0 stays what it is
        exact[both] = (summed[is_feature] + feature_rows)[both].to(out.dtype)
    plain[is_feature] = exact
    if only_features:
        target[is_feature] = exact
    else:
        target.copy_(plain)
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view(out.shape))


def rows_backward(grad, source_index, text_index, tokens, scale, starts, add, grad_text, grad_weight, grad_features) -> None:
    """The same rows read the other way: every gradient row is the row of `grad` that came from it, or zero."""
    dim = grad.shape[-1]
    grad = _table(grad)
    source = source_index.reshape(-1).long()
    token, is_text = _text_of_rows(source, text_index, add)
    if grad_text is not None:
        wide = torch.float64 if torch.float64 in (grad.dtype, grad_text.dtype) else torch.float32
        total = torch.zeros(grad_text.shape[:-1].numel(), dim, dtype=wide, device=grad.device)
        inside = is_text & (token < len(total))
        total.index_add_(0, token[inside], grad[inside].to(wide))
        grad_text.copy_(total.view(grad_text.shape))
    if grad_weight is not None:
        grad_weight.copy_(_weight_gradient(grad, token[is_text], is_text, tokens, scale, grad_weight))
    for first, after, out in zip(starts, [*starts[1:], 2**62], grad_features):
        if out is not None:
            table = _table(out)
            here = (source >= first) & (source < min(after, first + len(table)))
            table.zero_()
            table[source[here] - first] = grad[here].to(out.dtype)


def accumulate_weight(grad, source_index, text_index, tokens, scale, add, weight_grad) -> None:
    """Add the embedding weight's gradient to what is in `weight_grad`: in fp32 (fp64 where either is), rounded once."""
    token, is_text = _text_of_rows(source_index.reshape(-1).long(), text_index, add)
    total = _weight_gradient(_table(grad), token[is_text], is_text, tokens, scale, weight_grad)
    weight_grad.copy_(weight_grad.to(total.dtype) + total)


def _text_of_rows(source: Tensor, text_index: Tensor | None, add: bool) -> tuple[Tensor, Tensor]:
    """(token, whether there is one) of every output row."""
    token = -1 - source
    is_text = (source < 0) & (source != PAD)
    if not add:
        return token, is_text
    if text_index is None:
        return torch.arange(len(source), device=source.device), torch.ones_like(is_text)
    token = text_index.reshape(-1).long()
    return token, is_text | ((source >= 0) & (token >= 0))


def _weight_gradient(grad, token, is_text, tokens, scale, like) -> Tensor:
    """(V, D) in fp32 (fp64 where either is): the rows of `grad` added by token id, times the scale."""
    wide = torch.float64 if torch.float64 in (grad.dtype, like.dtype) else torch.float32
    ids = tokens.reshape(-1)
    inside = token < len(ids)
    read = ids[token[inside]].long()
    known = (read >= 0) & (read < len(like))
    total = torch.zeros(like.shape, dtype=wide, device=grad.device)
    total.index_add_(0, read[known], grad[is_text][inside][known].to(wide))
    return total if scale is None else total * torch.tensor(scale, dtype=like.dtype, device=grad.device).to(wide)
