"""The samples of a step, laid out for every contestant: the same tokens and pixels, padded left or right, or in filled rows.

A step is a few micro-batches. Each of them is one row that its samples fill to the last token, and is also a padded batch of those
samples, so that every contestant trains on the same tokens and adds its gradients up over the same number of passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks import generator
from benchmarks.presets import Preset
from vlm_fuse import packing

POOL = 16384  # samples drawn, from whose rows those of the step are chosen
BUFFER = 32  # samples that are packed together, as from a stream
PADDING = 0.3  # share of padding to the longest of the batch that is looked for
MAXIMUM_PADDING = 0.7  # share of padding at the length that is taken for the model's maximum


class Shape(Protocol):
    """What samples have to know of a model: `nanovlm.Shape`, `transformers_models.Shape`."""

    preset: Preset

    def run_of(self, rows: int) -> int:
        """The run of placeholders that an image gets which was drawn with so many feature rows."""

    def pixels_of(self, sizes: tuple[int, ...], seed: int) -> dict[str, Tensor]:
        """What the tower takes for images of these feature rows."""

    def pixels_between(self, pixels: dict[str, Tensor], sizes: tuple[int, ...], first: int, end: int) -> dict[str, Tensor]:
        """Of that, the images from `first` up to, not including, `end`."""


class Tokens(NamedTuple):
    """What a data loader hands over, (B, T) each."""

    input_ids: Tensor  # int64
    attention_mask: Tensor  # bool
    labels: Tensor  # int64, -100 outside answers
    samples: Tensor  # int32, number of the sample, -1 at padding

    @property
    def padding(self) -> int:
        """Rows that are no token."""
        return self.attention_mask.numel() - int(self.attention_mask.sum())


class Micro(NamedTuple):
    """One micro-batch in every layout. `sizes` has the feature rows of each image, in reading order."""

    left: Tokens  # padded to the longest sample
    right: Tokens
    maximum: Tokens  # padded on the left to the model's maximum
    packed: Tokens  # one filled row
    sizes: tuple[int, ...]
    samples: tuple[generator.Sample, ...]
    pixels: dict[str, Tensor]  # what the vision tower takes

    @property
    def answers(self) -> int:
        """Tokens that are predicted."""
        return int((self.packed.labels != generator.IGNORE_INDEX).sum())


class Load(NamedTuple):
    """The samples of a step."""

    distribution: str
    micros: tuple[Micro, ...]
    capacity: int  # tokens of a filled row
    maximum: int  # tokens that the model takes at most, to which batches are padded

    @property
    def useful(self) -> int:
        """Tokens of the samples."""
        return sum(int(micro.packed.attention_mask.sum()) for micro in self.micros)

    @property
    def count(self) -> int:
        """Samples of the step."""
        return sum(len(micro.samples) for micro in self.micros)

    @property
    def image_share(self) -> float:
        """Share of feature rows among the tokens of the samples."""
        return sum(sum(micro.sizes) for micro in self.micros) / self.useful

    def padding(self, layout: str) -> float:
        """Share of padding among the rows of a layout: "left", "right", "maximum" or "packed"."""
        batches = [getattr(micro, layout) for micro in self.micros]
        return sum(batch.padding for batch in batches) / sum(batch.attention_mask.numel() for batch in batches)


def drawn(distribution: str, capacity: int, sizes: Callable[[int], int]) -> list[generator.Sample]:
    """Samples no longer than a row.

    Args:
        distribution: key of `generator.DISTRIBUTIONS`.
        capacity: tokens of a row.
        sizes: function from the feature rows that a run is drawn with to those that the model's tower can make.

    Example:
        >>> from benchmarks.throughput import samples
        >>> max(sample.tokens for sample in samples.drawn("cauldron_64", 512, lambda rows: rows)) <= 512
        True
    """
    made = generator.draw(distribution, POOL, seed=0, longest=capacity)
    return [sample._replace(images=tuple(image._replace(runs=tuple(map(sizes, image.runs))) for image in sample.images)) for sample in made]


def filled_rows(samples: list[generator.Sample], capacity: int, count: int, padding: float = PADDING) -> list[list[int]]:
    """Rows that their samples fill to the last token: those whose padding to the longest of the row comes nearest to `padding`.

    Args:
        samples: from which `packing.pack_lengths` makes rows, `BUFFER` at a time: of all at once it puts samples of one length together.
        capacity: tokens of a row.
        count: rows that are wanted; each has an image, and one to two times as many samples as full rows have on average.
        padding: share of padding, were the samples of the row padded to its longest.

    Raises:
        ValueError: fewer rows than that are full.

    Example:
        >>> from benchmarks.throughput import samples
        >>> pool = samples.drawn("cauldron_64", 512, lambda rows: rows)
        >>> [sum(pool[number].tokens for number in row) for row in samples.filled_rows(pool, 512, 2)]
        [512, 512]
    """
    lengths = [sample.tokens for sample in samples]
    full = []
    for start in range(0, len(lengths), BUFFER):
        for row in packing.pack_lengths(lengths[start : start + BUFFER], capacity, seed=0):
            numbers = [start + number for number in row]
            if sum(lengths[number] for number in numbers) == capacity and any(samples[number].images for number in numbers):
                full.append(numbers)
    # of two samples one could be padded by as much, but hardly anything would be left to keep apart
    usual = max(2, round(sum(map(len, full)) / max(len(full), 1)))
    full = [row for row in full if usual <= len(row) <= 2 * usual]
    if len(full) < count:
        raise ValueError(f"{len(full)} rows of {capacity} tokens are full, {count} are wanted; take rows of another length")
    return sorted(full, key=lambda row: abs(1 - capacity / (len(row) * max(lengths[number] for number in row)) - padding))[:count]


def load(distribution: str, shape: Shape, capacity: int, rows: int, device: str) -> Load:
    """The samples of a step.

    Args:
        distribution: key of `generator.DISTRIBUTIONS`.
        shape: of the model that takes them: whose token ids, and which images its tower makes of which pixels.
        capacity: tokens of a row.
        rows: micro-batches of a step.
        device: where the tensors go.

    Raises:
        ValueError: rows that are not filled, images that the tower does not make.

    Example:
        >>> from benchmarks.throughput import nanovlm, samples
        >>> found = samples.load("cauldron_64", nanovlm.SIZES["tiny"], 512, 1, "cpu")
        >>> found.useful, found.padding("packed")
        (512, 0.0)
    """
    pool = drawn(distribution, capacity, shape.run_of)
    chosen = [[pool[number] for number in row] for row in filled_rows(pool, capacity, rows)]
    count = sum(map(len, chosen))
    longest = max(sample.tokens for row in chosen for sample in row)
    maximum = max(longest, round(rows * capacity / (1 - MAXIMUM_PADDING) / count))
    micros = tuple(micro(row, shape, maximum, seed, device) for seed, row in enumerate(chosen))
    return Load(distribution, micros, capacity, maximum)


def micro(samples: list[generator.Sample], shape: Shape, maximum: int, seed: int, device: str) -> Micro:
    """A micro-batch of these samples in every layout."""
    left, right, widest = (
        generator.padded(samples, shape.preset, length=length, seed=seed, side=side) for length, side in ((None, "left"), (None, "right"), (maximum, "left"))
    )
    packed = generator.packed([samples], shape.preset, length=sum(sample.tokens for sample in samples), seed=seed)
    sizes = tuple(run for sample in samples for image in sample.images for run in image.runs)
    pixels = {name: value.to(device) for name, value in shape.pixels_of(sizes, seed).items()}
    return Micro(*(_tokens(batch, device) for batch in (left, right, widest, packed)), sizes, tuple(samples), pixels)


def alone(whole: Micro, shape: Shape, device: str) -> list[Micro]:
    """Each sample of a micro-batch as a batch of itself, its tokens and pixels those that it has there."""
    made, at = [], 0
    for number, sample in enumerate(whole.samples):
        row = whole.left.samples[number] == number
        one = Tokens(*(part[number][row][None] for part in whole.left[:3]), torch.zeros(1, int(row.sum()), dtype=torch.int32, device=device))
        sizes = tuple(run for image in sample.images for run in image.runs)
        pixels = shape.pixels_between(whole.pixels, whole.sizes, at, at + len(sizes))
        made.append(Micro(one, one, one, one, sizes, (sample,), pixels))
        at += len(sizes)
    return made


def _tokens(batch: generator.TokenBatch, device: str) -> Tokens:
    if batch.document_ids is None:
        numbers = np.where(batch.attention_mask, np.arange(len(batch.input_ids))[:, None], -1).astype(np.int32)
    else:
        numbers = batch.document_ids
    return Tokens(*(torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in (batch.input_ids, batch.attention_mask, batch.labels, numbers)))
