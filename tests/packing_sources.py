"""Datasets whose samples carry their number, to see that none is lost or repeated."""

from collections import Counter

import numpy as np
from torch.utils.data import IterableDataset

from vlm_fuse.packing import SampleSize

CAPACITY = 64


def sizes_of(count: int, seed: int = 0) -> list[SampleSize]:
    rng = np.random.default_rng(seed)
    table = np.stack([rng.integers(1, 40, count), rng.integers(0, 3, count), rng.integers(0, 50, count)], axis=1)
    return [SampleSize(*row) for row in table.tolist()]


class ByIndex:
    """Samples that carry their number."""

    def __init__(self, count: int = 300):
        self.sizes, self.fetched = sizes_of(count), Counter()

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        self.fetched[index] += 1
        return {"number": index, "size": self.sizes[index], "input_ids": [index] * self.sizes[index].tokens}


class Stream(IterableDataset):
    """The same samples, one after another."""

    def __init__(self, count: int = 300):
        self.samples = ByIndex(count)

    def __iter__(self):
        return (self.samples[index] for index in range(len(self.samples)))


class Resumable(Stream):
    """One that knows where it stands, as Hugging Face's IterableDataset does."""

    def __init__(self, count: int = 300):
        super().__init__(count)
        self.position = self.opened_at = 0

    def __iter__(self):
        self.opened_at = self.position
        for index in range(self.position, len(self.samples)):
            self.position = index + 1
            yield self.samples[index]
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Sticky(Resumable):
    """One that goes on from the state that was loaded with every ``iter``, as Hugging Face's IterableDataset does within an epoch."""

    def __init__(self, count: int = 300):
        super().__init__(count)
        self.start, self.position = 0, None

    def __iter__(self):
        for index in range(self.start, len(self.samples)):
            self.position = index
            yield self.samples[index]

    def state_dict(self):
        return None if self.position is None else {"position": self.position + 1}

    def load_state_dict(self, state):
        self.start = state["position"] if state else 0


SOURCES = {"by_index": ByIndex, "stream": Stream, "resumable": Resumable}


def size_of(sample) -> SampleSize:
    return sample["size"]


def numbers(rows) -> list[list[int]]:
    """The numbers of the samples of each row."""
    return [[sample["number"] for sample in row] for row in rows]
