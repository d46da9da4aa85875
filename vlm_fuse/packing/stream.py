"""`PackedStream`: rows of samples from a dataset of which only a buffer is ever looked at."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .. import checks
from .lengths import OVERLONG, pack_lengths
from .ranks import own_rank
from .samples import SampleFormat, SampleSize
from .splitting import split


class Waiting(NamedTuple):
    """A sample in the buffer: where it came from, what it takes, and the sample itself where it cannot be fetched again."""

    number: int  # of the sample in the source, in the order in which it is read
    start: int  # first token of a piece, and the token after its last; the whole sample where stop is -1
    stop: int
    size: SampleSize
    sample: object


class PackedStream(IterableDataset):
    """Rows packed from a stream of samples, for ``DataLoader(stream, batch_size=..., collate_fn=PackingCollator(...))``.

    A buffer is filled and packed by `pack_lengths`; the fuller half of its rows goes out, and the row with the sample that has
    waited longest; the other samples wait for better company. Given the seed, the rank and the number of workers, rows are always
    the same. ``iter(stream)`` has ``state_dict`` and ``load_state_dict``, which torchdata's StatefulDataLoader calls: no
    sample is lost or repeated, wherever the program was stopped.

    Args:
        source: of samples: a dataset by index (``__getitem__`` and ``__len__``; nothing but numbers is then kept in the buffer), or
            any iterable that begins anew with each ``iter``. One with ``state_dict`` and ``load_state_dict`` (Hugging Face's
            IterableDataset) is resumed by these, and the buffered samples become part of the state; another is read again from
            its beginning.
        capacity: tokens of a row.
        sample_format: reads sizes and cuts samples; or a function that gives a `SampleSize`, for sources of anything else.
            Default: samples without images.
        sizes: of a source by index, the sizes of all samples (a `SampleSize` each, or tokens alone), so that none is fetched before its row
            goes out.
        transform: applied to the samples of a row that goes out, such as a processor that decodes images.
        buffer_size: samples.
        max_images, max_patches, max_documents, multiple_of: budgets of a row, as of `pack_lengths`.
        overlong: "error", "skip" (the first is told by a warning, `skipped` of the iterator counts them), or "split" (needs a SampleFormat).
        seed: of the order of the rows, and of the source where `shuffle` is set.
        shuffle: read a source by index in random order, another in each epoch.
        repeat: begin anew when the source ends, so that every rank has rows as long as it asks; else ranks may end at different
            steps. (`pack_lengths` and `RankSampler` give each rank the same number, where lengths are known.)
        rank, world_size: default those of torch.distributed, else of torchrun. Each rank and worker takes every n-th sample.
        sharded: the source already gives each rank and worker its own samples, as Hugging Face's IterableDataset does for workers
            (and for ranks after ``split_dataset_by_node``).

    Raises (while iterated):
        ValueError: a sample longer than a row; names its number in the source.

    Example:
        >>> from vlm_fuse.packing import PackedStream, SampleSize
        >>> stream = PackedStream(["aaa", "bb", "cccc", "d", "ee"], 5, sample_format=lambda word: SampleSize(len(word)), seed=None)
        >>> list(stream)
        [['cccc', 'd'], ['aaa', 'bb'], ['ee']]
    """

    def __init__(
        self,
        source: Iterable,
        capacity: int,
        *,
        sample_format: SampleFormat | Callable[[object], SampleSize] | None = None,
        sizes: Sequence[SampleSize] | None = None,
        transform: Callable | None = None,
        buffer_size: int = 1024,
        max_images: int | None = None,
        max_patches: int | None = None,
        max_documents: int | None = None,
        multiple_of: int = 1,
        overlong: str = "error",
        seed: int | None = 0,
        shuffle: bool = False,
        repeat: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        sharded: bool = False,
    ):
        sample_format = SampleFormat() if sample_format is None else sample_format
        self.source, self.capacity, self.sample_format = source, capacity, sample_format
        self.sizes, self.transform, self.buffer_size = sizes, transform, buffer_size
        self.budgets = {"max_images": max_images, "max_patches": max_patches, "max_documents": max_documents, "multiple_of": multiple_of}
        self.overlong, self.seed, self.shuffle, self.repeat, self.sharded = overlong, seed, shuffle, repeat, sharded
        self.rank, self.world_size = own_rank(rank, world_size)
        self.epoch = 0
        # torch's IterableDataset has a __getitem__ that only raises
        self.by_index = hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, IterableDataset)
        self.resumable = not self.by_index and hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
        self.beginning = copy.deepcopy(source.state_dict()) if self.resumable else None
        self.moved = False  # another state was loaded into the source
        checks.choice("overlong", overlong, OVERLONG)
        if overlong == "split" and not isinstance(sample_format, SampleFormat):
            raise ValueError("overlong: 'split' needs a SampleFormat, which knows where images stand; split before, or choose 'skip'")
        if buffer_size < 1:
            raise ValueError(f"buffer_size: expected at least 1 sample, got {buffer_size}")
        if (shuffle or sizes is not None) and not self.by_index:
            raise ValueError("shuffle, sizes: need a source by index, with __getitem__ and __len__")
        if shuffle and seed is None:
            raise ValueError("seed: None and shuffle=True contradict each other; give a seed")
        if sizes is not None and len(sizes) != len(source):
            raise ValueError(f"sizes: {len(sizes)} for {len(source)} samples")
        pack_lengths([], capacity, image_counts=[], patch_counts=[], **self.budgets)  # refuses wrong budgets now

    def set_epoch(self, epoch: int) -> None:
        """The epoch that ``iter`` begins with: another order of a shuffled source. Of workers that persist it is not seen."""
        self.epoch = epoch

    def __iter__(self) -> RowIterator:
        return RowIterator(self)


class RowIterator(Iterator):
    """The rows of a `PackedStream` for this rank and worker, each a list of samples.

    Attributes:
        skipped: samples left out so far because they are longer than a row.
    """

    def __init__(self, stream: PackedStream):
        self.stream, self.epoch = stream, stream.epoch
        worker = get_worker_info()
        workers, worker_id = (1, 0) if worker is None else (worker.num_workers, worker.id)
        if workers > 1 and not stream.sharded and not stream.by_index and type(stream.source).__module__.partition(".")[0] == "datasets":
            raise ValueError(
                "sharded: Hugging Face's IterableDataset gives each worker its own shards already; set sharded=True, and share it among ranks with "
                "datasets.distributed.split_dataset_by_node"
            )
        self.shards, self.shard = (1, 0) if stream.sharded else (stream.world_size * workers, stream.rank * workers + worker_id)
        self.skipped = self.packings = 0
        self._read, self._ended = 0, False  # samples taken from the source in this epoch, of all shards
        self._fitted = 0  # that came into the buffer in this epoch
        self._buffer: list[Waiting] = []
        self._ready: list[list[Waiting]] = []  # rows that are packed and not out yet, the next one last
        self._open()

    # --- the source

    def _open(self) -> None:
        """The source from sample `_read` on."""
        stream = self.stream
        if stream.by_index:
            self._order = None
            if stream.shuffle:
                self._order = np.random.default_rng([stream.seed, self.epoch]).permutation(len(stream.source))
            return
        if stream.moved:
            # Hugging Face's goes on from the state that was loaded with each iter, not with the next one alone
            stream.source.load_state_dict(copy.deepcopy(stream.beginning))
            stream.moved = False
        self._samples = iter(stream.source)
        for _ in range(self._read):
            next(self._samples)

    def _next(self) -> Waiting | None:
        """The next sample of this shard, or None at the end of the source."""
        stream = self.stream
        if stream.by_index:
            self._read += (self.shard - self._read) % self.shards
            if self._read >= len(stream.source):
                return None
            number = self._read if self._order is None else int(self._order[self._read])
            self._read += 1
            sample = stream.source[number] if stream.sizes is None else None
            return self._waiting(number, sample, None if stream.sizes is None else stream.sizes[number])
        for sample in self._samples:
            self._read += 1
            if (self._read - 1) % self.shards == self.shard:
                return self._waiting(self._read - 1, sample, None)
        return None

    def _waiting(self, number: int, sample, size: SampleSize | None) -> Waiting:
        form = self.stream.sample_format
        if size is None and sample is None:
            size = SampleSize(0)  # nothing, which a dataset gives where it has filtered a sample out
        if size is None:
            size = form.size(sample, f"sample {number} of the source") if isinstance(form, SampleFormat) else form(sample)
        size = SampleSize(*map(int, size)) if np.ndim(size) else SampleSize(int(size))
        return Waiting(number, 0, -1, size, None if self.stream.by_index else sample)

    def _fill(self) -> None:
        while len(self._buffer) < self.stream.buffer_size and not self._ended:
            found = self._next()
            if found is not None:
                fitting = self._fitting(found)
                self._buffer += fitting
                self._fitted += len(fitting)
                continue
            # without one that fits it would go on for ever
            if not self.stream.repeat or not self._fitted:
                self._ended = True
                continue
            self.epoch, self._read, self._fitted = self.epoch + 1, 0, 0
            self._open()

    def _fitting(self, found: Waiting) -> list[Waiting]:
        """The sample, or nothing, or its pieces."""
        stream = self.stream
        if found.size == SampleSize(0):
            return []
        if self._fits(found.size):
            return [found]
        named = f"sample {found.number} of the source"
        if stream.overlong == "skip":
            if not self.skipped:
                warnings.warn(f"PackedStream: {named} fits into no row and is left out, the first; `skipped` of the iterator counts them", stacklevel=2)
            self.skipped += 1
            return []
        if stream.overlong == "error":
            self._refuse(found.size, named)
        form, pieces = stream.sample_format, []
        sample = stream.source[found.number] if stream.by_index else found.sample
        for start, stop in split(found.size.tokens, form.spans(sample, named), stream.capacity, named=named):
            size = form.size(form.cut(sample, start, stop, named))
            if not self._fits(size):
                self._refuse(size, f"tokens {start} to {stop} of {named}")
            pieces.append(Waiting(found.number, start, stop, size, found.sample))
        return pieces

    def _fits(self, size: SampleSize) -> bool:
        budgets, multiple_of = self.stream.budgets, self.stream.budgets["multiple_of"]
        limits = self.stream.capacity, budgets["max_images"], budgets["max_patches"]
        needs = -(-size.tokens // multiple_of) * multiple_of, size.images, size.patches
        return budgets["max_documents"] != 0 and all(limit is None or need <= limit for need, limit in zip(needs, limits))

    def _refuse(self, size: SampleSize, named: str) -> None:
        try:
            pack_lengths([size.tokens], self.stream.capacity, image_counts=[size.images], patch_counts=[size.patches], **self.stream.budgets)
        except ValueError as error:
            raise ValueError(str(error).replace("sample 0", named)) from None

    # --- rows

    def _pack(self) -> None:
        """Packs the buffer; its better rows become ready, the rest stays."""
        stream, buffer = self.stream, self._buffer
        table = np.asarray([waiting.size for waiting in buffer], dtype=np.int64)
        rows = pack_lengths(table[:, 0], stream.capacity, image_counts=table[:, 1], patch_counts=table[:, 2], **stream.budgets)
        fullest = sorted(range(len(rows)), key=lambda row: (-rows.tokens[row], row))
        out = fullest if self._ended else fullest[: (len(rows) + 1) // 2]
        out = list(dict.fromkeys([*out, next(row for row in fullest if 0 in rows[row])]))
        if stream.seed is not None:
            out = np.random.default_rng([stream.seed, self.shard, self.packings]).permutation(out).tolist()
        self.packings += 1
        self._ready = [[buffer[place] for place in sorted(rows[row])] for row in reversed(out)]
        gone = {place for row in out for place in rows[row]}
        self._buffer = [waiting for place, waiting in enumerate(buffer) if place not in gone]

    def __next__(self) -> list:
        if not self._ready:
            self._fill()
            if not self._buffer:
                raise StopIteration
            self._pack()
        return [self._sample(waiting) for waiting in self._ready.pop()]

    def _sample(self, waiting: Waiting):
        stream = self.stream
        sample = stream.source[waiting.number] if stream.by_index else waiting.sample
        if waiting.stop >= 0:
            sample = stream.sample_format.cut(sample, waiting.start, waiting.stop, f"sample {waiting.number} of the source")
        return sample if stream.transform is None else stream.transform(sample)

    # --- resuming

    def state_dict(self) -> dict:
        """Everything that is read and not out yet: numbers, and the samples where the source cannot give them again."""
        stream = self.stream
        waiting = [[*self._buffer], *self._ready]
        plain = [[(one.number, one.start, one.stop, tuple(one.size)) for one in row] for row in waiting]
        state = {
            "epoch": self.epoch, "read": self._read, "fitted": self._fitted, "ended": self._ended, "skipped": self.skipped, "packings": self.packings,
            "waiting": plain, "shard": [self.shard, self.shards], "order": self._order_of_source(),
        }  # fmt: skip
        if stream.resumable:
            # as bytes: whoever compares two states should not compare tensors
            state["samples"] = pickle.dumps([[one.sample for one in row] for row in waiting])
            state["source"] = stream.source.state_dict()
        return state

    def _order_of_source(self) -> list:
        """What the numbers of samples by index go by: how many there are, and the seed that shuffles them."""
        stream = self.stream
        return [len(stream.source) if stream.by_index else None, stream.seed if stream.shuffle else None]

    def load_state_dict(self, state: dict) -> None:
        """Go on where the state was saved.

        Raises:
            ValueError: a state of another rank, of another number of ranks or workers, or of a source in another order.
        """
        if list(state["shard"]) != [self.shard, self.shards]:
            shard, shards = state["shard"]
            raise ValueError(
                f"load_state_dict: the state is of part {shard} of {shards} of the source, this is part {self.shard} of {self.shards}; "
                "resume with as many ranks and workers as there were"
            )
        if list(state["order"]) != self._order_of_source():
            raise ValueError(
                "load_state_dict: the state is of a source of {} samples, shuffled with seed {}, this one has {} and {}; resume with the source and seed "
                "that it was saved with".format(*state["order"], *self._order_of_source())
            )
        stream = self.stream
        self.epoch, self._read, self._fitted, self._ended = state["epoch"], state["read"], state["fitted"], state["ended"]
        self.skipped, self.packings = state["skipped"], state["packings"]
        waiting = [[Waiting(number, start, stop, SampleSize(*size), None) for number, start, stop, size in row] for row in state["waiting"]]
        if "source" in state:
            stream.source.load_state_dict(state["source"])
            stream.moved = True
            self._samples = iter(stream.source)
            samples = pickle.loads(state["samples"])
            waiting = [[one._replace(sample=sample) for one, sample in zip(row, own)] for row, own in zip(waiting, samples)]
        elif stream.by_index:
            self._open()
        else:
            waiting = self._read_again(waiting)
        self._buffer, *self._ready = waiting

    def _read_again(self, waiting: list[list[Waiting]]) -> list[list[Waiting]]:
        """Waiting samples fetched from the beginning of a source that cannot be resumed, which then stands at sample `_read`."""
        wanted = {one.number for row in waiting for one in row}
        found = {number: sample for number, sample in zip(range(max(wanted, default=-1) + 1), self.stream.source) if number in wanted}
        self._open()
        return [[one._replace(sample=found[one.number]) for one in row] for row in waiting]
