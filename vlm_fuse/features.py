"""The forms of `image_embeds`, `image_sizes` and `feature_counts`, brought to one: kinds with their tensors and sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .transfer import sent


class Kind(NamedTuple):
    """One kind of placeholder and the rows that come with it."""

    token: int
    tensors: tuple[Tensor, ...]
    rows: int  # -1: not known yet
    images: int  # -1: sizes not known
    rows_each: int  # -1: sizes listed in `sizes`
    sizes: Tensor | None  # (images,) int64


def describe(image_embeds, image_token_id, image_sizes, placeholder_mask, scheme: str) -> tuple[Kind, ...]:
    """The kinds in order, from any form of the arguments."""
    if type(image_token_id) is int and type(image_embeds) is Tensor and image_sizes is None and placeholder_mask is None:
        return (_kind_of(checks.token_id("image_token_id", image_token_id), image_embeds),)  # the common case, without the detours below
    if isinstance(image_embeds, Mapping):
        if image_token_id is not None:
            raise ValueError("image_token_id: image_embeds is a dict, whose keys are the placeholder ids; give one or the other")
        given = {checks.token_id("image_embeds: key", key): rows for key, rows in image_embeds.items()}
    else:
        given = {token: image_embeds for token in _tokens(image_token_id, placeholder_mask, image_sizes, scheme, image_embeds)}
        if len(given) > 1 and image_embeds is not None:
            raise ValueError(f"image_embeds: {len(given)} kinds of placeholder need a dict {{placeholder id: rows}}")
    if placeholder_mask is not None:
        if len(given) > 1 or image_token_id is not None:
            raise ValueError("placeholder_mask: marks one kind of placeholder and stands in for image_token_id; give one or the other")
        given = {1: rows for rows in given.values()}
    sizes = _by_kind("image_sizes", image_sizes, tuple(given), placeholder_mask is not None)
    return tuple(_with_sizes(_kind_of(token, rows), sizes.get(token)) for token, rows in given.items())


def _tokens(image_token_id, placeholder_mask, image_sizes, scheme: str, image_embeds) -> tuple[int, ...]:
    if isinstance(image_token_id, (tuple, list)):
        tokens = tuple(checks.token_id("image_token_id", token) for token in image_token_id)
        if len(set(tokens)) != len(tokens):
            raise ValueError(f"image_token_id: {tokens} names an id twice; one id marks one kind")
        return tokens
    if image_token_id is not None:
        return (checks.token_id("image_token_id", image_token_id),)
    if isinstance(image_sizes, Mapping):
        return tuple(checks.token_id("image_sizes: key", key) for key in image_sizes)
    if placeholder_mask is not None or scheme == "images_first":
        return (1,)
    if image_embeds is None or (isinstance(image_embeds, (list, tuple)) and not image_embeds):
        return ()
    raise ValueError("image_token_id: which id marks the placeholders of image_embeds? Give it, or a placeholder_mask, or a dict as image_embeds")


def _kind_of(token: int, rows) -> Kind:
    if rows is None:
        return Kind(token, (), -1, -1, -1, None)
    if isinstance(rows, Tensor):
        if rows.dim() == 2:
            return Kind(token, (rows,), rows.shape[0], -1, -1, None)
        if rows.dim() == 3:
            images, each = rows.shape[0], rows.shape[1]
            return Kind(token, (rows,), images * each, images, each, None)
        raise ValueError(f"image_embeds: expected (N, D), (images, P, D) or a list of (P_i, D), got a tensor of shape {tuple(rows.shape)}")
    if not isinstance(rows, (list, tuple)):
        raise TypeError(f"image_embeds: expected a tensor, a list of tensors, a dict or None, got {type(rows).__name__}")
    for index, image in enumerate(rows):
        if not isinstance(image, Tensor):
            raise TypeError(f"image_embeds[{index}]: expected a tensor, got {type(image).__name__}")
        if image.dim() != 2:
            raise ValueError(f"image_embeds[{index}]: each image of a list is (P, D), got shape {tuple(image.shape)}")
    sizes = [image.shape[0] for image in rows]
    if not sizes:
        return Kind(token, (), 0, 0, 0, None)
    return Kind(token, tuple(rows), sum(sizes), len(sizes), -1, torch.tensor(sizes, dtype=torch.int64, device="cpu"))


def _by_kind(name: str, given, tokens: tuple[int, ...], masked: bool) -> dict:
    """An argument that may be a dict by kind, as a dict."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        unknown = [key for key in given if key not in tokens]
        if unknown and not masked:
            raise ValueError(f"{name}: {unknown[0]!r} is no kind of this batch; its placeholder ids are {list(tokens)}")
        return {1: value for value in given.values()} if masked else dict(given)
    if len(tokens) != 1:
        raise ValueError(f"{name}: {len(tokens)} kinds of placeholder need a dict {{placeholder id: {name}}}")
    return {tokens[0]: given}


def _with_sizes(kind: Kind, given) -> Kind:
    if given is None:
        return kind
    sizes = checks.whole_numbers("image_sizes", given)
    if kind.images >= 0:
        own = kind.sizes if kind.sizes is not None else torch.full((kind.images,), kind.rows_each, device="cpu")
        if checks.on_host(own) and checks.on_host(sizes) and not torch.equal(own, sizes):
            raise ValueError(f"image_sizes: {sizes.tolist()} differs from the sizes of image_embeds, {own.tolist()}; leave image_sizes out")
        return kind
    return kind._replace(images=sizes.numel(), rows_each=-1, sizes=sizes)


def with_rows(kinds: tuple[Kind, ...], feature_rows, masked: bool) -> tuple[Kind, ...]:
    """The kinds with the total rows that the features will have."""
    given = _by_kind("feature_rows", feature_rows, tuple(kind.token for kind in kinds), masked)
    for rows in given.values():
        if isinstance(rows, bool) or not isinstance(rows, (int, torch.SymInt)) or (isinstance(rows, int) and rows < 0):
            raise ValueError(f"feature_rows: expected a number of rows, got {rows!r}")
    return tuple(kind._replace(rows=given[kind.token]) if kind.token in given else kind for kind in kinds)


def unsettled(kinds: tuple[Kind, ...]) -> bool:
    """Totals or sizes are still to be worked out."""
    for kind in kinds:
        if kind.sizes is not None or kind.rows < 0:
            return True
    return False


def flat(kinds: tuple[Kind, ...]) -> tuple[int, ...]:
    """The kinds as `Batch.kinds` holds them, feature rows numbered one kind after another."""
    numbers: list[int] = []
    first = 0
    for kind in kinds:
        numbers += (kind.token, first, kind.rows, kind.images, kind.rows_each)
        first += kind.rows
    return tuple(numbers)


def settle(kinds: tuple[Kind, ...], counts: Tensor | None, scheme: str, unused: bool, samples: int) -> tuple[Kind, ...]:
    """Row totals from sizes and counts where they are on the host, and the sizes that counts imply."""
    settled = []
    for index, kind in enumerate(kinds):
        own = None if counts is None else counts[index]
        if own is not None and checks.on_host(own) and samples and int(own[0]) < 0:
            own = None
        if scheme == "images_first" and kind.images < 0:
            if own is None:
                raise ValueError(
                    "image_sizes: images_first needs the rows of each image. Give image_embeds as (images, P, D) or a list, "
                    "or image_sizes, or feature_counts (one image a sample)"
                )
            kind = kind._replace(images=samples, rows_each=-1, sizes=own)
        if scheme == "expand" and kind.images < 0:
            raise ValueError(
                "image_sizes: expand puts all rows of an image in place of its one placeholder and needs the rows of each image. "
                "Give image_embeds as (images, P, D) or a list, or image_sizes"
            )
        kind = _with_total(kind, own, unused)
        if kind.images >= 0 and kind.rows < 0:
            kind = kind._replace(rows=kind.images * kind.rows_each)
        settled.append(kind)
    return tuple(settled)


def _with_total(kind: Kind, counts: Tensor | None, unused: bool) -> Kind:
    """The kind with its number of rows from its sizes, else from the counts, where those are on the host."""
    known = kind.sizes if kind.sizes is not None else counts
    if known is None or not (checks.on_host(known) or kind.rows < 0):
        return kind
    total = int(known.sum())
    if kind.rows < 0 or total == kind.rows or (total < kind.rows and unused):
        return kind._replace(rows=total)
    if kind.sizes is None:
        return kind  # the plan's own check names the first sample whose counts differ
    raise ValueError(
        f"image_sizes: they add up to {total} rows, but image_embeds has {kind.rows}"
        + ("" if total > kind.rows else "; pass unused_features='allow' if the rest is meant to be unused")
    )


def counts_table(feature_counts, kinds: tuple[Kind, ...], samples: int, masked: bool, device: torch.device) -> Tensor | None:
    """``(K, B)`` int64 rows that each sample owns of each kind, -1 for a kind without counts."""
    if feature_counts is None:
        return None
    given = _by_kind("feature_counts", feature_counts, tuple(kind.token for kind in kinds), masked)
    rows: Sequence[Tensor] = []
    for kind in kinds:
        if kind.token in given:
            counts = checks.whole_numbers("feature_counts", given[kind.token])
            if counts.numel() != samples:
                raise ValueError(f"feature_counts: expected one count a sample, {samples}, got {counts.numel()}")
            rows = [*rows, sent(counts, device)]
        else:
            rows = [*rows, torch.full((samples,), -1, dtype=torch.int64, device=device)]
    return torch.stack(list(rows)) if rows else None


def tables(kinds: tuple[Kind, ...], starts: tuple[int, ...]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The feature tensors in order, and the number of the first row of each."""
    if len(kinds) == 1 and len(kinds[0].tensors) == 1:
        return kinds[0].tensors, (starts[0],)
    tensors: list[Tensor] = []
    firsts: list[int] = []
    for kind, first in zip(kinds, starts):
        for rows in kind.tensors:
            tensors.append(rows)
            firsts.append(first)
            first += rows.numel() // rows.shape[-1] if rows.shape[-1] else rows.shape[:-1].numel()
    return tuple(tensors), tuple(firsts)


def sizes_tensor(kinds: tuple[Kind, ...], device: torch.device) -> Tensor | None:
    """The listed sizes of all kinds, one after another."""
    if not unsettled(kinds):
        return None
    listed = [kind.sizes for kind in kinds if kind.sizes is not None]
    if not listed:
        return None
    sizes = listed[0] if len(listed) == 1 else torch.cat(listed)
    return sent(sizes, device)
