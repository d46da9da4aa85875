"""The interval mask as keyword arguments of a Hugging Face model. Written for transformers 4.57 to 5.23.

What each attention implementation takes stands in transformers' ``masking_utils.py`` (a prepared 4-D mask, or a BlockMask,
is handed on as it is) and ``modeling_flash_attention_utils.py`` (variable-length attention with all four of cu_seq_lens_q,
cu_seq_lens_k, max_length_q and max_length_k, and no attention_mask).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from .varlen import Varlen

if TYPE_CHECKING:
    from ..token_plan import TokenPlan
    from .interval import IntervalMask

_FLASH = "flash"
_RENDERED = ("sdpa", "eager", "flex_attention")


def _is_flash(attn_implementation) -> bool:
    """flash_attention_2 and its followers, or a kernel from the hub ("kernels-community/flash-attn2")."""
    if not isinstance(attn_implementation, str) or (attn_implementation not in _RENDERED and _FLASH not in attn_implementation):
        raise ValueError(
            f"attn_implementation: unknown {attn_implementation!r}; choose one of {', '.join(_RENDERED)}, flash_attention_2, flash_attention_3, "
            "or a hub kernel with flash in its name"
        )
    return _FLASH in attn_implementation


def hf(mask: IntervalMask, attn_implementation: str, dtype: torch.dtype | None) -> dict:
    """The keyword arguments for one mask."""
    if _is_flash(attn_implementation):
        return {"attention_mask": None, **_of_flash(mask.varlen())}
    return {"attention_mask": _rendered(mask, attn_implementation, dtype)}


def model_kwargs(plan: TokenPlan, masks: IntervalMask | Mapping[str, IntervalMask], attn_implementation: str, dtype: torch.dtype) -> dict:
    """The keyword arguments for the rows of a plan: those of its masks, and what else tells documents and images apart."""
    rows, width = plan.source_index.shape
    if any(mask.kv_length != width for mask in (masks.values() if isinstance(masks, Mapping) else (masks,))):
        raise ValueError(
            "model_kwargs: these rows are a shard, and see keys of other ranks, which a model of transformers does not fetch; give position_ids, shift_labels and "
            "the mask to an attention that gathers keys and values (docs/distributed.md)"
        )
    made = of_layer_types(masks, attn_implementation, dtype) if isinstance(masks, Mapping) else hf(masks, attn_implementation, dtype)
    made["position_ids"] = plan.position_ids
    if plan.kind_tokens:
        made["mm_token_type_ids"] = plan.kind_ids.long().clamp_(min=0)
    if plan.layout == "packed" or plan.has_document_ids:
        # with one document a row these layers need nothing, and without their packages they refuse both
        made["seq_idx"] = plan.document_ids
        if rows == 1 and "cu_seq_lens_q" not in made:
            made["cu_seq_lens_q"] = torch.nn.functional.pad(plan.cu_seqlens, (0, 1), value=width)  # the padding behind is one more
    return made


def of_layer_types(masks: Mapping[str, IntervalMask], attn_implementation: str, dtype: torch.dtype | None) -> dict:
    """The keyword arguments for a mask each layer type: one 4-D mask would serve every layer, whatever its type."""
    if not _is_flash(attn_implementation):
        return {"attention_mask": {layer_type: _rendered(mask, attn_implementation, dtype) for layer_type, mask in masks.items()}}
    found: dict | None = None
    for layer_type, mask in masks.items():
        own = _of_flash(mask.varlen())
        if found is None:
            first, found = layer_type, own
        elif any(not _same(found.get(name), own.get(name)) for name in {**found, **own}):
            raise ValueError(
                f"attn_implementation: flash attention takes one cu_seqlens for all layer types, but {first!r} and {layer_type!r} cut the rows into different "
                "documents (chunks are documents there); use sdpa or flex_attention"
            )
    return {"attention_mask": None, **(found or {})}


def _rendered(mask: IntervalMask, attn_implementation: str, dtype: torch.dtype | None):
    if attn_implementation == "sdpa":
        return mask.dense()
    if attn_implementation == "eager":  # adds whatever it is given: a bool mask would be added as 0 and 1
        dtype = dtype or torch.get_default_dtype()
        # the softmax is taken in float32, where the lowest number of float64 would be -inf
        return mask.additive(torch.float32).double() if dtype == torch.float64 else mask.additive(dtype)
    return mask.block_mask()


def _of_flash(varlen: Varlen) -> dict:
    """The window is not among them: each attention module has its own, from the model's config."""
    given = dict(
        cu_seq_lens_q=varlen.cu_seqlens, cu_seq_lens_k=varlen.cu_seqlens_k, max_length_q=varlen.max_seqlen, max_length_k=varlen.max_seqlen_k
    )  # fmt: skip
    return given if varlen.causal else {**given, "is_causal": False}


def _same(one, other) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and one == other
