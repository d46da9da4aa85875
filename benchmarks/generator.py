"""Batches that look like training data: lengths, images and runs of placeholders, from numpy alone.

A sample is ``text_tokens ~ LogNormal(median, sigma)``, clipped, and some images, each of one or more runs of feature
rows with marks (tile tags, start and end tokens) around every run. Images stand before the text with probability
0.7, else at random places in it. The parameters are a choice, fitted to published means: no source gives quantiles
of lengths.

Example:
    >>> from benchmarks import generator
    >>> from benchmarks.presets import PRESETS
    >>> samples = generator.draw("cauldron_64", 100, seed=0, longest=1024)
    >>> batch = generator.padded(samples[:8], PRESETS["nanovlm-450m"], length=None, seed=0)
    >>> batch.input_ids.shape[0]
    8

Source: means of FineVision (arXiv 2510.17269), The Cauldron, LLaVA 665k, M4-Instruct (2407.07895), Molmo 2 (2601.10611).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from benchmarks.presets import Preset

IMAGES_FIRST = 0.7  # probability that the images of a sample stand before its text
IGNORE_INDEX = -100


class Image(NamedTuple):
    runs: tuple[int, ...]  # feature rows of each run of placeholders
    before: int  # marks before each run
    after: int  # marks after each run

    @property
    def rows(self) -> int:
        return sum(self.runs)

    @property
    def tokens(self) -> int:
        return self.rows + (self.before + self.after) * len(self.runs)


class Sample(NamedTuple):
    text_tokens: int
    images: tuple[Image, ...]

    @property
    def rows(self) -> int:
        return sum(image.rows for image in self.images)

    @property
    def tokens(self) -> int:
        return self.text_tokens + sum(image.tokens for image in self.images)


class Choice(NamedTuple):
    """Runs of an image, drawn from a table: ((probability, runs), ...)."""

    table: tuple[tuple[float, tuple[int, ...]], ...]

    def draw(self, rng: np.random.Generator, count: int) -> list[tuple[int, ...]]:
        index = rng.choice(len(self.table), size=count, p=[probability for probability, _ in self.table])
        return [self.table[i][1] for i in index]


class LogNormal(NamedTuple):
    """Whole numbers from a log-normal distribution, clipped."""

    median: float
    sigma: float
    low: int
    high: int

    def numbers(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return np.clip(np.rint(rng.lognormal(np.log(self.median), self.sigma, count)), self.low, self.high).astype(np.int64)

    def draw(self, rng: np.random.Generator, count: int) -> list[tuple[int, ...]]:
        return [(n,) for n in self.numbers(rng, count).tolist()]


class Frames(NamedTuple):
    """A video: a uniform number of frames, each one run."""

    low: int
    high: int
    rows: int

    def draw(self, rng: np.random.Generator, count: int) -> list[tuple[int, ...]]:
        return [(self.rows,) * n for n in rng.integers(self.low, self.high + 1, count).tolist()]


class Contents(NamedTuple):
    """One composition that a sample may have: how often, how many images, and what an image is."""

    probability: float
    images: int
    image: Choice | LogNormal | Frames | None
    marks: tuple[int, int] = (0, 0)  # before and after each run


class Distribution(NamedTuple):
    text: LogNormal
    contents: tuple[Contents, ...]
    row: int  # length of a packed row, tokens; samples that are longer are dropped
    batch: int  # samples of a padded batch


def _with_images(probabilities: dict[int, float], image, marks: tuple[int, int]) -> tuple[Contents, ...]:
    return tuple(Contents(p, k, image, marks) for k, p in probabilities.items())


_CAULDRON_TEXT = LogNormal(120, 1.0, 8, 4096)
_CAULDRON_IMAGES = {1: 0.92, 2: 0.05, 3: 0.02, 4: 0.01}
_FINEVISION_TEXT = LogNormal(258, 1.2, 8, 16384)
_FINEVISION_IMAGES = {0: 0.35, 1: 0.60, 2: 0.03, 3: 0.01, 4: 0.01}
_TILES = Choice(tuple((p, (64,) * n) for p, n in ((0.05, 5), (0.25, 9), (0.5, 13), (0.2, 17))))
_INTERNVL = Choice(tuple((p, (256 * n,)) for p, n in ((0.1, 1), (0.1, 3), (0.2, 5), (0.3, 7), (0.3, 13))))


def _one(rows: int) -> Choice:
    return Choice(((1.0, (rows,)),))


DISTRIBUTIONS: dict[str, Distribution] = {
    "cauldron_64": Distribution(_CAULDRON_TEXT, _with_images(_CAULDRON_IMAGES, _one(64), (1, 0)), 1024, 8),
    "cauldron_tiles": Distribution(_CAULDRON_TEXT, _with_images(_CAULDRON_IMAGES, _TILES, (1, 0)), 4096, 8),
    "finevision_tiles": Distribution(_FINEVISION_TEXT, _with_images(_FINEVISION_IMAGES, _TILES, (1, 0)), 4096, 8),
    "finevision_native": Distribution(_FINEVISION_TEXT, _with_images(_FINEVISION_IMAGES, LogNormal(300, 0.8, 4, 1280), (1, 1)), 8192, 4),
    "finevision_gemma": Distribution(_FINEVISION_TEXT, _with_images(_FINEVISION_IMAGES, _one(256), (2, 2)), 8192, 8),
    "finevision_internvl": Distribution(_FINEVISION_TEXT, _with_images(_FINEVISION_IMAGES, _INTERNVL, (1, 1)), 16384, 4),
    "llava_665k": Distribution(LogNormal(180, 0.9, 16, 4096), _with_images({0: 0.06, 1: 0.94}, _one(576), (0, 0)), 2048, 16),
    "m4": Distribution(LogNormal(100, 0.8, 8, 4096), _with_images({1: 0.26, 2: 0.24, 4: 0.15, 8: 0.20, 16: 0.15}, _one(256), (1, 1)), 16384, 4),
    # an image: its low-res view and its crops, two runs with a start and an end mark each, 1180 tokens in all
    "molmo2_video": Distribution(
        LogNormal(300, 1.0, 16, 4096),
        (Contents(0.47, 1, Frames(16, 128, 81), (7, 1)), Contents(0.43, 1, Choice(((1.0, (196, 980)),)), (1, 1)), Contents(0.10, 0, None)),
        16384,
        2,
    ),
    # Pixtral: a run for every line of patches, a break mark behind each
    "finevision_lines": Distribution(
        _FINEVISION_TEXT, _with_images(_FINEVISION_IMAGES, Choice(tuple((0.25, (55,) * n) for n in (13, 27, 41, 55))), (0, 1)), 16384, 4
    ),
    # nanoVLM v0.1: 49 rows of image before at most 79 tokens of text, no placeholders in the text
    "legacy_49": Distribution(LogNormal(60, 0.6, 8, 79), _with_images({1: 1.0}, _one(49), (0, 0)), 128, 256),
}


def draw(name: str, count: int, *, seed: int, longest: int | None = None) -> list[Sample]:
    """Draw samples from a distribution.

    Args:
        name: key of `DISTRIBUTIONS`.
        count: number of samples drawn; those longer than `longest` are then dropped.
        seed: same seed, same samples.
        longest: tokens; default the row of the distribution.
    """
    distribution = DISTRIBUTIONS[name]
    longest = distribution.row if longest is None else longest
    rng = np.random.default_rng(seed)
    texts = distribution.text.numbers(rng, count).tolist()
    choice = rng.choice(len(distribution.contents), size=count, p=[c.probability for c in distribution.contents])
    pools = []
    for index, contents in enumerate(distribution.contents):
        needed = int((choice == index).sum()) * contents.images
        pools.append(iter(contents.image.draw(rng, needed) if needed else ()))
    samples = []
    for text, index in zip(texts, choice.tolist()):
        contents = distribution.contents[index]
        images = tuple(Image(next(pools[index]), *contents.marks) for _ in range(contents.images))
        sample = Sample(text, images)
        if sample.tokens <= longest:
            samples.append(sample)
    return samples


class TokenBatch(NamedTuple):
    """A batch as a data loader hands it over; numpy arrays, (B, T) unless said otherwise."""

    input_ids: np.ndarray  # int64
    attention_mask: np.ndarray  # bool
    labels: np.ndarray  # int64, -100 outside answers
    document_ids: np.ndarray | None  # int32, -1 at padding; None in a batch of one sample a row
    image_sizes: np.ndarray  # (images,) int64 feature rows of each image, reading order
    feature_counts: np.ndarray  # (B,) int64 feature rows of each row of the batch

    @property
    def rows(self) -> int:
        """Feature rows in all."""
        return int(self.image_sizes.sum())

    @property
    def shares(self) -> dict[str, float]:
        """Share of image, text and padding among the tokens."""
        size = self.input_ids.size
        kept = int(self.attention_mask.sum())
        return {"image": self.rows / size, "text": (kept - self.rows) / size, "padding": 1 - kept / size}


def _marks(ids: tuple[int, ...], count: int) -> np.ndarray:
    """`count` tokens of marks; token 1 where the preset knows none, the last ones where it knows too many."""
    return np.asarray((((1,) * count + tuple(ids))[-count:]) if count else (), dtype=np.int64)


def tokens(sample: Sample, preset: Preset, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and labels of one sample, each ``(sample.tokens,)`` int64.

    Labels cover the last three quarters of the text (the answers) and nothing of the images. A preset without a
    placeholder gets text alone: its images stand first and have no tokens.
    """
    text = _text(sample.text_tokens, preset, rng)
    answers = text.copy()
    answers[: (sample.text_tokens + 3) // 4] = IGNORE_INDEX
    if preset.image_token_id is None or not sample.images:
        return text, answers
    if rng.random() < IMAGES_FIRST:
        cuts = np.zeros(len(sample.images), dtype=np.int64)
    else:
        cuts = np.sort(rng.integers(0, sample.text_tokens + 1, len(sample.images)))
    before, after = (_marks(ids, count) for ids, count in zip(preset.marks, sample.images[0][1:]))
    ids, labels, start = [], [], 0
    for image, cut in zip(sample.images, cuts.tolist()):
        ids.append(text[start:cut])
        labels.append(answers[start:cut])
        for run in image.runs:
            ids += [before, np.full(run, preset.image_token_id, dtype=np.int64), after]
        labels.append(np.full(image.tokens, IGNORE_INDEX, dtype=np.int64))
        start = cut
    ids.append(text[start:])
    labels.append(answers[start:])
    return np.concatenate(ids), np.concatenate(labels)


def _text(count: int, preset: Preset, rng: np.random.Generator) -> np.ndarray:
    """Text tokens by Zipf's law over the table (rank 1 is the id 3), never a placeholder or a mark."""
    special = {preset.image_token_id, preset.video_token_id, *preset.marks[0], *preset.marks[1]} - {None}
    ordinary = min([preset.vocab_size, *(i for i in special if i > preset.vocab_size // 2)])
    low = 1 + max([2, *(i for i in special if i <= preset.vocab_size // 2)])
    rank = np.exp(rng.random(count) * np.log(ordinary - low)).astype(np.int64)  # density 1 / rank
    return low + np.minimum(rank, ordinary - low) - 1


def padded(samples: list[Sample], preset: Preset, *, length: int | None, seed: int, side: str = "right", pad_token_id: int = 0) -> TokenBatch:
    """One sample a row, padded on one side.

    Args:
        samples: B of them, none longer than `length`.
        preset: whose token ids.
        length: T; None for the longest sample.
        side: where the padding goes, "left" or "right".
    """
    rng = np.random.default_rng(seed)
    made = [tokens(sample, preset, rng) for sample in samples]
    width = max((len(ids) for ids, _ in made), default=0) if length is None else length
    shape = (len(samples), width)
    ids, labels, mask = np.full(shape, pad_token_id), np.full(shape, IGNORE_INDEX), np.zeros(shape, dtype=bool)
    for row, (row_ids, row_labels) in enumerate(made):
        if len(row_ids) > width:
            raise ValueError(f"sample {row} has {len(row_ids)} tokens, more than length {width}")
        place = slice(0, len(row_ids)) if side == "right" else slice(width - len(row_ids), width)
        ids[row, place], labels[row, place], mask[row, place] = row_ids, row_labels, True
    sizes = np.asarray([image.rows for sample in samples for image in sample.images], dtype=np.int64)
    return TokenBatch(ids, mask, labels, None, sizes, np.asarray([s.rows for s in samples], dtype=np.int64))


def packed(rows: list[list[Sample]], preset: Preset, *, length: int, seed: int, pad_token_id: int = 0) -> TokenBatch:
    """Several samples a row, one after another, the tail padded: document d is the d-th sample of its row."""
    rng = np.random.default_rng(seed)
    shape = (len(rows), length)
    ids, labels = np.full(shape, pad_token_id), np.full(shape, IGNORE_INDEX)
    documents = np.full(shape, -1, dtype=np.int32)
    for row, samples in enumerate(rows):
        start = 0
        for document, sample in enumerate(samples):
            row_ids, row_labels = tokens(sample, preset, rng)
            place = slice(start, start + len(row_ids))
            if place.stop > length:
                raise ValueError(f"row {row} has more than {length} tokens")
            ids[row, place], labels[row, place], documents[row, place] = row_ids, row_labels, document
            start = place.stop
    sizes = np.asarray([i.rows for samples in rows for sample in samples for i in sample.images], dtype=np.int64)
    counts = np.asarray([sum(s.rows for s in samples) for samples in rows], dtype=np.int64)
    return TokenBatch(ids, documents >= 0, labels, documents, sizes, counts)


def first_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Indices into `lengths`, row by row: the longest first, each into the first row that still has room.

    A tree over the room left in each row finds that row in O(log rows).
    """
    leaves = 1 << max(1, len(lengths) - 1).bit_length()
    room = [capacity] * (2 * leaves)
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        need, node = lengths[index], 1
        if need > capacity:
            raise ValueError(f"a sample of {need} tokens does not fit into {capacity}")
        while node < leaves:
            node = 2 * node if room[2 * node] >= need else 2 * node + 1
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(index)
        room[node] -= need
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows
