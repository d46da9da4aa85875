"""One sample as a dataset gives it, read into one form: tokens, labels, and what the vision tower takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..batch import IGNORE_INDEX
from ..token_plan import shifted_rows
from .cutting import cut
from .processor_outputs import IMAGE, LOSS_MASKS, TOKEN_KEYS, VIDEO, grid_of, has, is_pictures, of_tower, tiles_of_images, writable
from .splitting import image_spans

#: made anew for the batch.
_REPLACED = ("position_ids", "rope_deltas", "cu_seqlens", "attention_mask", "input_ids", "labels", *LOSS_MASKS)


class SampleSize(NamedTuple):
    """What a sample takes of a row's budgets."""

    tokens: int
    images: int = 0
    patches: int = 0


class Read(NamedTuple):
    """A sample in one form."""

    input_ids: Tensor  # (T,) int64, no padding
    labels: Tensor | None  # (T,) int64, as the sample has them: shifted or not
    by_token: dict[str, Tensor]  # (T,) int64 each
    vision: dict[str, object]
    rest: dict[str, object]
    image_sizes: list[int] | None  # placeholders of each image in reading order; None: not known
    video_sizes: list[int] | None
    named: str  # in errors


@dataclass(frozen=True)
class SampleFormat:
    """What the samples of a dataset look like: which ids are placeholders, and how many rows an image becomes.

    A sample is a dict, as a Hugging Face processor gives it for one conversation (with or without ``return_tensors``), or as
    nanoVLM's dataset does: ``input_ids``, ``labels`` or a loss mask, ``attention_mask`` (tokens under 0 are left out),
    ``pixel_values`` or ``images`` of any count, ``image_grid_thw``, ``video_grid_thw``, ``mm_token_type_ids``, and more.

    Attributes:
        image_token_id, video_token_id: the placeholders' ids. None: a dataset without.
        rows_per_image: feature rows of an image (of each of its tiles) where they are all alike; or a function that gives the
            list of a sample's rows, image by image. Default: from ``image_grid_thw`` and ``video_grid_thw``; without those, unknown.
        spatial_merge_size: patches that become one row, along one side (Qwen-VL, GLM-4V).
        frames_apart: each frame of a video is a run of placeholders of its own (Qwen3-VL, GLM-4V).
        shifted_labels: ``labels[i]`` is the target of token i (nanoVLM), not token i itself (Hugging Face).
        marks: ids that belong to the image next to them, for `cut`.

    Example:
        >>> from vlm_fuse.packing import SampleFormat
        >>> form = SampleFormat(image_token_id=9, rows_per_image=2)
        >>> form.size({"input_ids": [1, 9, 9, 5], "images": [object()]})
        SampleSize(tokens=4, images=1, patches=2)
    """

    image_token_id: int | None = None
    video_token_id: int | None = None
    rows_per_image: int | Callable[[Mapping], Sequence[int]] | None = None
    spatial_merge_size: int = 2
    frames_apart: bool = False
    shifted_labels: bool = False
    marks: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        # numpy's integers are what tokenizers and configs give at times
        for name in ("image_token_id", "video_token_id", "spatial_merge_size"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, index(value))

    def read(self, sample: Mapping, named: str = "the sample") -> Read:
        """The sample in one form, its placeholders and images compared.

        Raises:
            ValueError: several samples instead of one; parts that differ in length; placeholders and images that do not agree
                (names the sample, both counts and the remedy).
            TypeError: no dict, no ids, ids that are not whole numbers.
        """
        if not isinstance(sample, Mapping):
            raise TypeError(f"{named}: expected a dict with input_ids, got {type(sample).__name__}")
        if "input_ids" not in sample:
            raise TypeError(f"{named}: has no input_ids, only {', '.join(map(str, sample)) or 'nothing'}")
        input_ids = _by_token(named, "input_ids", sample["input_ids"], None)
        length = len(input_ids)
        by_token = {name: _by_token(named, name, sample[name], length) for name in TOKEN_KEYS if sample.get(name) is not None}
        labels = self._labels(named, sample, input_ids)
        if sample.get("attention_mask") is not None:
            kept = _by_token(named, "attention_mask", sample["attention_mask"], length) != 0
            if not bool(kept.all()):
                input_ids, labels, by_token = self._without_padding(named, kept, input_ids, labels, by_token)
        vision = {name: value for name, value in sample.items() if of_tower(str(name), value)}
        rest = {name: value for name, value in sample.items() if name not in vision and name not in by_token and name not in _REPLACED and value is not None}
        images, videos = self._sizes(sample)
        self._check(named, input_ids, by_token.get("mm_token_type_ids"), images, videos, vision)
        return Read(input_ids, labels, by_token, vision, rest, images, videos, named)

    def size(self, sample: Mapping, named: str = "the sample") -> SampleSize:
        """Tokens, images and vision patches of a sample: what it takes of a row's budgets.

        Patches are those of the grids where there are grids, else the rows that the images become.
        """
        read = self.read(sample, named)
        images = len(tiles_of_images(read.vision) if read.image_sizes is None else read.image_sizes)
        videos = len(read.vision.get("pixel_values_videos", ()) if read.video_sizes is None else read.video_sizes)
        grids = [grid_of(sample[name]).prod(axis=1).sum() for name in ("image_grid_thw", "video_grid_thw") if has(sample, name)]
        return SampleSize(len(read.input_ids), images + videos, int(sum(grids)) or int((self.kinds_of(read) > 0).sum()))

    def spans(self, sample: Mapping, named: str = "the sample") -> list[tuple[int, int]]:
        """``(start, stop)`` tokens of each image and video, with the marks beside it."""
        return self.spans_of(self.read(sample, named))

    def spans_of(self, read: Read) -> list[tuple[int, int]]:
        """`spans` of a sample that is read already."""
        tokens = [token for token in (self.image_token_id, self.video_token_id) if token is not None]
        if not tokens:
            return []
        sizes = None
        if read.image_sizes is not None and read.video_sizes is not None:
            kinds = self.kinds_of(read)
            sizes = _in_reading_order(kinds[kinds > 0].numpy(), {IMAGE: read.image_sizes, VIDEO: read.video_sizes})
        return image_spans(read.input_ids, tokens, image_sizes=sizes, marks=self.marks)

    def kinds_of(self, read: Read) -> Tensor:
        """``(T,)`` int64: 0 text, 1 a placeholder of an image, 2 of a video."""
        types = read.by_token.get("mm_token_type_ids")
        if types is not None and self.image_token_id == self.video_token_id:
            return types.masked_fill(read.input_ids != self.image_token_id, 0)
        return self.kinds_by_id(read.input_ids)

    def kinds_by_id(self, input_ids: Tensor) -> Tensor:
        """The same of any ids, where each kind has an id of its own."""
        kinds = torch.zeros_like(input_ids)
        for kind, token in ((IMAGE, self.image_token_id), (VIDEO, self.video_token_id)):
            if token is not None:
                kinds.masked_fill_(input_ids == token, kind)
        return kinds

    def runs_of_videos(self, read: Read) -> list[int] | None:
        """Placeholders that stand together: of each video, or of each frame where frames stand apart."""
        if read.video_sizes is None or not self.frames_apart or not read.video_sizes:
            return read.video_sizes
        frames = grid_of(read.vision["video_grid_thw"])[:, 0]
        return np.repeat(np.asarray(read.video_sizes) // np.maximum(frames, 1), frames).tolist()

    def cut(self, sample: Mapping, start: int, stop: int, named: str = "the sample") -> dict:
        """Tokens `start` to `stop` of a sample with the images that stand there, as a sample of the same form.

        Raises:
            ValueError: an image that would be cut through; vision inputs whose part of each image is not known.

        Example:
            >>> import torch
            >>> from vlm_fuse.packing import SampleFormat
            >>> form = SampleFormat(image_token_id=9, rows_per_image=2)
            >>> piece = form.cut({"input_ids": [9, 9, 5, 9, 9, 6], "pixel_values": torch.arange(2).view(2, 1, 1, 1)}, 3, 6)
            >>> piece["input_ids"].tolist(), piece["pixel_values"].flatten().tolist()
            ([9, 9, 6], [1])
        """
        return cut(self, sample, start, stop, named)

    # --- parts of read

    def _labels(self, named: str, sample: Mapping, input_ids: Tensor) -> Tensor | None:
        if sample.get("labels") is not None:
            return _by_token(named, "labels", sample["labels"], len(input_ids))
        for name in LOSS_MASKS:
            if sample.get(name) is not None:
                counted = _by_token(named, name, sample[name], len(input_ids)) != 0
                labels = input_ids.masked_fill(~counted, IGNORE_INDEX)
                return shifted_rows(labels[None], IGNORE_INDEX)[0] if self.shifted_labels else labels
        return None

    def _without_padding(self, named: str, kept: Tensor, input_ids: Tensor, labels: Tensor | None, by_token: dict):
        for kind, token in (("image", self.image_token_id), ("video", self.video_token_id)):
            if token is not None and bool((input_ids[~kept] == token).any()):
                raise ValueError(f"{named}: {kind} placeholders under attention_mask 0; leave out the tokens and the {kind}, or set the mask to 1 there")
        if labels is not None and self.shifted_labels:
            # the target of the last token before padding would be padding
            labels = labels.masked_fill(kept & ~torch.cat([kept[1:], kept.new_zeros(1)]), IGNORE_INDEX)
        by_token = {name: values[kept] for name, values in by_token.items()}
        return input_ids[kept], None if labels is None else labels[kept], by_token

    def _sizes(self, sample: Mapping) -> tuple[list[int] | None, list[int] | None]:
        """Placeholders of each image and of each video, in reading order; None: there are some, of unknown sizes."""
        images, videos = self._grid_rows(sample, "image_grid_thw"), self._grid_rows(sample, "video_grid_thw")
        if callable(self.rows_per_image):
            images = [int(rows) for rows in self.rows_per_image(sample)]
        elif images is None and self.rows_per_image is not None:
            images = [self.rows_per_image * count for count in tiles_of_images(sample)]
        if images is None and not any(has(sample, name) for name in sample if is_pictures(str(name))):
            images = []
        if videos is None and not any(has(sample, name) for name in ("pixel_values_videos", "video_embeds")):
            videos = []
        return images, videos

    def _grid_rows(self, sample: Mapping, name: str) -> list[int] | None:
        if not has(sample, name):
            return None
        return (grid_of(sample[name]).prod(axis=1) // self.spatial_merge_size**2).tolist()

    def _check(self, named: str, input_ids: Tensor, types: Tensor | None, images: list[int] | None, videos: list[int] | None, vision: dict) -> None:
        for name, grid_name in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
            if grid_name in vision and getattr(vision.get(name), "ndim", 0) == 2:
                patches = int(grid_of(vision[grid_name]).prod(axis=1).sum())
                if len(vision[name]) != patches:
                    raise ValueError(f"{named}: {name} has {len(vision[name])} patches, {grid_name} {patches}; take both from one call of the processor")
        counts = [0 if token is None else int((input_ids == token).sum()) for token in (self.image_token_id, self.video_token_id)]
        if self.image_token_id == self.video_token_id and counts[0]:
            if types is None:
                raise ValueError(f"{named}: images and videos have the same placeholder id; give mm_token_type_ids to tell them apart")
            counts = [int((types[input_ids == self.image_token_id] == kind).sum()) for kind in (IMAGE, VIDEO)]
        for kind, token, count, sizes in zip(("image", "video"), (self.image_token_id, self.video_token_id), counts, (images, videos)):
            if token is None:
                if sizes:
                    raise ValueError(f"{named}: has {len(sizes)} {kind}s, but {kind}_token_id is not known; give it to the collator")
            elif sizes is None:
                if not count:
                    raise ValueError(f"{named}: has {kind}s, but no placeholder {token}; the tokenizer cut them off, or the {kind}s belong to another sample")
            elif not sizes and count:
                raise ValueError(f"{named}: {count} placeholders {token} of {kind}s, but no {kind}s; give them with the sample, or leave the placeholders out")
            elif sum(sizes) != count:
                shown = f" ({', '.join(map(str, sizes[:6]))}{', ...' if len(sizes) > 6 else ''})" if len(sizes) > 1 else ""
                raise ValueError(
                    f"{named}: {count} placeholders {token} of {kind}s, but {len(sizes)} {kind}{'s become' if len(sizes) > 1 else ' becomes'} {sum(sizes)} rows{shown}; "
                    "was the text cut off within one, or do the placeholders come from other sizes than the processor's?"
                )


def _by_token(named: str, name: str, value, length: int | None) -> Tensor:
    """``(T,)`` int64 of one sample, from a list, an array or a tensor, with or without a batch of one around it."""
    try:
        found = value if isinstance(value, Tensor) else writable(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{named}: {name} is no list of whole numbers: {error}") from None
    if found.dim() == 2 and found.shape[0] == 1:
        found = found[0]
    if found.dim() != 1:
        raise ValueError(f"{named}: {name} has shape {tuple(found.shape)}; the collator takes one sample at a time, (T,) or (1, T)")
    if not found.numel():
        found = found.long()
    if found.dtype.is_floating_point or found.dtype.is_complex:
        raise TypeError(f"{named}: {name} is {found.dtype}, expected whole numbers")
    if length is not None and len(found) != length:
        raise ValueError(f"{named}: {name} has {len(found)} entries, input_ids {length}; they go together token by token")
    return found.to(torch.int64)


def _in_reading_order(kinds: np.ndarray, sizes: dict[int, list[int]]) -> list[int]:
    """Sizes of images and videos as they stand in the text, from the kind of each placeholder and the sizes of each kind."""
    begins: list[tuple[int, int]] = []
    for kind, own in sizes.items():
        whole = np.asarray([size for size in own if size], dtype=np.int64)
        begins += zip(np.flatnonzero(kinds == kind)[np.cumsum(whole) - whole].tolist(), whole.tolist())
    begins.sort()
    ordered = [size for _, size in begins]
    if [begin for begin, _ in begins] != (np.cumsum(ordered) - ordered).tolist():
        raise ValueError("image_token_id, video_token_id: placeholders of an image and of a video stand within one another; the sizes are not those of the text")
    return ordered
