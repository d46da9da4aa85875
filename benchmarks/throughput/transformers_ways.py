"""What a forward of a transformers model is under each contestant, and where its merge, mask and positions lie.

Attention of the packed contestants is one function, registered with transformers, that calls what the contestant has set: transformers
itself has no attention that takes documents one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import vlm_fuse
from vlm_fuse.integrations.transformers import patch, unpatch

from . import attends, ways
from .losses import Predictions
from .samples import Micro, Tokens
from .sections import Part
from .ways import Way

#: not among transformers' names for masks, so that it makes none
ATTENTION = "benchmark_attend"


class _Current:
    """The attention that is registered: the contestant's own, set before its forward."""

    attend: attends.Attend | None = None

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask, **options) -> tuple[Tensor, None]:
        return self.attend(q, k, v).transpose(1, 2).contiguous(), None


_current = _Current()


class Model:
    """A transformers model and what the contestants need to know of it.

    Args:
        model: one of `transformers_models.FAMILIES`, in training mode.
    """

    def __init__(self, model: nn.Module):
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, _current)
        self.model, self.text, self.is_patched = model, model.model.language_model, False
        self.image_token_id = model.config.image_token_id
        self.merge_size = getattr(model.config.vision_config, "spatial_merge_size", None)  # None: positions of one row

    def as_is(self) -> None:
        """Unpatched, under SDPA."""
        self._set("sdpa", patched=False)

    def patched(self) -> None:
        """Patched, under SDPA."""
        self._set("sdpa", patched=True)

    def attending(self) -> None:
        """Patched, under the contestant's own attention."""
        self._set(ATTENTION, patched=True)

    def _set(self, attention: str, patched: bool) -> None:
        self.text.config._attn_implementation = attention
        if patched != self.is_patched:
            (patch if patched else unpatch)(self.model)
            self.is_patched = patched

    def logits(self, tokens: Tokens, micro: Micro, **given) -> Predictions:
        """One forward of the whole model, without the loss that it would work out itself."""
        if self.merge_size is not None:
            given["mm_token_type_ids"] = (tokens.input_ids == self.image_token_id).int()
        found = self.model(input_ids=tokens.input_ids, use_cache=False, **micro.pixels, **given)
        return Predictions(found.logits, tokens.labels, tokens.samples)

    def positions(self, tokens: Tokens, micro: Micro, plan: vlm_fuse.TokenPlan | None) -> Tensor:
        """Position ids of a packed row: by document, or of all of it as one where there is no plan."""
        if self.merge_size is None:
            return torch.arange(tokens.input_ids.shape[1], device=tokens.input_ids.device)[None] if plan is None else plan.position_ids
        types = (tokens.input_ids == self.image_token_id).int()
        documents = None if plan is None else tokens.samples
        grids = micro.pixels.get("image_grid_thw")
        return vlm_fuse.mrope_position_ids(types, image_grid_thw=grids, document_ids=documents, spatial_merge_size=self.merge_size)[0]


def ways_of(model: Model, device: str, dtype: torch.dtype) -> list[Way]:
    """All contestants; those that do not run here say why."""
    no_flex, no_varlen = attends.why_not_flex(device), attends.why_not_varlen(device, dtype)
    return [
        Way(ways.STOCK, "left", _padded(model, "left"), prepare=model.as_is),
        Way(ways.MERGE_REPLACED, "left", _padded(model, "left"), prepare=model.patched),
        Way(ways.RIGHT, "right", _right(model), prepare=model.patched),
        Way(ways.MAXIMUM, "maximum", _padded(model, "maximum"), prepare=model.as_is),
        Way(ways.BY_VLM_FUSE, "packed", _packed(model, attends.by_vlm_fuse), prepare=model.attending),
        Way(ways.DENSE, "packed", _packed(model, None), prepare=model.patched),
        Way(ways.FLEX, "packed", _packed(model, attends.flex), no_flex, prepare=model.attending),
        Way(ways.VARLEN, "packed", _packed(model, attends.varlen), no_varlen, prepare=model.attending, half_only=True),
        Way(ways.NOT_ISOLATED, "packed", _not_isolated(model), prepare=model.patched),
    ]


def _padded(model: Model, layout: str) -> Callable[[Micro], Predictions]:
    """The attention mask of the processor is all that a trainer gives; masks and positions are the model's."""

    def forward(micro: Micro) -> Predictions:
        tokens: Tokens = getattr(micro, layout)
        return model.logits(tokens, micro, attention_mask=tokens.attention_mask.long())

    return forward


def _right(model: Model) -> Callable[[Micro], Predictions]:
    return lambda micro: model.logits(micro.right, micro)


def _packed(model: Model, attend_of: Callable | None) -> Callable[[Micro], Predictions]:
    """The row as a PackingCollator gives it; its mask and positions are made in the step. None: by the model's own mask."""

    def forward(micro: Micro) -> Predictions:
        tokens = micro.packed
        with Part("mask"):
            plan = vlm_fuse.plan(tokens.input_ids, document_ids=tokens.samples)
            if attend_of is not None:
                _current.attend = attend_of(plan.mask())
        with Part("positions"):
            position_ids = model.positions(tokens, micro, plan)
        return model.logits(tokens, micro, position_ids=position_ids)

    return forward


def _not_isolated(model: Model) -> Callable[[Micro], Predictions]:
    def forward(micro: Micro) -> Predictions:
        with Part("positions"):
            position_ids = model.positions(micro.packed, micro, None)
        return model.logits(micro.packed, micro, position_ids=position_ids)

    return forward


@contextmanager
def parts_of(model: Model) -> Iterator[None]:
    """The parts of the model's own forward, by hooks that are there while the block runs.

    vision: the tower and the projector. merge: from there to the decoder, with M-RoPE's positions where the model makes them, and
    DeepStack's additions between layers. mask: from the decoder's beginning to its rotary embedding.
    """
    inner, text = model.model.model, model.text
    tower, last = (inner.visual, inner.visual) if hasattr(inner, "visual") else (inner.vision_tower, inner.multi_modal_projector)
    parts = _Open()
    handles = [
        tower.register_forward_pre_hook(lambda *_: parts.open("vision")),
        last.register_forward_hook(lambda *_: parts.open("merge")),
        text.register_forward_pre_hook(lambda *_: parts.open("mask")),
        text.rotary_emb.register_forward_pre_hook(lambda *_: parts.close()),
    ]
    deep = len(getattr(inner.config.vision_config, "deepstack_visual_indexes", ()) or ())
    for layer in text.layers[:deep]:
        handles.append(layer.register_forward_hook(lambda *_: parts.open("merge")))
    for layer in (*text.layers[1 : deep + 1], text.norm) if deep else ():
        handles.append(layer.register_forward_pre_hook(lambda *_: parts.close()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Open:
    """The part that is open: hooks end one where the next begins."""

    def __init__(self):
        self.part: Part | None = None

    def open(self, name: str) -> None:
        self.close()
        self.part = Part(name).__enter__()

    def close(self) -> None:
        if self.part is not None:
            self.part.__exit__(None, None, None)
            self.part = None
