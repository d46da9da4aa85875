"""A model of nanoVLM's shape in plain torch: a SigLIP tower, pixel shuffle and projector, a SmolLM2 decoder; random weights.

The decoder takes its attention as a function ``f(q, k, v)``, so that every contestant brings its own.

Source: huggingface/nanoVLM, ``models/config.py``, ``vision_transformer.py``, ``modality_projector.py`` and ``language_model.py``; the sizes
of SigLIP-B/16 and of SmolLM2 135M and 360M, from their configurations, remembered except where `presets` says otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.presets import PRESETS, Preset

from .attends import Attend


class Shape(NamedTuple):
    """Sizes of the model. `preset` has the width, the heads and the vocabulary of the decoder, and the token ids."""

    preset: Preset
    layers: int
    inner: int  # width inside the decoder's MLPs
    vision_width: int
    vision_layers: int
    vision_heads: int
    image: int  # pixels along a side
    patch: int
    shuffle: int  # patches along a side that become one feature row

    @property
    def rows(self) -> int:
        """Feature rows of an image, or of a tile."""
        return (self.image // self.patch // self.shuffle) ** 2

    def work(self, images: int, tokens: int) -> tuple[int, int]:
        """Products of a forward's linear layers, of the tower and of the decoder with its head; attention and the patches not counted."""
        hidden, (queries, keys, size) = self.preset.hidden_size, self.preset.heads
        tower = self.vision_layers * 12 * self.vision_width**2 * (self.image // self.patch) ** 2 + self.rows * self.shuffle**2 * self.vision_width * hidden
        layer = hidden * size * 2 * (queries + keys) + 3 * hidden * self.inner
        return images * tower, tokens * (self.layers * layer + hidden * self.preset.vocab_size)

    def run_of(self, rows: int) -> int:
        """The run of placeholders that an image gets.

        Raises:
            ValueError: a distribution whose images are of another size.
        """
        if rows != self.rows:
            raise ValueError(f"an image of {rows} feature rows: the tower makes {self.rows} of each; take another distribution")
        return rows

    def pixels_of(self, sizes: tuple[int, ...], seed: int) -> dict[str, Tensor]:
        """Random pixels for images of these feature rows."""
        generator = torch.Generator().manual_seed(seed)
        return {"pixels": torch.randn(len(sizes), 3, self.image, self.image, generator=generator)}

    def pixels_between(self, pixels: dict[str, Tensor], sizes: tuple[int, ...], first: int, end: int) -> dict[str, Tensor]:
        """The pixels of some images."""
        return {"pixels": pixels["pixels"][first:end]}


def _scaled(hidden: int, heads: tuple[int, int, int], vocabulary: int) -> Preset:
    """nanoVLM's preset made small: the placeholder is the last id, the tag before a tile the one before."""
    return PRESETS["nanovlm-450m"]._replace(
        hidden_size=hidden, heads=heads, vocab_size=vocabulary, image_token_id=vocabulary - 1, marks=((vocabulary - 2,), ())
    )


#: SigLIP-B/16 on 512 pixels with SmolLM2 360M or 135M; what a CPU trains in a second; what a test trains.
SIZES = {
    "nanovlm-450m": Shape(PRESETS["nanovlm-450m"], 32, 2560, 768, 12, 12, 512, 16, 4),
    "nanovlm-230m": Shape(PRESETS["nanovlm-230m"], 30, 1536, 768, 12, 12, 512, 16, 4),
    "scaled": Shape(_scaled(256, (4, 2, 64), 2050), 4, 704, 64, 2, 2, 128, 8, 2),
    "tiny": Shape(_scaled(32, (2, 1, 16), 130), 2, 64, 16, 1, 1, 32, 2, 2),
}


class NanoVLM(nn.Module):
    """Tower, projector and decoder; the step between them is the contestant's.

    Args:
        shape: one of `SIZES`.

    Example:
        >>> import torch
        >>> from benchmarks.throughput.nanovlm import SIZES, NanoVLM
        >>> model = NanoVLM(SIZES["tiny"])
        >>> model.images(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([128, 32])
    """

    def __init__(self, shape: Shape):
        super().__init__()
        preset = shape.preset
        self.shape, self.hidden = shape, preset.hidden_size
        self.tower = Tower(shape)
        self.projector = nn.Linear(shape.vision_width * shape.shuffle**2, self.hidden, bias=False)
        self.embedding = nn.Embedding(preset.vocab_size, self.hidden)
        self.blocks = nn.ModuleList(Block(self.hidden, preset.heads, shape.inner) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(self.hidden)
        # logits of about 1: what a row must not see would hardly show in the loss under the usual 0.02
        nn.init.normal_(self.embedding.weight, std=self.hidden**-0.5)

    def images(self, pixels: Tensor) -> Tensor:
        """``(images, 3, side, side)`` to feature rows ``(images * rows, D)``."""
        if not len(pixels):
            return pixels.new_zeros(0, self.hidden)
        return self.projector(shuffled(self.tower(pixels), self.shape.shuffle)).flatten(0, 1)

    def forward(self, rows: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """Merged rows ``(G, W, D)`` to logits ``(G, W, V)``; the head is the embedding table, as in SmolLM2."""
        cos, sin = angles(position_ids, self.shape.preset.heads[2], rows.dtype)
        for block in self.blocks:
            rows = block(rows, cos, sin, attend)
        return F.linear(self.norm(rows), self.embedding.weight)


def angles(position_ids: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(G, 1, W, size)`` of the rotary embedding. Source: RoFormer (arXiv 2104.09864)."""
    frequency = 1e5 ** (-torch.arange(0, size, 2, device=position_ids.device) / size)
    angle = (position_ids[:, None, :, None] * frequency).repeat(1, 1, 1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, other = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-other, one], -1) * sin


class Block(nn.Module):
    """A layer of the decoder: grouped query attention and a gated MLP, each behind a norm."""

    def __init__(self, hidden: int, heads: tuple[int, int, int], inner: int):
        super().__init__()
        queries, keys, self.size = heads
        self.before_attention, self.before_mlp = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q, self.k, self.v = (nn.Linear(hidden, count * self.size, bias=False) for count in (queries, keys, keys))
        self.out = nn.Linear(queries * self.size, hidden, bias=False)
        self.gate, self.up, self.down = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False), nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        y = self.before_attention(x)
        q, k, v = (part(y).unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.out(attend(rotated(q, cos, sin), rotated(k, cos, sin), v).transpose(1, 2).flatten(2))
        y = self.before_mlp(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Tower(nn.Module):
    """SigLIP's vision transformer without its pooling head."""

    def __init__(self, shape: Shape):
        super().__init__()
        width = shape.vision_width
        self.patches = nn.Conv2d(3, width, shape.patch, shape.patch)
        self.position = nn.Parameter(0.02 * torch.randn((shape.image // shape.patch) ** 2, width))
        self.layers = nn.ModuleList(TowerLayer(width, shape.vision_heads) for _ in range(shape.vision_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class TowerLayer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


def shuffled(x: Tensor, factor: int) -> Tensor:
    """Pixel shuffle: squares of factor x factor patches become one wide row. ``(B, S, C)`` to ``(B, S / factor^2, C * factor^2)``.

    Source: huggingface/nanoVLM, ``models/modality_projector.py``.
    """
    side = int(x.shape[1] ** 0.5)
    x = x.view(len(x), side // factor, factor, side // factor, factor, x.shape[2])
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
