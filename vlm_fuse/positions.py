"""Positions of tokens that do not simply count from the start of their document."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, position_ops
from .backend import name_from
from .ops import mode_of


def mrope_position_ids(
    mm_token_type_ids: Tensor,
    *,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    second_per_grid_ts: Tensor | list[float] | None = None,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    spatial_merge_size: int = 2,
    tokens_per_second: float = 1,
    split_video_frames: bool = False,
    validate: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Positions in time, height and width (M-RoPE) of Qwen2-VL and the families after it, padded or packed.

    Text counts on in all three rows; an image of t x h x w placeholders that begins at p has p + i, p + j, p + k, and what follows
    it p + max(h, w). Every image is told by its grid: neighbours without a token between are kept apart.

    Args:
        mm_token_type_ids: ``(B, L)`` ints or bools: 0 text, 1 image, 2 video.
        image_grid_thw: ``(images, 3)`` ints in reading order over the batch, t, h and w before the merge. None or no rows: no images.
        video_grid_thw: ``(videos, 3)``, the same for videos.
        second_per_grid_ts: ``(videos,)`` seconds between the frames of each video, a tensor or a list (Qwen2.5-VL); None: 1.
        attention_mask: ``(B, L)``, nonzero = token; padding on either side. Padding has position 0.
        document_ids: ``(B, L)`` ints, a document a run of one id, below 0 = padding: positions begin anew in every document, and there
            are four rows.
        spatial_merge_size: patches that are merged into one placeholder, along each side.
        tokens_per_second: positions a second of video (Qwen2.5-VL's ``vision_config``).
        split_video_frames: a video's frames stand apart in the tokens, each its own image (Qwen3-VL, Qwen3.5, GLM-4V).
        validate: "auto" ("sync" on a CPU, "async" on a GPU), "sync", "async" or "off".
        backend: "auto", or the name of one.

    Returns:
        tuple: ``position_ids`` int64 (3, B, L), and ``rope_deltas`` int64 (B, 1): the largest position of the sample, + 1, less its
        tokens. With document_ids ``position_ids`` are (4, B, L), the first row the number of earlier tokens of the document, and
        ``rope_deltas`` those of the row's last document; the padding at the end of a row counts 0, 1, 2, ... in all four rows: one more
        document of text for transformers, not one a token.

    Raises:
        ValueError: placeholders and grids do not agree, or an image is cut (by truncation, a document boundary, padding inside): names
            the sample, the counts and the remedy. With "async" `raise_errors` raises it.
        TypeError: a dtype that is not taken.

    Every placeholder takes the next place in the grids, also one under attention_mask 0, as in `merge`.

    Example:
        >>> import torch, vlm_fuse
        >>> types = torch.tensor([[0, 1, 1, 1, 1, 0, 0]])
        >>> position_ids, rope_deltas = vlm_fuse.mrope_position_ids(types, image_grid_thw=torch.tensor([[1, 4, 4]]))
        >>> position_ids[:, 0].tolist()
        [[0, 1, 1, 1, 1, 3, 4], [0, 1, 1, 2, 2, 3, 4], [0, 1, 2, 1, 2, 3, 4]]
        >>> rope_deltas.tolist()
        [[-2]]

    Source: Qwen2-VL, arXiv 2409.12191, section 2.1; ``get_rope_index`` of transformers' models.
    """
    checks.choice("validate", validate, checks.VALIDATE)
    videos = checks.mrope_tensors(mm_token_type_ids, image_grid_thw, video_grid_thw, attention_mask, document_ids)
    merge = checks.merge_size(spatial_merge_size)
    intervals, interval = _intervals(second_per_grid_ts, checks.token_rate(tokens_per_second), videos, split_video_frames)
    device = mm_token_type_ids.device
    if attention_mask is not None and attention_mask.dtype not in checks.MASK_DTYPES:
        attention_mask = attention_mask != 0
    grids = (None if grid is None else grid.to(device, torch.int64).contiguous() for grid in (image_grid_thw, video_grid_thw))
    if mm_token_type_ids.dtype == torch.uint8:
        mm_token_type_ids = mm_token_type_ids.short()  # bytes have a sign to the kernels
    beside = (None if value is None else value.contiguous() for value in (attention_mask, document_ids))
    return position_ops.mrope_position_ids(
        mm_token_type_ids.contiguous(),
        *grids,
        None if intervals is None else intervals.to(device).contiguous(),
        *beside,
        merge,
        interval,
        bool(split_video_frames),
        mode_of(validate, mm_token_type_ids),
        name_from(backend),
    )


def _intervals(second_per_grid_ts, tokens_per_second, videos: int, split: bool) -> tuple[Tensor | None, int]:
    """Positions between the frames of each video, in the dtype in which transformers multiplies; None: the int, for all."""
    if second_per_grid_ts is None:
        if isinstance(tokens_per_second, int):
            return None, tokens_per_second
        return torch.full((videos,), tokens_per_second, dtype=torch.get_default_dtype(), device="cpu"), 0
    if split:
        raise ValueError("second_per_grid_ts: has no effect on frames that stand apart (split_video_frames=True); leave out one of the two")
    if not isinstance(second_per_grid_ts, Tensor):
        second_per_grid_ts = checks.seconds(second_per_grid_ts, videos)
        products = [tokens_per_second * seconds for seconds in second_per_grid_ts]
        whole = all(isinstance(product, int) for product in products)
        # a Python float times a tensor of ints is of the default dtype
        return torch.tensor(products, dtype=torch.int64 if whole else torch.get_default_dtype(), device="cpu"), 0
    checks.seconds(second_per_grid_ts, videos)
    return tokens_per_second * (second_per_grid_ts if second_per_grid_ts.dtype.is_floating_point else second_per_grid_ts.long()), 0


def after_parents(position_ids: Tensor, document_ids: Tensor, parent_ids: Tensor) -> Tensor:
    """Positions that go on where the parent document ends (branches after a shared prompt).

    Args:
        position_ids: ``(G, W)`` int64, counted from the start of each document.
        document_ids: ``(G, W)`` int32, -1 = padding.
        parent_ids: ``(documents,)`` ints by document id, -1 = none; the parent stands earlier in the same row.

    Returns:
        Tensor: ``(G, W)`` int64. No host synchronisation.
    """
    count = len(parent_ids)
    if not count or not document_ids.numel():
        return position_ids
    own = document_ids.long()
    inside = (own >= 0) & (own < count)
    slot = torch.where(inside, own, count)  # one more place, for rows without a parent entry
    length = torch.zeros(own.shape[0], count + 1, dtype=torch.int64, device=own.device)
    length.scatter_add_(1, slot, inside.long())
    length[:, count] = 0
    parents = torch.cat([parent_ids.long(), parent_ids.new_full((1,), -1)])
    above = torch.where((parents >= 0) & (parents < count), parents, count)
    # the sum of the lengths up the chain, which doubles with each step
    offset = length[:, above]
    for _ in range(count.bit_length()):
        offset = offset + torch.where(above == count, 0, offset[:, above])
        above = above[above]
    return position_ids + torch.where(inside, offset.gather(1, slot), 0)
