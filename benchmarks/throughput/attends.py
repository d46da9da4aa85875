"""Attention of a batch as a function ``f(q, k, v)``, and which kind cannot run where, with the reason."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import vlm_fuse

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA's own triangle, without a mask."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def dense(allowed: Tensor) -> Attend:
    """SDPA under a mask ``(B, 1, T, T)``, bool."""
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=q.shape[1] != k.shape[1])


def of_padding(attention_mask: Tensor) -> Tensor:
    """The causal mask of a padded batch, ``(B, 1, T, T)`` bool, as transformers makes it for SDPA and nanoVLM in its loop."""
    length = attention_mask.shape[1]
    triangle = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril_()
    return triangle & attention_mask[:, None, None, :]


def by_vlm_fuse(mask: vlm_fuse.IntervalMask) -> Attend:
    """`vlm_fuse.attention`: on a CPU SDPA document by document, on a GPU what suits the mask."""
    return lambda q, k, v: vlm_fuse.attention(q, k, v, mask)


def flex(mask: vlm_fuse.IntervalMask) -> Attend:
    """Compiled FlexAttention under the mask's BlockMask."""
    block_mask = mask.block_mask()
    return lambda q, k, v: _compiled_flex()(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])


def varlen(mask: vlm_fuse.IntervalMask) -> Attend:
    """torch's variable-length attention on the mask's offsets."""
    from torch.nn.attention.varlen import varlen_attn

    found = mask.varlen()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))
        made = varlen_attn(
            *rows, found.cu_seqlens, found.cu_seqlens_k, found.max_seqlen, found.max_seqlen_k, window_size=found.window_size,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return made.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)

    return attend


def why_not_flex(device: str) -> str | None:
    """Why FlexAttention does not train here; None: it does.

    Example:
        >>> from benchmarks.throughput.attends import why_not_flex
        >>> print(why_not_flex("cuda"))
        None
    """
    return "torch's FlexAttention has no backward on a CPU" if device == "cpu" else None


def why_not_varlen(device: str, dtype: torch.dtype) -> str | None:
    """Why variable-length attention does not run here; None: it does.

    Example:
        >>> import torch
        >>> from benchmarks.throughput.attends import why_not_varlen
        >>> why_not_varlen("cuda", torch.float32)
        'torch.nn.attention.varlen takes float16 and bfloat16 alone'
    """
    if device == "cpu":
        return "torch.nn.attention.varlen has no kernel for a CPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return "torch.nn.attention.varlen takes float16 and bfloat16 alone"
    return None if importlib.util.find_spec("torch.nn.attention.varlen") else "this torch has no torch.nn.attention.varlen"


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
