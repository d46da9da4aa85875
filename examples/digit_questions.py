"""Questions of varying length about handwritten digits, which ship with scikit-learn."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PATCH = 4  # pixels a side; a digit has 8 x 8
ROWS = 4  # feature rows of an image: 2 x 2 patches
NUMBERS = "zero one two three four five six seven eight nine".split()
FILLER = "please look at this picture again with care and then tell me in one word because my eyes are tired today so".split()
SPECIAL = ("<pad>", "<image>", "<answer>")
VOCABULARY = [*SPECIAL, *NUMBERS, "yes", "no", *FILLER, *"what is the digit even larger than ?".split()]
PAD, IMAGE, ANSWER = range(3)
IDS = {word: number for number, word in enumerate(VOCABULARY)}
LONGEST = 48  # words of a question with its filler and answer


class Sample(NamedTuple):
    """An image and a question about it; the last token is the answer, and the only one that is learnt."""

    image: Tensor  # (ROWS, PATCH * PATCH) float32
    text: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return ROWS + len(self.text)


def load_digits(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """((n, 8, 8) float32 in 0..1, (n,) labels): the first 1400 to learn from, the other 397 held out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    part = slice(1400, None) if held_out else slice(0, 1400)
    return (found.images[part] / 16).astype(np.float32), found.target[part]


def draw(count: int, seed: int, *, held_out: bool = False) -> list[Sample]:
    """Samples under a seed. Half of the questions are bare, half are wrapped in up to 36 words that mean nothing."""
    rng = np.random.default_rng([seed, held_out])
    pixels, labels = load_digits(held_out)
    samples = []
    for number in rng.integers(0, len(labels), count):
        # 2 x 2 patches of 4 x 4 pixels, line by line
        patches = pixels[number].reshape(2, PATCH, 2, PATCH).transpose(0, 2, 1, 3).reshape(ROWS, PATCH * PATCH)
        question, answer = _question(rng, int(labels[number]))
        before = rng.choice(FILLER, int(min(36, rng.exponential(12)))) if rng.random() < 0.5 else ()
        text = [*before, *question, "?", "<answer>", answer]
        samples.append(Sample(torch.from_numpy(np.ascontiguousarray(patches)), tuple(IDS[word] for word in text)))
    return samples


def _question(rng: np.random.Generator, digit: int) -> tuple[list[str], str]:
    kind = int(rng.integers(3))
    if kind == 0:
        return ["what", "is", "the", "digit"], NUMBERS[digit]
    if kind == 1:
        return ["is", "the", "digit", "even"], "yes" if digit % 2 == 0 else "no"
    bound = int(rng.integers(1, 9))
    return ["is", "the", "digit", "larger", "than", NUMBERS[bound]], "yes" if digit > bound else "no"


def about_numbers(rng: np.random.Generator) -> list[str]:
    """The words of a question that needs no picture, with its answer."""
    one, other = rng.integers(0, 10, 2)
    before = rng.choice(FILLER, int(min(36, rng.exponential(12))))
    return [*before, "is", NUMBERS[one], "larger", "than", NUMBERS[other], "?", "<answer>", "yes" if one > other else "no"]


def guessing(learnt: list[Sample], asked: list[Sample]) -> float:
    """Share of right answers of one who sees no image and gives each question the answer that it mostly had: what has to be beaten."""
    seen: dict[tuple[int, ...], Counter] = defaultdict(Counter)
    for sample in learnt:
        seen[_bare(sample)][sample.text[-1]] += 1
    mostly = {question: answers.most_common(1)[0][0] for question, answers in seen.items()}
    return sum(mostly.get(_bare(sample)) == sample.text[-1] for sample in asked) / len(asked)


def _bare(sample: Sample) -> tuple[int, ...]:
    """The question without its filler, none of whose words is "is"."""
    return sample.text[sample.text.index(IDS["is"]) : -1]
