"""Inputs of the towers: random pixels and sounds of a number of images, as each kind of processor gives them.

A maker takes (config, numbers): the config of the whole model, and which images are meant, so that the same number is the same image.
"""

from __future__ import annotations

import torch


def random_values(number: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + number))


def _side(config) -> int:
    size = config.vision_config.image_size
    return size[0] if isinstance(size, (list, tuple)) else size


def pictures(config, numbers, **more) -> dict:
    """``(images, 3, side, side)``."""
    return {"pixel_values": torch.stack([random_values(number, 3, _side(config), _side(config)) for number in numbers]), **more}


def of_side(side: int):
    def maker(config, numbers) -> dict:
        return {"pixel_values": torch.stack([random_values(number, 3, side, side) for number in numbers])}

    return maker


def sized(config, numbers) -> dict:
    """With the height and width of each, as Pixtral takes them."""
    return pictures(config, numbers, image_sizes=torch.tensor([[_side(config)] * 2] * len(numbers)))


def tiles(config, numbers) -> dict:
    """``(images, tiles, 3, side, side)`` with the size that the tiles were cut from, as LLaVA-NeXT takes them."""
    side = _side(config)
    pixels = torch.stack([random_values(number, 2, 3, side, side) for number in numbers])
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[side, side]] * len(numbers))}


def in_rows(config, numbers) -> dict:
    """``(1, images, 3, side, side)``, as Idefics takes them. All images in one row: where they stand is told by placeholders."""
    return {"pixel_values": pictures(config, numbers)["pixel_values"][None]}


def patches(config, numbers, *, kind: str = "image", frames: int = 1) -> dict:
    """Patches of all images in one list and their grids, as Qwen2-VL takes them."""
    vision = config.vision_config
    merge, patch = getattr(vision, "spatial_merge_size", None) or getattr(vision, "merge_kernel_size", [2])[0], vision.patch_size
    grids = [(frames, 2 * merge, merge * (1 + number % 2)) for number in numbers]
    width = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or getattr(vision, "num_channels", 3)
    width *= (getattr(vision, "temporal_patch_size", None) or 1) * patch**2
    pixels = torch.cat([random_values(number, t * h * w, width) for number, (t, h, w) in zip(numbers, grids)])
    names = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    return dict(zip(names, (pixels, torch.tensor(grids))))


def square_patches(config, numbers, **more) -> dict:
    """The same without flattening each patch: ``(patches, 3, side, side)``."""
    made = patches(config, numbers, **more)
    name = next(iter(made))
    side = config.vision_config.patch_size
    return made | {name: made[name].view(len(made[name]), -1, side, side)}


def films(config, numbers) -> dict:
    """``(videos, frames, 3, side, side)``."""
    side = _side(config)
    return {"pixel_values_videos": torch.stack([random_values(number, 2, 3, side, side) for number in numbers])}


def film_patches(config, numbers) -> dict:
    return patches(config, numbers, kind="video", frames=2)


def sounds(config, numbers) -> dict:
    """``(sounds, mel bins, frames)``, as Whisper takes them."""
    audio = config.audio_config
    frames = 2 * getattr(audio, "max_source_positions", 16)
    mels = torch.stack([random_values(number, audio.num_mel_bins, frames) for number in numbers])
    return {"input_features": mels, "input_features_mask": torch.ones(len(numbers), frames, dtype=torch.int64)}


def sounds_of_one_length(config, numbers) -> dict:
    return {"input_features": sounds(config, numbers)["input_features"]}


ROWS = 3


def features(config, numbers) -> dict:
    """What the tower would make of each image: ROWS rows."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    width = config.get_text_config().hidden_size
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=[random_values(number, ROWS, width) for number in numbers])}}
