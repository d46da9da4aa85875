"""A small vision-language decoder with every scheme of positions, and ways to compute its attention.

The decoder knows nothing of the library: who sees whom comes in as a function (q, k, v, bias) -> rows, positions as a tensor.
In float64, so that what differs is what the tests are about and not the order of sums.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vlm_fuse

VOCABULARY, D, HEADS, KV_HEADS, HEAD_DIM, LAYERS, RAW = 41, 32, 2, 1, 16, 2, 12
LONGEST = 512

#: which of (temporal, height, width) turns each pair of a head's dimensions; sections as the models count them.
CHUNKED_SECTION, INTERLEAVED_SECTION = (2, 3, 3), (4, 2, 2)
AXES = {
    # Qwen2-VL: one section after another
    "mrope_chunked": [axis for axis, pairs in enumerate(CHUNKED_SECTION) for _ in range(pairs)],
    # Qwen3-VL: in turn, and what is left over is temporal
    "mrope_interleaved": [j % 3 if j < 3 * INTERLEAVED_SECTION[j % 3] else 0 for j in range(HEAD_DIM // 2)],
}

#: alibi: scores fall with the distance. learned: an embedding of the position is added. rope: q and k turned by it, one
#: number a row; mrope: by three numbers a row, (3, B, L).
SCHEMES = ("none", "alibi", "learned", "rope", *AXES)


def rope(positions: Tensor, scheme: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, L, HEAD_DIM) of positions (B, L), or (3, B, L) for M-RoPE."""
    speeds = 1e2 ** -(torch.arange(HEAD_DIM // 2, dtype=torch.float64, device=positions.device) / (HEAD_DIM // 2))
    if scheme in AXES:
        positions = positions[AXES[scheme]].movedim(0, -1)
    else:
        positions = positions[..., None]
    angles = (positions * speeds).repeat(1, 1, 2)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


class Layer(nn.Module):
    def __init__(self, layer_type: str):
        super().__init__()
        self.layer_type = layer_type
        self.norm, self.out = nn.RMSNorm(D), nn.Linear(HEADS * HEAD_DIM, D)
        self.q, self.k, self.v = (nn.Linear(D, heads * HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
        self.mlp = nn.Sequential(nn.RMSNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x: Tensor, attend, turns, bias) -> Tensor:
        rows = self.norm(x)
        q, k, v = (made(rows).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for made in (self.q, self.k, self.v))
        if turns is not None:
            q, k = turned(q, *turns), turned(k, *turns)
        x = x + self.out(attend(q, k, v, bias).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class SmallDecoder(nn.Module):
    """Projector of image features, embedding, two layers (a local and a global one, where they differ), an untied head."""

    def __init__(self, scheme: str = "rope", seed: int = 0):
        super().__init__()
        self.scheme = scheme
        self.embedding = nn.Embedding(VOCABULARY, D)
        self.projector = nn.Sequential(nn.Linear(RAW, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.positions = nn.Embedding(LONGEST, D) if scheme == "learned" else None
        self.layers = nn.ModuleList(Layer(("local", "global")[number % 2]) for number in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(D), nn.Linear(D, VOCABULARY)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            # large enough that attention is sharp and a leak shows
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = 1 + 0.3 * values if parameter.dim() == 1 else values * max(parameter.shape[1], 4) ** -0.5 * 1.5

    def forward(self, rows: Tensor, positions: Tensor, attend) -> tuple[Tensor, Tensor]:
        """(hidden states before the head, logits). `attend`: a function, or a dict of them by layer type."""
        turns = bias = None
        x = rows
        if self.scheme == "learned":
            x = x + self.positions(positions)
        elif self.scheme == "alibi":
            slopes = torch.tensor([0.5, 0.125], dtype=rows.dtype, device=rows.device)
            bias = -slopes[:, None, None] * (positions[:, None, :, None] - positions[:, None, None, :]).abs()
        elif self.scheme != "none":
            turns = rope(positions, self.scheme, rows.dtype)
        for layer in self.layers:
            x = layer(x, attend[layer.layer_type] if isinstance(attend, Mapping) else attend, turns, bias)
        x = self.norm(x)
        return x, self.head(x)


# --- ways to compute attention ------------------------------------------------------------------------------------------


def by_loops(seen: Tensor):
    """Plain PyTorch under a (Q, K) bool in which every row sees something: what all others are compared with."""

    def attend(q, k, v, bias):
        scores = q @ k.transpose(-1, -2) * HEAD_DIM**-0.5
        if bias is not None:
            scores = scores + bias
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v

    return attend


def by_bool(seen: Tensor):
    """SDPA under a bool mask; with a bias, under a float one."""

    def attend(q, k, v, bias):
        allowed = seen if bias is None else bias.masked_fill(~seen, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)

    return attend


def by_dense(mask: vlm_fuse.IntervalMask):
    return by_bool(mask.dense())


def by_additive(mask: vlm_fuse.IntervalMask):
    """What models call eager."""

    def attend(q, k, v, bias):
        scores = q @ k.transpose(-1, -2) * HEAD_DIM**-0.5 + mask.additive(q.dtype)
        return (scores if bias is None else scores + bias).softmax(-1) @ v

    return attend


def by_segment(mask: vlm_fuse.IntervalMask):
    """vlm_fuse.attention; it takes no bias."""

    def attend(q, k, v, bias):
        assert bias is None
        return vlm_fuse.attention(q, k, v, mask)

    return attend


def by_flex(mask: vlm_fuse.IntervalMask):
    """FlexAttention as it is written, uncompiled; on a CPU it has no backward, nor takes tensors that want one."""
    from torch.nn.attention.flex_attention import flex_attention

    block_mask = mask.block_mask()

    def attend(q, k, v, bias):
        score_mod = None if bias is None else lambda score, b, h, q_idx, kv_idx: score + bias[b, h, q_idx, kv_idx]
        return flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=True)

    return attend


RENDERINGS = {"dense": by_dense, "additive": by_additive, "segments": by_segment, "flex": by_flex}


def rendered(rendering: str, masks):
    """The attention of a mask, or of a dict of them by layer type."""
    if isinstance(masks, Mapping):
        return {layer_type: RENDERINGS[rendering](mask) for layer_type, mask in masks.items()}
    return RENDERINGS[rendering](masks)


@functools.cache
def decoder(scheme: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> SmallDecoder:
    """Made once: the tests read its gradients, they never step."""
    return SmallDecoder(scheme).to(device, dtype)
