"""A small vision-language model whose parts torch's parallelisms can share out: M-RoPE, one DeepStack level, an untied head."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlm_fuse
from vlm_fuse.token_plan import TokenPlan

from .digit_questions import PATCH, VOCABULARY

HIDDEN, HEADS, LAYERS = 64, 4, 2
VOCABULARY_SIZE = -(-len(VOCABULARY) // 8) * 8  # rows of the table, so that ranks have equal parts


class RankBatch(NamedTuple):
    """What one rank computes on; how ranks share out a batch is settled before the model runs."""

    embed_ids: Tensor  # (G, ...) ids that this rank hands to the embedding module
    plan: TokenPlan  # of the rows that this rank merges: of the whole, or a shard
    patches: Tensor  # (images, ROWS, PATCH * PATCH) pictures of this rank
    position_ids: Tensor  # (3, G, W') of the rows that this rank's attention rotates
    labels: Tensor  # (G, W'') what each row predicts, of the rows that this rank has logits for
    attend: Callable  # f(q, k, v)
    replicated: Callable = lambda features: features  # features that all ranks of a tensor-parallel group compute alike


class Vision(nn.Module):
    """A projector of patches: features for the placeholders, and features that are added after the first layer (DeepStack)."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Linear(PATCH * PATCH, HIDDEN)
        self.out, self.deep = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        x = F.gelu(self.patch(patches)).flatten(0, 1)
        return self.out(x), self.deep(x)  # (rows, HIDDEN) each


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))

    def forward(self, x: Tensor, position_ids: Tensor, attend: Callable) -> Tensor:
        heads = (one(x).unflatten(-1, (-1, HIDDEN // HEADS)).transpose(1, 2) for one in (self.q, self.k, self.v))  # (G, this rank's heads, W, D)
        q, k, v = heads
        seen = attend(rotated(q, position_ids), rotated(k, position_ids), v)
        return self.out(seen.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False), nn.Linear(4 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.attention, self.mlp = Attention(), Mlp()

    def forward(self, x: Tensor, position_ids: Tensor, attend: Callable) -> Tensor:
        x = x + self.attention(self.attention_norm(x), position_ids, attend)
        return x + self.mlp(self.mlp_norm(x))


class ParallelVLM(nn.Module):
    """Called with a rank's batch it gives the sum of the losses of the rank's labels."""

    def __init__(self):
        super().__init__()
        self.text, self.vision = nn.Embedding(VOCABULARY_SIZE, HIDDEN), Vision()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, VOCABULARY_SIZE, bias=False)
        nn.init.normal_(self.text.weight, std=0.3)

    def forward(self, batch: RankBatch) -> Tensor:
        features, deep = (batch.replicated(rows) for rows in self.vision(batch.patches))
        x = vlm_fuse.merge(None, self.text(batch.embed_ids), features, plan=batch.plan).inputs_embeds
        for number, layer in enumerate(self.layers):
            x = layer(x, batch.position_ids, batch.attend)
            if number == 0:
                x = vlm_fuse.add_features(x, deep, batch.plan)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum")


def rotated(x: Tensor, position_ids: Tensor) -> Tensor:
    """M-RoPE of ``(G, heads, W, D)``: the first half of the frequencies turns with time, a quarter each with height and width.

    Source: Qwen2-VL (arXiv 2409.12191).
    """
    half = x.shape[-1] // 2
    frequency = 100.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    axis = torch.tensor([0] * (half // 2) + [1] * (half // 4) + [2] * (half // 4))
    angle = (position_ids[axis].movedim(0, -1) * frequency)[:, None]  # (G, 1, W, D / 2)
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * angle.cos() - two * angle.sin(), one * angle.sin() + two * angle.cos()], dim=-1)
