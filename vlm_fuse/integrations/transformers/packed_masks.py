"""The masks of packed rows: what rewritten methods call in place of the factories of transformers' ``masking_utils``.

transformers keeps the documents of a packed row apart where attention_mask and the cache are None, and nowhere else: not under a
mask of ones, not where it made a cache itself, and (until 5.24) not where images see themselves both ways. Here the same
factories are called with arguments that keep them apart, and just as they were where a row holds one document. A mask that a model
of transformers 4 makes without the factories gets the boundaries added.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .documents import CACHES, Documents, documents, going_back, is_empty, numbers, places, with_text_row

_EMBEDS = ("inputs_embeds", "input_embeds")  # since and before 5.0


def call(factory: Callable, /, *args, **kwargs):
    """``factory(*args, **kwargs)``, with documents apart where rows are packed.

    Raises:
        NotImplementedError: packed rows whose mask the attention implementation, or the factory, cannot express.
    """
    if args:
        kwargs = inspect.signature(factory).bind(*args, **kwargs).arguments
        kwargs |= kwargs.pop("kwargs", {})
    embeds = next((kwargs[name] for name in _EMBEDS if name in kwargs), None)
    if not isinstance(embeds, Tensor) or embeds.dim() != 3:
        return factory(**kwargs)
    rows, length = embeds.shape[:2]
    position_ids, kept = _of_text(kwargs.get("position_ids")), kwargs.get("attention_mask")
    if not _may_be_packed(rows, length, position_ids, kept) or not all(is_empty(kwargs.get(name)) for name in CACHES):
        return factory(**kwargs)
    kwargs["position_ids"] = position_ids
    if is_compiling():
        return _traced(factory, kwargs, rows)
    found = documents(position_ids, kept)
    if found.all_kept:
        kwargs["attention_mask"] = None
    if not found.packed:
        # what is known need not be asked of the device again
        return factory(**(kwargs | {"position_ids": None} if found.all_kept else kwargs))
    kwargs |= _no_cache(kwargs)  # an empty one, with which nothing is looked for
    if _is_flash(kwargs):
        return _flash(factory, kwargs, found)
    if found.all_kept and not _has_blocks(kwargs):
        return factory(**kwargs)
    return _kept_apart(factory, kwargs, found.numbers, rows)


def of_its_own(mask, position_ids, attention_mask):
    """The mask that a model has made by code of its own (before 5.0), with documents apart.

    Args:
        mask: ``(B, 1, L, K)``, added to the scores; for flash attention None, or the ``(B, L)`` attention_mask.

    Raises:
        NotImplementedError: packed rows with padding under flash attention.
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return mask
    flash = mask.dim() == 2
    if not _may_be_packed(mask.shape[0], mask.shape[1 if flash else 2], position_ids, attention_mask):
        return mask
    if is_compiling():
        if flash:
            _refuse_traced_flash(position_ids, mask != 0)
            return mask
        own = numbers(position_ids, None if attention_mask is None else attention_mask != 0)
    else:
        found = documents(position_ids, attention_mask)
        if not found.packed:
            return mask
        if flash:
            return _flash(lambda: None, {}, found)
        own = found.numbers
    apart = (own[:, None, :, None] != own[:, None, None, :]).to(mask.device)
    apart = torch.nn.functional.pad(apart, (0, mask.shape[3] - mask.shape[2]))  # places of a cache that hold nothing yet
    return mask.masked_fill(apart, torch.finfo(mask.dtype).min)


def _of_text(position_ids):
    """The text's row of M-RoPE's positions, of which transformers 4's GLM-4V hands over the other three."""
    is_mrope = isinstance(position_ids, Tensor) and position_ids.dim() == 3
    return with_text_row(position_ids, None)[0] if is_mrope else position_ids


def _may_be_packed(rows: int, length: int, position_ids, kept) -> bool:
    """Positions of every token, beside no mask or one of padding."""
    if length < 2 or not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or position_ids.shape[1] != length:
        return False
    if rows > 1 and (position_ids.shape[0] == 1 or position_ids.stride(0) == 0):
        return False  # counted by the model itself, the same for all rows
    return kept is None or (isinstance(kept, Tensor) and kept.shape == (rows, length))


def _has_blocks(kwargs: dict) -> bool:
    """Images, or prefixes, that see themselves both ways."""
    return kwargs.get("block_sequence_ids") is not None or kwargs.get("or_mask_function") is not None


def _flash(factory: Callable, kwargs: dict, found: Documents):
    if _has_blocks(kwargs):
        raise NotImplementedError(
            "packed rows with images that see themselves both ways: flash attention takes no such mask and would drop it; use sdpa, eager or flex_attention"
        )
    if not found.all_kept:
        raise NotImplementedError(
            "packed rows with padding: flash attention either removes the padding or keeps documents apart; leave out attention_mask and give the "
            "padding positions of its own (0, 1, 2, ...), or use sdpa"
        )
    return factory(**kwargs)


def _kept_apart(factory: Callable, kwargs: dict, own: Tensor, rows: int):
    """Inside a document causal and sliding masks depend on distances alone: no positions, and a mask that ends with the document.

    Chunks are counted from where the document begins, of which a factory cannot be told: a causal mask that ends with the chunk.
    """
    own = own.expand(rows, -1)
    blocks = kwargs.get("block_sequence_ids")
    if blocks is not None:  # added after everything else: the same number in another document must be another
        kwargs["block_sequence_ids"] = (own * own.shape[1] + blocks).where(blocks >= 0, blocks)
    parts = own
    if _is_chunked(factory):
        if kwargs.get("or_mask_function") is not None:
            raise NotImplementedError(f"{factory.__name__}: packed rows with an or_mask_function; give the blocks as block_sequence_ids")
        parts = own * own.shape[1] + places(own, kwargs.get("attention_mask")) // kwargs["config"].attention_chunk_size
        factory = sys.modules[factory.__module__].create_causal_mask
    before = kwargs.get("and_mask_function")

    def same_part(batch, head, q, kv):
        same = parts[batch, q] == parts[batch, kv]
        return same if before is None else same & before(batch, head, q, kv)

    return factory(**(kwargs | {"position_ids": None, "and_mask_function": same_part}))


def _traced(factory: Callable, kwargs: dict, rows: int):
    """Nothing is known of the values, and a mask is made in any case: it is always one that keeps documents apart."""
    kept = None if kwargs.get("attention_mask") is None else kwargs["attention_mask"] != 0
    if _is_flash(kwargs):
        if kept is not None:
            _refuse_traced_flash(kwargs["position_ids"], kept)
        return factory(**kwargs)
    kwargs |= _no_cache(kwargs)
    if kept is None and not _has_blocks(kwargs):
        return factory(**kwargs)
    return _kept_apart(factory, kwargs, numbers(kwargs["position_ids"], kept), rows)


def _refuse_traced_flash(position_ids: Tensor, kept: Tensor) -> None:
    torch._assert_async(
        ~going_back(position_ids, kept).any(),
        "vlm_fuse: packed rows beside an attention_mask are not supported with flash attention under torch.compile; leave out attention_mask",
    )


def _no_cache(kwargs: dict) -> dict:
    return {name: None for name in CACHES if name in kwargs}


def _is_flash(kwargs: dict) -> bool:
    return "flash" in str(kwargs["config"]._attn_implementation)


def _is_chunked(factory: Callable) -> bool:
    return "chunked" in factory.__name__
