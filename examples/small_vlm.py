"""A vision-language model as small as learns: a projector of patches, an embedding table, two layers, RoPE or learned positions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .digit_questions import PATCH, VOCABULARY

POSITIONS = ("rope", "learned")


def rotated(x: Tensor, position_ids: Tensor) -> Tensor:
    """Rotary embedding of ``(G, heads, W, D)``. Source: RoFormer (arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = position_ids[:, None, :, None] * frequency
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * angle.cos() - two * angle.sin(), one * angle.sin() + two * angle.cos()], dim=-1)


class Layer(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, hidden: int, heads: int, rope: bool):
        super().__init__()
        self.heads, self.rope = heads, rope
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(2))
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def forward(self, x: Tensor, position_ids: Tensor, attend: Callable) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)  # [G, heads, W, hidden / heads]
        if self.rope:
            q, k = rotated(q, position_ids), rotated(k, position_ids)
        x = x + self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class SmallVLM(nn.Module):
    """What stands around merge.

    Args:
        positions: "rope" or "learned".
        longest: entries of the table of learned positions: as many as a row has, where positions run on in it.
    """

    def __init__(self, positions: str, longest: int, *, hidden: int = 64, heads: int = 4, layers: int = 2):
        super().__init__()
        self.text = nn.Embedding(len(VOCABULARY), hidden)
        self.vision = nn.Sequential(nn.Linear(PATCH * PATCH, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.position = nn.Embedding(longest, hidden) if positions == "learned" else None
        self.layers = nn.ModuleList(Layer(hidden, heads, positions == "rope") for _ in range(layers))
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, len(VOCABULARY), bias=False)
        nn.init.normal_(self.text.weight, std=0.3)
        if self.position is not None:
            nn.init.normal_(self.position.weight, std=0.3)

    def forward(self, rows: Tensor, position_ids: Tensor, attend: Callable) -> Tensor:
        """``(G, W, hidden)`` merged rows to hidden states; `attend` is ``f(q, k, v)`` under the batch's mask."""
        x = rows if self.position is None else rows + self.position(position_ids)
        for layer in self.layers:
            x = layer(x, position_ids, attend)
        return self.norm(x)
