"""`get_rope_index` by `vlm_fuse.mrope_position_ids`: M-RoPE's positions without a host read for each image.

The families differ in a constant or two, and some in more. Which of ours is a model's own is not looked up by its name but tried:
small batches are given to both, and only a method whose every answer is ours, to the bit, is replaced.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

import vlm_fuse

from .. import binding

NAME = "get_rope_index"
_KNOWN = {"self", "input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask", "kwargs"}
_NEEDED = {"input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask"}


class Rule(NamedTuple):
    """How a model counts."""

    names: tuple[str, ...]  # of its arguments, in order
    split_video_frames: bool
    videos: bool = True  # or images alone: batches with videos are left to the model's own


def bindings(model: nn.Module) -> Iterator[tuple[nn.Module, str, Callable | str]]:
    """(module, name, what runs in its place) of every module that has the method, or why nothing does."""
    for module in model.modules():
        if not callable(getattr(type(module), NAME, None)):
            continue
        constants = _constants(module)
        try:
            found = None if constants is None else _found(binding.method(module, NAME), module, constants)
        except binding.Unreachable as reason:
            found = str(reason)
        yield module, NAME, found or "its positions are of another kind than vlm_fuse.mrope_position_ids makes"


def _constants(module: nn.Module) -> tuple[int, float] | None:
    """spatial_merge_size and tokens_per_second of the model's config."""
    vision = getattr(getattr(module, "config", None), "vision_config", None)
    merge = getattr(vision, "spatial_merge_size", None)
    return None if not isinstance(merge, int) else (merge, getattr(vision, "tokens_per_second", None) or 1)


_replacements: dict[tuple, Callable | None] = {}


def _found(method: Callable, module: nn.Module, constants: tuple[int, float]) -> Callable | None:
    """Tried once for each method and its constants."""
    key = method, constants
    if key not in _replacements:
        rule = _rule(method, module, *constants)
        _replacements[key] = None if rule is None else _replacement(method, rule)
    return _replacements[key]


@functools.cache
def _replacement(method: Callable, rule: Rule) -> Callable:
    @functools.wraps(method)
    def get_rope_index(self, *args, **kwargs):
        given = dict(zip(rule.names, args)) | kwargs
        constants = _constants(self)
        if constants is None or not _takes(given, rule):
            return method(self, *args, **kwargs)
        try:
            return _ours(given, rule, *constants)
        except (ValueError, TypeError) as error:
            if is_compiling():
                raise
            # grids that are not used, and whatever else it gets along with
            try:
                return method(self, *args, **kwargs)
            except Exception:
                raise error from None

    return get_rope_index


def _takes(given: dict, rule: Rule) -> bool:
    ids, types = given.get("input_ids"), given.get("mm_token_type_ids")
    plain = isinstance(ids, Tensor) and isinstance(types, Tensor) and ids.dim() == 2 and types.shape == ids.shape
    return plain and set(given) <= {*rule.names} and types.device == ids.device and (rule.videos or given.get("video_grid_thw") is None)


def _ours(given: dict, rule: Rule, merge: int, rate: float) -> tuple[Tensor, Tensor]:
    more = {}
    if "second_per_grid_ts" in rule.names:
        more = {"tokens_per_second": rate, "second_per_grid_ts": given.get("second_per_grid_ts")}
    ids = given["input_ids"]
    grids = {name: given[name] for name in ("image_grid_thw", "video_grid_thw") if given.get(name) is not None}
    positions, deltas = vlm_fuse.mrope_position_ids(
        given["mm_token_type_ids"], **grids, attention_mask=given.get("attention_mask"), spatial_merge_size=merge,
        split_video_frames=rule.split_video_frames, **more,
    )  # fmt: skip
    return positions.to(ids.dtype), deltas


def _rule(method: Callable, module: nn.Module, merge: int, rate: float) -> Rule | None:
    """The rule that gives the model's own answers."""
    names = tuple(inspect.signature(method).parameters)[1:]
    if not _NEEDED <= set(names) <= _KNOWN:
        return None
    names = tuple(name for name in names if name != "kwargs")
    videos = "video_grid_thw" in names
    for rule in (Rule(names, False, videos), Rule(names, True, videos), *([Rule(names, False, False)] if videos else [])):
        try:
            # on the CPU, whatever the model is on; what it looks at in the model are constants
            with torch.no_grad(), torch.device("cpu"):
                if all(_same(_ours(trial, rule, merge, rate), method(module, **trial)) for trial in _trials(rule, merge)):
                    return rule
        except Exception:  # another rule's batches are an error to it
            continue
    return None


def _same(one: tuple, other: tuple) -> bool:
    return all(isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other)) and len(other) == 2


def _trials(rule: Rule, merge: int) -> Iterator[dict]:
    """Batches of text, images and videos: padded on either side, without a mask, and without images."""
    images, videos = [(1, 2, 3), (1, 4, 1), (1, 1, 1), (1, 3, 5)], [(2, 2, 1), (3, 1, 4)]
    text = [0] * 3

    def placeholders(kind: int, grid: tuple) -> list[int]:
        frames = [[kind] * (grid[1] * grid[2]) for _ in range(grid[0])]
        return [token for frame in frames for token in ([*frame, 0] if kind == 2 and rule.split_video_frames else frame)]

    first = [*text, *placeholders(1, images[0]), 0, *placeholders(1, images[1]), 0, 0]
    second = [*placeholders(1, images[2]), 0, *(placeholders(2, videos[0]) if rule.videos else []), 0, *placeholders(1, images[3])]
    third = [0, *(placeholders(2, videos[1]) if rule.videos else []), *text]
    length = max(map(len, (first, second, third)))
    for side in ("left", "right", "none"):
        rows, kept = [], []
        for row in (first, second, third):
            padding = [0] * (length - len(row))
            rows.append(padding + row if side == "left" else row + padding)
            mask = [1] * len(row) if side != "none" else [1] * length
            kept.append(padding * (side == "left") + mask + padding * (side == "right"))
        yield _trial(rule, rows, None if side == "none" else kept, images, videos if rule.videos else [], merge)
    yield _trial(rule, [first], None, images[:2], [], merge)
    yield _trial(rule, [text, text], [[1, 1, 1], [0, 1, 1]], [], [], merge)


def _trial(rule: Rule, rows: list, kept: list | None, images: list, videos: list, merge: int) -> dict:
    types = torch.tensor(rows)
    made = {"input_ids": types + 5, "mm_token_type_ids": types, "attention_mask": None if kept is None else torch.tensor(kept)}
    for name, grids in (("image_grid_thw", images), ("video_grid_thw", videos)):
        if name in rule.names:
            made[name] = torch.tensor([(t, h * merge, w * merge) for t, h, w in grids]) if grids else None
    if "second_per_grid_ts" in rule.names and videos:
        made["second_per_grid_ts"] = torch.tensor([0.5, 1.3])
    return made
