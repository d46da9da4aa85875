"""What a forward of the nanoVLM-shaped model is under each contestant: layout, merge, mask, positions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import vlm_fuse
from benchmarks.baselines import nanovlm as stock_merge

from . import attends, ways
from .losses import Predictions
from .nanovlm import NanoVLM
from .samples import Micro, Tokens
from .sections import Part
from .ways import Way


def ways_of(model: NanoVLM, device: str, dtype: torch.dtype) -> list[Way]:
    """All contestants; those that do not run here say why.

    Args:
        model: shared by them.
        device: "cpu" or "cuda".
        dtype: in which attention computes.
    """
    stock = _padded(model, _stock_rows, "left")
    no_flex, no_varlen = attends.why_not_flex(device), attends.why_not_varlen(device, dtype)
    return [
        Way(ways.STOCK, "left", stock),
        Way(ways.MERGE_REPLACED, "left", _padded(model, _fused_rows, "left")),
        Way(ways.RIGHT, "right", _right(model)),
        Way(ways.MAXIMUM, "maximum", _padded(model, _stock_rows, "maximum")),
        Way(ways.BY_VLM_FUSE, "packed", _packed(model, attends.by_vlm_fuse)),
        Way(ways.DENSE, "packed", _packed(model, lambda mask: attends.dense(mask.dense()))),
        Way(ways.FLEX, "packed", _packed(model, attends.flex), no_flex),
        Way(ways.VARLEN, "packed", _packed(model, attends.varlen), no_varlen, half_only=True),
        Way(ways.NOT_ISOLATED, "packed", _not_isolated(model)),
    ]


def _features(model: NanoVLM, micro: Micro) -> Tensor:
    with Part("vision"):
        return model.images(micro.pixels["pixels"])


def _stock_rows(model: NanoVLM, tokens: Tokens, features: Tensor) -> Tensor:
    with Part("merge"):
        return stock_merge(tokens.input_ids, model.embedding(tokens.input_ids), features, model.shape.preset.image_token_id)


def _fused_rows(model: NanoVLM, tokens: Tokens, features: Tensor) -> Tensor:
    with Part("merge"):
        return vlm_fuse.merge(
            tokens.input_ids, model.embedding(tokens.input_ids), features, image_token_id=model.shape.preset.image_token_id
        ).inputs_embeds  # fmt: skip


def _padded(model: NanoVLM, rows_of: Callable, layout: str) -> Callable[[Micro], Predictions]:
    """Padding on the left, under a mask of T x T for each sample."""

    def forward(micro: Micro) -> Predictions:
        tokens: Tokens = getattr(micro, layout)
        rows = rows_of(model, tokens, _features(model, micro))
        with Part("mask"):
            attend = attends.dense(attends.of_padding(tokens.attention_mask))
        with Part("positions"):
            position_ids = (tokens.attention_mask.cumsum(1) - 1).clamp_(min=0)
        return Predictions(model(rows, position_ids, attend), tokens.labels, tokens.samples)

    return forward


def _right(model: NanoVLM) -> Callable[[Micro], Predictions]:
    def forward(micro: Micro) -> Predictions:
        tokens = micro.right
        rows = _fused_rows(model, tokens, _features(model, micro))
        with Part("positions"):
            position_ids = torch.arange(rows.shape[1], device=rows.device)[None]
        return Predictions(model(rows, position_ids, attends.causal), tokens.labels, tokens.samples)

    return forward


def _merged(model: NanoVLM, micro: Micro) -> vlm_fuse.MergedBatch:
    """The padded batch without its padding, in one row whose length the data loader knows; the lookup is part of it."""
    tokens, features = micro.right, _features(model, micro)
    with Part("merge"):
        return vlm_fuse.merge(
            tokens.input_ids, weight=model.embedding.weight, image_embeds=features, image_token_id=model.shape.preset.image_token_id,
            attention_mask=tokens.attention_mask, labels=tokens.labels, layout="packed", length=micro.packed.input_ids.shape[1],
        )  # fmt: skip


def _packed(model: NanoVLM, attend_of: Callable[[vlm_fuse.IntervalMask], attends.Attend]) -> Callable[[Micro], Predictions]:
    def forward(micro: Micro) -> Predictions:
        merged = _merged(model, micro)
        with Part("mask"):
            attend = attend_of(merged.mask)
        with Part("positions"):
            position_ids = merged.position_ids
        return Predictions(model(merged.inputs_embeds, position_ids, attend), merged.labels, merged.document_ids)

    return forward


def _not_isolated(model: NanoVLM) -> Callable[[Micro], Predictions]:
    def forward(micro: Micro) -> Predictions:
        merged = _merged(model, micro)
        with Part("positions"):
            position_ids = torch.arange(merged.inputs_embeds.shape[1], device=merged.inputs_embeds.device)[None]
        return Predictions(model(merged.inputs_embeds, position_ids, attends.causal), merged.labels, merged.document_ids)

    return forward
