"""Batches of a family: the same text and images in every form that its model may get them in."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from families.registry import Family
from families.shrinking import PAD

SITUATIONS = ("several_images", "left_padded", "row_without_images", "one_image", "no_image", "video", "audio", "embeddings", "precomputed", "more_placeholders", "more_features")


class NotPossible(Exception):
    """The family has nothing of the kind."""


def rows_of(model, family: Family, kind: str, number: int) -> int:
    """Feature rows of one image or video, as the model's own tower makes them."""
    if family.rows is not None:
        return family.rows
    features = features_of(model, kind, maker_of(family, kind)(model.config, [number]))
    width = model.get_input_embeddings().embedding_dim
    return sum(part.numel() for part in features) // width


def features_of(model, kind: str, inputs: dict) -> list[Tensor]:
    inner = getattr(model, "model", model)
    make = getattr(inner, f"get_{kind}_features", None) or getattr(model, f"get_{kind}_features")
    taken = inspect.signature(make).parameters
    given = {name: value for name, value in inputs.items() if name in taken}
    if "pixel_values" in taken and "pixel_values_videos" in inputs:  # before 5.20
        given.setdefault("pixel_values", inputs["pixel_values_videos"])
    for name in taken:  # before 5.0 some had no default
        if name.startswith("vision_feature") and hasattr(model.config, name):
            given[name] = getattr(model.config, name)
    with torch.no_grad():
        made = make(**given)
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], (list, tuple)):  # before 5.0 DeepStack's features came second
        made = made[0]
    pooled = getattr(made, "pooler_output", None)
    return _tensors(getattr(made, "last_hidden_state", made) if pooled is None else pooled)


def maker_of(family: Family, kind: str):
    maker = {"image": family.images, "video": family.videos, "audio": family.sounds}[kind]
    if maker is None:
        raise NotPossible
    return maker


def _tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [part for item in value for part in _tensors(item)] if isinstance(value, (list, tuple)) else []


def placeholder(model, kind: str) -> int:
    config = model.config
    names = [f"{kind}_token_id", f"{kind}_token_index"]
    return next(getattr(config, name) for name in names if getattr(config, name, None) is not None) if any(hasattr(config, name) for name in names) else 150


def batch(model, family: Family, situation: str) -> dict:
    """Keyword arguments of the model.

    Raises:
        NotPossible: no such batch exists for the family.
    """
    kind = {"video": "video", "audio": "audio"}.get(situation, "audio" if family.images is None else "image")
    maker = maker_of(family, kind)
    rows = {"one_image": [[0]], "no_image": [[], []], "row_without_images": [[0, 1], []], "video": [[0, 1], [1]]}.get(situation, [[0, 1], [1]])
    if family.one_each:
        if situation not in ("several_images", "left_padded", "one_image", "more_placeholders", "more_features"):
            raise NotPossible
        rows = [[0]] if situation == "one_image" else [[0], [1]]
    token, numbers = placeholder(model, kind), [number for row in rows for number in row]
    counts = {number: rows_of(model, family, kind, number) for number in set(numbers)}
    texts = []
    for index, row in enumerate(rows):
        text = [5 + index, 6]
        for number in row:
            frame = [token] * (counts[number] // 2) + [10]
            text += (2 * frame if kind == "video" and family.frames_apart else [token] * counts[number]) + [7 + number, 8]
        texts.append(text + [9] * (3 - index))
    if situation == "more_placeholders":
        texts[0][1] = token
    if situation == "more_features":
        texts[0][texts[0].index(token)] = 11
    length = max(map(len, texts))
    left = situation in ("left_padded", "precomputed")
    ids = torch.tensor([[PAD] * (length - len(text)) + text if left else text + [PAD] * (length - len(text)) for text in texts])
    kept = torch.tensor([[0] * (length - len(text)) + [1] * len(text) if left else [1] * len(text) + [0] * (length - len(text)) for text in texts])
    made = {"input_ids": ids, "attention_mask": kept}
    taken = inspect.signature(model.forward).parameters
    types = (ids == token).int() * (2 if kind == "video" else 1)
    made |= {name: types for name in ("mm_token_type_ids", "token_type_ids") if name in taken}
    if "labels" in taken:
        made["labels"] = ids.masked_fill((ids == token) | (kept == 0), -100)
    if numbers:
        made |= maker(model.config, numbers)
    if "image_embeds_position_mask" in taken:
        made["image_embeds_position_mask"] = (ids == token).int()
    if situation == "embeddings":
        made["inputs_embeds"] = model.get_input_embeddings()(made.pop("input_ids")).detach().requires_grad_()
    if situation == "precomputed":
        _precomputed(model, family, made, numbers, taken)
    return made


def _precomputed(model, family: Family, made: dict, numbers: list, taken) -> None:
    """What the tower makes handed in beside the ids, where the model takes that."""
    if "mm_encoder_outputs" not in taken or "mm_encoder_outputs" in made:
        raise NotPossible
    inputs = maker_of(family, "image")(model.config, numbers)
    inner = getattr(model, "model", model)
    make = getattr(inner, "get_image_features", None) or model.get_image_features
    with torch.no_grad():
        features = make(**{name: value for name, value in inputs.items() if name in inspect.signature(make).parameters})
    for name in inputs:
        if name.startswith("pixel"):
            made.pop(name)
    made["mm_encoder_outputs"] = {"image": features}
