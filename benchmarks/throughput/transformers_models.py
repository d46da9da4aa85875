"""Models of transformers in the shapes of Qwen2.5-VL, Qwen3-VL and LLaVA 1.5, with few layers and random weights.

Width, heads and layout of the placeholders are the model's own on a GPU; a CPU gets a small width. What a step spends beside the merge
grows with the layers, so the number of layers stands in every report.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.presets import PRESETS, Preset


class Shape(NamedTuple):
    """Sizes of a model. `preset` has the width, the heads and the vocabulary of the decoder, and the token ids."""

    preset: Preset
    layers: int
    inner: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    patch: int
    image: int | None  # pixels along a side; None: images of any size, of 2 x 2 patches a feature row

    def run_of(self, rows: int) -> int:
        """The run of placeholders that an image gets which was drawn with so many feature rows: nearly that many, in a rectangle.

        Raises:
            ValueError: images of one size, and a distribution of another.
        """
        if self.image is None:
            side = max(1, round(math.sqrt(rows)))
            return side * max(1, rows // side)
        if rows != (self.image // self.patch) ** 2:
            raise ValueError(f"an image of {rows} feature rows: the tower makes {(self.image // self.patch) ** 2} of each; take another distribution")
        return rows

    def pixels_of(self, sizes: tuple[int, ...], seed: int) -> dict[str, Tensor]:
        """Random pixels for images of these feature rows, and where they are of any size their grids."""
        generator = torch.Generator().manual_seed(seed)
        if not sizes:
            return {}
        if self.image is not None:
            return {"pixel_values": torch.randn(len(sizes), 3, self.image, self.image, generator=generator)}
        patches = torch.randn(4 * sum(sizes), 3 * 2 * self.patch**2, generator=generator)
        return {"pixel_values": patches, "image_grid_thw": torch.tensor([grid_of(rows) for rows in sizes])}

    def pixels_between(self, pixels: dict[str, Tensor], sizes: tuple[int, ...], first: int, end: int) -> dict[str, Tensor]:
        """The pixels of some images."""
        if first == end:
            return {}
        if self.image is not None:
            return {"pixel_values": pixels["pixel_values"][first:end]}
        start = 4 * sum(sizes[:first])
        patches = pixels["pixel_values"][start : start + 4 * sum(sizes[first:end])]
        return {"pixel_values": patches, "image_grid_thw": pixels["image_grid_thw"][first:end]}


def grid_of(rows: int) -> tuple[int, int, int]:
    """Frames, height and width in patches of an image of so many feature rows: the rectangle nearest to a square.

    Example:
        >>> from benchmarks.throughput.transformers_models import grid_of
        >>> grid_of(12)
        (1, 6, 8)
    """
    height = next(side for side in range(math.isqrt(rows), 0, -1) if rows % side == 0)
    return 1, 2 * height, 2 * (rows // height)


class Family(NamedTuple):
    """One model: how it is made, its sizes by name, its distributions and row lengths."""

    title: str
    make: Callable[[Shape], nn.Module]
    sizes: dict[str, Shape]
    distribution: dict[str, str]
    tower: str  # what the tower does in a model as it is published; the scaled one is to do about as much


def _qwen(name: str, width: int, heads: tuple[int, int, int], vocabulary: int) -> Preset:
    """The model's preset made small, its token ids the last of the table."""
    return PRESETS[name]._replace(
        hidden_size=width, heads=heads, vocab_size=vocabulary, image_token_id=vocabulary - 4, video_token_id=vocabulary - 3,
        marks=((vocabulary - 2,), (vocabulary - 1,)),
    )  # fmt: skip


def _llava(width: int, heads: tuple[int, int, int], vocabulary: int) -> Preset:
    return PRESETS["llava-1.5-7b"]._replace(hidden_size=width, heads=heads, vocab_size=vocabulary, image_token_id=vocabulary - 1)


def _text(shape: Shape) -> dict:
    queries, keys, size = shape.preset.heads
    # logits of about 1: what a row must not see would hardly show in the loss under the usual 0.02
    return dict(
        hidden_size=shape.preset.hidden_size, intermediate_size=shape.inner, num_hidden_layers=shape.layers, num_attention_heads=queries,
        num_key_value_heads=keys, head_dim=size, vocab_size=shape.preset.vocab_size, max_position_embeddings=32768,
        initializer_range=shape.preset.hidden_size**-0.5, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def _ids(preset: Preset) -> dict:
    (start,), (end,) = preset.marks
    return dict(image_token_id=preset.image_token_id, video_token_id=preset.video_token_id, vision_start_token_id=start, vision_end_token_id=end)


def _qwen2_5_vl(shape: Shape) -> nn.Module:
    import transformers

    half = shape.preset.heads[2] // 2
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[half // 4, half * 3 // 8, half * 3 // 8])
    text = {name: value for name, value in _text(shape).items() if name != "head_dim"} | dict(rope_parameters=rope)
    vision = dict(
        hidden_size=shape.vision_width, intermediate_size=4 * shape.vision_width, depth=shape.vision_layers, num_heads=shape.vision_heads,
        patch_size=shape.patch, out_hidden_size=shape.preset.hidden_size, fullatt_block_indexes=[shape.vision_layers - 1],
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_ids(shape.preset)))


def _qwen3_vl(shape: Shape) -> nn.Module:
    import transformers

    half = shape.preset.heads[2] // 2
    width = half * 5 // 16
    rope = dict(rope_type="default", rope_theta=5e6, mrope_section=[half - 2 * width, width, width], mrope_interleaved=True)
    vision = dict(
        hidden_size=shape.vision_width, intermediate_size=4 * shape.vision_width, depth=shape.vision_layers, num_heads=shape.vision_heads,
        patch_size=shape.patch, out_hidden_size=shape.preset.hidden_size, deepstack_visual_indexes=list(range(min(3, shape.vision_layers))),
    )  # fmt: skip
    text = _text(shape) | dict(rope_parameters=rope)
    return transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **_ids(shape.preset)))


def _llava_model(shape: Shape) -> nn.Module:
    import transformers

    vision = transformers.CLIPVisionConfig(
        hidden_size=shape.vision_width, intermediate_size=4 * shape.vision_width, num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads, image_size=shape.image, patch_size=shape.patch,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**_text(shape)), image_token_index=shape.preset.image_token_id)
    return transformers.LlavaForConditionalGeneration(config)


_SMALL, _TINY = (4, 2, 64), (2, 1, 32)
FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(
        "Qwen2.5-VL", _qwen2_5_vl,
        {
            "full": Shape(PRESETS["qwen2.5-vl-3b"], 8, 11008, 1280, 8, 16, 14, None),
            "scaled": Shape(_qwen("qwen2.5-vl-3b", 256, _SMALL, 2052), 3, 704, 64, 3, 2, 14, None),
            "tiny": Shape(_qwen("qwen2.5-vl-3b", 64, _TINY, 260), 2, 64, 32, 2, 2, 4, None),
        },
        {"full": "finevision_native", "scaled": "finevision_native", "tiny": "finevision_native"},
        "of Qwen2.5-VL 3B about 14 %",
    ),
    "qwen3_vl": Family(
        "Qwen3-VL", _qwen3_vl,
        {
            "full": Shape(PRESETS["qwen3-vl-4b"], 8, 9728, 1024, 8, 16, 16, None),
            "scaled": Shape(_qwen("qwen3-vl-4b", 256, _SMALL, 2052), 3, 704, 32, 3, 2, 16, None),
            "tiny": Shape(_qwen("qwen3-vl-4b", 64, _TINY, 260), 3, 64, 32, 3, 2, 4, None),
        },
        {"full": "finevision_native", "scaled": "finevision_native", "tiny": "finevision_native"},
        "of Qwen3-VL 4B 5 to 7 %",
    ),
    "llava": Family(
        "LLaVA 1.5", _llava_model,
        {
            "full": Shape(PRESETS["llava-1.5-7b"], 4, 11008, 1024, 8, 16, 14, 336),
            "scaled": Shape(_llava(256, (4, 4, 64), 2052), 3, 704, 64, 3, 2, 14, 112),
            "tiny": Shape(_llava(64, (2, 2, 32), 260), 2, 64, 32, 2, 2, 4, 32),
        },
        {"full": "llava_665k", "scaled": "cauldron_64", "tiny": "cauldron_64"},
        "of LLaVA 1.5 7B 2 to 3 %",
    ),
}  # fmt: skip
