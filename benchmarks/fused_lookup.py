"""A fused lookup in Triton in the manner of LightLLM: text rows from the table, image rows from the features.

The grid is (tokens, 1 + images). Every image token carries an id of its own (first id of its image + index in it), so
a program knows from the id alone whether the row is its own; most programs find that it is not and end.

Source: the idea of ModelTC/lightllm ``common/basemodel/triton_kernel/multimodal_emb.py``; written anew here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _lookup(ids, weight, features, out, first_ids, sizes, starts, vocab_size, D, BLOCK: tl.constexpr):
    # one program owns one token and one possible source: the table (0) or the image before program_id(1)
    token = tl.program_id(0).to(tl.int64)
    source = tl.program_id(1)
    ident = tl.load(ids + token)
    column = tl.arange(0, BLOCK)
    inside = column < D
    if source == 0:
        if ident < vocab_size:
            row = tl.load(weight + ident * D + column, mask=inside, other=0.0)
            tl.store(out + token * D + column, row, mask=inside)
    else:
        local = ident - tl.load(first_ids + source - 1)
        if (local >= 0) & (local < tl.load(sizes + source - 1)):
            place = tl.load(starts + source - 1) + local
            row = tl.load(features + place * D + column, mask=inside, other=0.0)
            tl.store(out + token * D + column, row, mask=inside)


def real_tokens(input_ids: Tensor, image_token_id: int, image_sizes: list[int], vocab_size: int):
    """What a server prepares per request: image tokens renumbered to ids of their own, and the images' tables.

    Returns:
        ids: ``(B, T)`` int64, the n-th placeholder has the id `vocab_size` + n.
        first_ids, sizes, starts: ``(images,)`` int64.
    """
    mask = input_ids == image_token_id
    ids = torch.where(mask, vocab_size + (mask.flatten().cumsum(0) - 1).view_as(mask), input_ids)
    sizes = torch.tensor(image_sizes, dtype=torch.int64, device=input_ids.device)
    starts = sizes.cumsum(0) - sizes
    return ids, starts + vocab_size, sizes, starts


def fused_lookup(
    ids: Tensor, weight: Tensor, image_embeds: Tensor, first_ids: Tensor, sizes: Tensor, starts: Tensor, out: Tensor | None = None
) -> Tensor:
    """Rows (B, T, D) for the ids of `real_tokens`; no gradient."""
    hidden = weight.shape[1]
    if out is None:
        out = weight.new_empty(*ids.shape, hidden)
    _lookup[(ids.numel(), 1 + sizes.numel())](
        ids, weight, image_embeds, out, first_ids, sizes, starts, weight.shape[0], hidden, BLOCK=triton.next_power_of_2(hidden), num_warps=4
    )
    return out
