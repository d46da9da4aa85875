"""`plan`: the token plan of a batch, from its token ids and sizes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, ops
from . import features as forms
from .attending import CAUSAL, Attend
from .backend import name_from
from .batch import LAYOUTS, SCHEMES, Batch
from .token_plan import SIDES, UNUSED, Settings, TokenPlan

_new = tuple.__new__  # a quarter of the time of _replace

COMBINE = ("replace", "add")


class Choices(NamedTuple):
    """The options of a call: as the kernels take them, and what the plan keeps."""

    scheme: int
    layout: int
    left: bool
    unused: bool
    settings: Settings


#: combinations of (scheme, combine, layout, padding_side, unused_features, validate, backend) that were checked already.
known: dict[tuple, Choices] = {}


def choices(
    scheme: str, combine: str, layout: str, padding_side: str, length, attend, unused_features: str, validate: str, backend: str, document_ids
) -> Choices:
    """The options of a call, checked. `backend` as `backend.name_from` gives it."""
    words = (scheme, combine, layout, padding_side, unused_features, validate, backend)
    try:
        found = known.get(words)
    except TypeError:  # a list or a dict, which no word is
        found = None
    if found is None:
        found = _check_words(words)
    if length is not None or attend is not CAUSAL:
        found = chosen_for(found, length, attend)
    if document_ids is not None:
        checks.ids_fit("document_ids", document_ids)
    if scheme == "images_first" and document_ids is not None:
        raise ValueError("document_ids: refused with scheme='images_first', whose images stand in front of whole samples")
    return found


def chosen_for(chosen: Choices, length, attend) -> Choices:
    """The same choices with a length and an attend."""
    _check_length(length, LAYOUTS[chosen.layout])
    _check_attend(attend)
    scheme, layout, left, unused, (combine, _, _, *rest) = chosen
    return _new(Choices, (scheme, layout, left, unused, _new(Settings, (combine, length, attend, *rest))))


def make(
    tokens: Tensor, attention_mask, labels, document_ids, kinds: tuple[forms.Kind, ...], feature_counts, chosen: Choices
) -> TokenPlan:  # fmt: skip
    """The plan of a checked batch. `kinds` as `features.describe` gives them."""
    samples, scheme, masked = tokens.shape[0], SCHEMES[chosen.scheme], chosen.settings.masked_by_tensor
    counts = None if feature_counts is None else forms.counts_table(feature_counts, kinds, samples, masked, tokens.device)
    if counts is not None or scheme != "placeholders" or forms.unsettled(kinds):
        kinds = forms.settle(kinds, counts, scheme, chosen.unused, samples)
    batch = Batch(
        tokens.contiguous(),
        _integers(attention_mask),
        None if document_ids is None else document_ids.contiguous(),
        None if labels is None else labels.contiguous(),
        forms.flat(kinds),
        forms.sizes_tensor(kinds, tokens.device),
        counts,
        *chosen[:4],
    )
    if ops.functorch_active():
        batch = Batch._make(ops.unwrapped(field) if isinstance(field, Tensor) else field for field in batch)
    if any(kind.rows < 0 for kind in kinds):
        batch = _count_rows(batch, kinds, chosen.settings.backend)
    settings = chosen.settings
    width = batch.tokens.shape[1] if LAYOUTS[batch.layout] == "keep" else settings.length
    source_index = ops.plan(batch, width, ops.mode_of(settings.validate, batch.tokens), settings.backend)
    return TokenPlan(batch, settings, source_index)


def _integers(attention_mask: Tensor | None) -> Tensor | None:
    if attention_mask is None:
        return None
    if attention_mask.dtype not in checks.MASK_DTYPES:
        return (attention_mask != 0).contiguous()
    return attention_mask.contiguous()


def _count_rows(batch: Batch, kinds: tuple[forms.Kind, ...], backend: str) -> Batch:
    """Without sizes, counts or tensors a kind has as many rows as placeholders; known after they are counted."""
    placeholders = ops.count(batch, backend)[3]
    kinds = tuple(kind if kind.rows >= 0 else kind._replace(rows=number) for kind, number in zip(kinds, placeholders))
    return batch._replace(kinds=forms.flat(kinds))


def _check_words(words: tuple[str, ...]) -> Choices:
    scheme, combine, layout, padding_side, unused_features, validate, backend = words
    names = ("scheme", "combine", "layout", "padding_side", "unused_features", "validate")
    for name, word, allowed in zip(names, words, (SCHEMES, COMBINE, LAYOUTS, SIDES, UNUSED, checks.VALIDATE)):
        checks.choice(name, word, allowed)
    if scheme != "placeholders" and layout == "keep":
        raise ValueError(
            f"layout: 'keep' is the layout of input_ids, but scheme={scheme!r} changes the number of rows; take layout='padded' or 'packed'"
        )
    if scheme == "images_first" and combine == "add":
        raise ValueError("combine: 'add' needs a placeholder to add to; images_first has none")
    settings = Settings(combine, None, CAUSAL, validate, backend)
    left, unused = padding_side == "left", unused_features == "allow"
    found = known[words] = Choices(SCHEMES.index(scheme), LAYOUTS.index(layout), left, unused, settings)
    return found


def _check_length(length, layout: str) -> None:
    if length is None or (type(length) is int and length >= 0 and layout != "keep"):
        return
    if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)) or (isinstance(length, int) and length < 0):
        raise ValueError(f"length: expected a number of rows, got {length!r}")
    if layout == "keep":
        raise ValueError("length: layout='keep' has the width of input_ids; take layout='padded' or 'packed'")


def _check_attend(attend) -> None:
    if type(attend) is Attend:
        return
    wrong = [value for value in attend.values() if not isinstance(value, Attend)] if isinstance(attend, Mapping) else [attend]
    if wrong and not isinstance(wrong[0], Attend):
        raise TypeError(f"attend: expected an Attend or a dict {{layer type: Attend}}, got {type(wrong[0]).__name__}")


def plan(
    input_ids: Tensor | None,
    *,
    image_token_id: int | tuple[int, ...] | None = None,
    placeholder_mask: Tensor | None = None,
    image_sizes=None,
    feature_counts=None,
    feature_rows=None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    document_ids: Tensor | None = None,
    scheme: str = "placeholders",
    combine: str = "replace",
    layout: str = "keep",
    padding_side: str = "right",
    length: int | None = None,
    attend: Attend | Mapping[str, Attend] = CAUSAL,
    unused_features: str = "error",
    validate: str = "auto",
    backend: str = "auto",
    prefix_lengths=None,
    parent_ids=None,
    max_documents: int | None = None,
) -> TokenPlan:
    """The token plan of a batch, made ahead of the rows: on any device, also in a data-loader worker.

    A mismatch of placeholders, sizes and counts is found here, where the sample can still be named. The arguments mean
    what they mean in `merge`.

    Args:
        input_ids: ``(B, T)`` int32 or int64. May be None with `placeholder_mask`.
        image_token_id: the placeholder's id; a tuple of ids for several kinds.
        placeholder_mask: ``(B, T)`` bool instead of an id.
        image_sizes: feature rows of each image in reading order: ints, an int tensor, or a dict by placeholder id.
        feature_counts: ``(B,)`` feature rows that each sample owns, or a dict by placeholder id.
        feature_rows: the rows that the features will have in all, where no sizes say so: an int, or a dict by placeholder id.
            None: as many as placeholders, whatever their number.
        attention_mask: ``(B, T)``, nonzero = token.
        labels: ``(B, T)`` int32 or int64.
        document_ids: ``(B, T)`` int32 or int64, below 0 = padding.
        scheme, combine, layout, padding_side, length, attend, unused_features, validate, backend: as in `merge`.
        prefix_lengths: int, or ints by output document id: that many leading tokens of a document are seen by all of it.
        parent_ids: ints by output document id, -1 = none: a document also sees all of that earlier document.
        max_documents: with document_ids, makes ``cu_seqlens`` ``(max_documents + 1,)`` long, without a read-back on a GPU.

    Returns:
        TokenPlan: for `merge(..., plan=...)`, `add_features`, and its own facts.

    Raises:
        ValueError, TypeError: as `merge`.

    Example:
        >>> import torch, vlm_fuse
        >>> made = vlm_fuse.plan(torch.tensor([[5, 9, 9, 6], [0, 0, 7, 8]]), image_token_id=9,
        ...                      attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]), layout="packed")
        >>> made.source_index
        tensor([[-1,  0,  1, -4, -7, -8]], dtype=torch.int32)
        >>> made.position_ids
        tensor([[0, 1, 2, 3, 0, 1]])
        >>> made.cu_seqlens
        tensor([0, 4, 6], dtype=torch.int32)
    """
    tokens = checks.batch_tensors(input_ids, placeholder_mask, attention_mask, labels, document_ids)
    if image_token_id is None and placeholder_mask is None and scheme == "placeholders" and not isinstance(image_sizes, Mapping):
        if not (image_sizes is feature_counts is feature_rows is None):
            raise ValueError("image_token_id: image_sizes, feature_counts or feature_rows say how many rows there are, but not which id marks them")
    kinds = forms.describe(None, image_token_id, image_sizes, placeholder_mask, scheme)
    if feature_rows is not None:
        kinds = forms.with_rows(kinds, feature_rows, placeholder_mask is not None)
    if max_documents is not None and (isinstance(max_documents, bool) or not isinstance(max_documents, int) or max_documents < 0):
        raise ValueError(f"max_documents: expected a number of documents, got {max_documents!r}")
    chosen = choices(scheme, combine, layout, padding_side, length, attend, unused_features, validate, name_from(backend), document_ids)
    settings = chosen.settings._replace(
        masked_by_tensor=placeholder_mask is not None, prefix_lengths=checks.prefix_lengths(prefix_lengths), parent_ids=checks.parent_ids(parent_ids),
        max_documents=max_documents,
    )
    made = make(tokens, attention_mask, labels, document_ids, kinds, feature_counts, chosen._replace(settings=settings))
    if max_documents is not None and document_ids is not None and tokens.is_cpu and validate in ("auto", "sync"):
        documents = ops.count(made._batch, chosen.settings.backend)[2]
        if documents > max_documents:
            raise ValueError(f"max_documents: the batch has {documents} documents, more than {max_documents}; raise max_documents")
    return made
