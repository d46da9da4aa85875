"""A very small decoder that learns the answers of two chats through merge: patch embedding and text table both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlm_fuse

from .chat_batch import IGNORE_INDEX, PATCH, ChatBatch


class Block(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(2))
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.mlp = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        q, k, v = heads.unbind(2)  # [1, heads, W, hidden / heads]
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Decoder(nn.Module):
    """What stands around merge in a vision-language model, as little as will learn."""

    def __init__(self, vocabulary: int, longest: int, hidden: int = 64, heads: int = 4, layers: int = 2):
        super().__init__()
        self.text = nn.Embedding(vocabulary, hidden)
        self.patch = nn.Linear(3 * PATCH * PATCH, hidden)
        self.position = nn.Embedding(longest, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden)
        nn.init.normal_(self.text.weight, std=0.02)

    def forward(self, batch: ChatBatch) -> Tensor:
        """The mean loss over the assistant's tokens."""
        merged = vlm_fuse.merge(
            batch.input_ids,
            weight=self.text.weight,  # the lookup is part of the merge
            image_embeds=self.patch(torch.cat(batch.patches)),
            image_token_id=batch.image_token_id,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            layout="packed",
        )
        x = merged.inputs_embeds + self.position(merged.position_ids)
        mask = merged.mask.dense()
        for block in self.blocks:
            x = block(x, mask)
        following = merged.labels[:, 1:]
        learnt = following != IGNORE_INDEX  # logits only where there is something to learn
        logits = F.linear(self.norm(x[:, :-1][learnt]), self.text.weight)
        return F.cross_entropy(logits, following[learnt])


def train(batch: ChatBatch, steps: int, *, progress=iter, seed: int = 0) -> list[float]:
    """The loss before each of `steps` steps."""
    torch.manual_seed(seed)
    model = Decoder(batch.vocabulary, longest=batch.input_ids.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in progress(range(steps)):
        loss = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
