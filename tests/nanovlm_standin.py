"""A small model with nanoVLM's interface, written from it: the names that the patch relies on, and what they take and return.

huggingface/nanoVLM is not a package; the real one runs in test_nanovlm.py where NANOVLM_PATH says where it is.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE, PAD = 90, 1
ROWS, SIDE = 4, 8


class RotaryEmbedding(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("inv_freq", 1e4 ** -(torch.arange(0, size, 2) / size))

    @torch.no_grad()
    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None].float() * self.inv_freq).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, other = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-other, one], -1) * sin[:, None]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x, cos, sin, attention_mask=None, block_kv_cache=None):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        if block_kv_cache is not None and block_kv_cache["key"] is not None:
            k, v = torch.cat([block_kv_cache["key"], k], 2), torch.cat([block_kv_cache["value"], v], 2)
        cache = {"key": k, "value": v}
        hidden = None
        if attention_mask is not None:
            hidden = (1.0 - attention_mask[:, None, None, : k.shape[2]].float()) * torch.finfo(q.dtype).min
        causal = length == k.shape[2] and length > 1
        y = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=hidden, dropout_p=self.dropout if self.training else 0.0, is_causal=causal
        )
        return self.out_proj(y.transpose(1, 2).reshape(batch, length, width)), cache


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.attn, self.mlp = Attention(width, heads, dropout), nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x, cos, sin, attention_mask=None, block_kv_cache=None):
        y, block_kv_cache = self.attn(self.norm1(x), cos, sin, attention_mask, block_kv_cache)
        x = x + y
        return x + self.mlp(self.norm2(x)), block_kv_cache


class LanguageModel(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.lm_use_tokens = False
        self.token_embedding, self.rotary_embd = nn.Embedding(100, width), RotaryEmbedding(width // heads)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(2))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 100, bias=False)

    def forward(self, x, attention_mask=None, kv_cache=None, start_pos=0):
        positions = torch.arange(start_pos, start_pos + x.shape[1], device=x.device)[None].expand(x.shape[0], -1)
        cos, sin = self.rotary_embd(positions)
        kv_cache = kv_cache or [None] * len(self.blocks)
        for index, block in enumerate(self.blocks):
            x, kv_cache[index] = block(x, cos, sin, attention_mask, kv_cache[index])
        return self.norm(x), kv_cache


class VisionLanguageModel(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4, dropout: float = 0.0):
        super().__init__()
        self.vision_encoder = nn.Conv2d(3, 16, SIDE // 2, SIDE // 2)
        self.MP = nn.Linear(16, width)
        self.decoder = LanguageModel(width, heads, dropout)
        self.tokenizer = SimpleNamespace(image_token_id=IMAGE, pad_token_id=PAD, eos_token_id=PAD)

    def _replace_img_tokens_with_embd(self, input_ids, token_embd, image_embd):
        replaced = token_embd.clone()
        replaced[input_ids == self.tokenizer.image_token_id] = image_embd.view(-1, image_embd.size(-1)).to(replaced.dtype)
        return replaced

    def _embedded(self, input_ids, images):
        images = [image for row in images for image in row]
        embeds = self.decoder.token_embedding(input_ids)
        if not images:
            return embeds
        return self._replace_img_tokens_with_embd(input_ids, embeds, self.MP(self.vision_encoder(torch.cat(images)).flatten(2).transpose(1, 2).contiguous()))

    def forward(self, input_ids, images, attention_mask=None, targets=None):
        x, _ = self.decoder(self._embedded(input_ids, images), attention_mask=attention_mask)
        if targets is None:
            return x, None
        logits = self.decoder.head(x)
        return logits, F.cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-100)

    @torch.inference_mode()
    def generate(self, input_ids, images, attention_mask=None, max_new_tokens=5):
        x, cache = self.decoder(self._embedded(input_ids, images), attention_mask=attention_mask, kv_cache=None, start_pos=0)
        made, length = [], input_ids.shape[1]
        for _ in range(max_new_tokens):
            made.append(self.decoder.head(x[:, -1]).argmax(-1, keepdim=True))
            if attention_mask is not None:
                attention_mask = torch.cat([attention_mask, torch.ones_like(made[-1])], 1)
            x, cache = self.decoder(self.decoder.token_embedding(made[-1]), attention_mask=attention_mask, kv_cache=cache, start_pos=length)
            length += 1
        return torch.cat(made, 1)


def sample(words: int, images: int, seed: int) -> dict:
    """As nanoVLM's data set gives one: labels shifted already, the last without a target."""
    generator = torch.Generator().manual_seed(seed)
    ids = [token for _ in range(images) for token in (5, *[IMAGE] * ROWS)] + torch.randint(6, 80, (words,), generator=generator).tolist()
    ids = torch.tensor(ids)
    labels = ids.masked_fill(ids == IMAGE, -100).roll(-1)
    labels[-1] = -100
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, images=[torch.randn(1, 3, SIDE, SIDE, generator=generator) for _ in range(images)])


def packed(rows: list[list[dict]], length: int) -> dict:
    """As its packer and collator make a batch: one masked pad after each sample, rows padded on the left."""
    made = []
    for row in rows:
        parts = {
            name: torch.cat([torch.cat([one[name], torch.tensor([value])]) for one in row])
            for name, value in (("input_ids", PAD), ("attention_mask", 0), ("labels", -100))
        }
        made.append({name: F.pad(part, (length - len(part), 0), value={"input_ids": PAD, "attention_mask": 0, "labels": -100}[name]) for name, part in parts.items()})
    batch = {name: torch.stack([row[name] for row in made]) for name in made[0]}
    return batch | {"images": [[image for one in row for image in one["images"]] for row in rows]}
