"""Rows for ranks: as many for each, and rows of like vision work at the same step, without talking."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from .lengths import PackedRows


def own_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """(rank, world_size) as given, else torch.distributed's, else torchrun's variables, else (0, 1)."""
    if (rank is None) != (world_size is None):
        raise ValueError("rank, world_size: give both, or neither to take those of torch.distributed")
    if rank is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 to {world_size - 1} of world_size={world_size}, got {rank}")
    return rank, world_size


def deal(work: np.ndarray, world_size: int, *, seed: int | None, drop_last: bool = False, steps_multiple_of: int = 1) -> np.ndarray:
    """``(world_size, steps)`` row numbers: rank r takes row ``[r, s]`` at step s.

    Rows are sorted by work and dealt out in groups of neighbours, one group a step, so that no rank waits long for another;
    within a group the heaviest row goes to the rank that has done least. The steps are then shuffled.

    Args:
        work: ``(rows,)`` of each row, the same on every rank.
        world_size: number of ranks.
        seed: of the order of the steps; None: the heaviest first.
        drop_last: where rows are left over, leave them out; else the lightest are repeated, as DistributedSampler does.
        steps_multiple_of: the rows of a batch, so that none is filled up later.
    """
    order = np.argsort(-work, kind="stable")
    together = world_size * steps_multiple_of
    over = len(order) % together
    if over and drop_last:
        order = order[: len(order) - over]
    elif over:
        order = np.concatenate([order, np.resize(order[::-1], together - over)])
        order = order[np.argsort(-work[order], kind="stable")]
    steps = order.reshape(-1, world_size)
    dealt, done = np.empty_like(steps), np.zeros(world_size, dtype=np.int64)
    for step, group in enumerate(steps):
        ranks = np.argsort(done, kind="stable")
        dealt[step, ranks] = group
        done[ranks] += work[group]
    if seed is not None:
        dealt = dealt[np.random.default_rng(seed).permutation(len(dealt))]
    return np.ascontiguousarray(dealt.T)


class RankSampler(Sampler[int]):
    """Numbers of the rows that this rank takes, for a DataLoader over a `PackedDataset`.

    Every rank gets the same number of rows, and at each step rows of like vision work (patches, else images, else tokens),
    worked out from the rows alone. Its state is saved and restored by `state_dict` and `load_state_dict`; torchdata's
    StatefulDataLoader calls them, and knows which rows its workers have prefetched but nobody has seen.

    Args:
        rows: what `pack_lengths` gave, the same on every rank.
        rank, world_size: default those of torch.distributed, else of torchrun.
        shared_by: instead of these, the number of ranks among which something else shares the batches out, one after another (accelerate, and
            so transformers' Trainer and TRL). The sampler, the same on every rank, then gives the rows of all, and each rank gets
            those that it would have got by its own rank.
        batch_size: rows of a rank's batch; with shared_by it has to be that of the loader. Each rank's number of rows becomes a multiple of it.
        seed: with the epoch, of the order of the steps. None: the heaviest rows first, in every epoch.
        drop_last: rows that do not go evenly among the ranks are left out instead of repeated. `pack_lengths(rows_multiple_of=world_size)`
            leaves none.

    Raises:
        TypeError: rows that `pack_lengths` did not give.
        ValueError: a rank that is none; shared_by beside a rank.

    Example:
        >>> from vlm_fuse import packing
        >>> rows = packing.pack_lengths([700, 300, 600, 400, 200, 900], 1000)
        >>> [list(packing.RankSampler(rows, rank=rank, world_size=2, seed=None)) for rank in (0, 1)]
        [[1, 0], [2, 3]]
        >>> list(packing.RankSampler(rows, shared_by=2, seed=None))
        [1, 2, 0, 3]
    """

    def __init__(
        self,
        rows: PackedRows,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        shared_by: int | None = None,
        batch_size: int = 1,
        seed: int | None = 0,
        drop_last: bool = False,
    ):
        if not isinstance(rows, PackedRows):
            raise TypeError(f"rows: expected what pack_lengths gave, which knows the work of each row, got {type(rows).__name__}")
        self.rows = rows
        for name, value in (("shared_by", shared_by), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if shared_by is not None and (rank is not None or world_size is not None):
            raise ValueError("shared_by: every rank's sampler gives the rows of all ranks then; leave out rank and world_size")
        self.rank, self.world_size = own_rank(rank, world_size) if shared_by is None else (None, shared_by)
        self.batch_size = batch_size
        self.seed, self.drop_last, self.epoch = seed, drop_last, 0
        self._yielded, self._resume = 0, 0
        self._told: int | None = None  # the epoch of set_epoch
        self._packing = zlib.crc32(rows.tokens.tobytes())

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose order `iter` gives next; call it on every rank, as with DistributedSampler.

        After `load_state_dict` another epoch than the state's begins at its first row.
        """
        self._told = epoch
        self._begin_told()

    def _own_rows(self) -> list[int]:
        rows = self.rows
        work = next((column for column in (rows.patches, rows.images) if column.any()), rows.tokens)
        seed = None if self.seed is None else np.random.SeedSequence([self.seed, self.epoch])
        dealt = deal(work, self.world_size, seed=seed, drop_last=self.drop_last, steps_multiple_of=self.batch_size)
        if self.rank is not None:
            return dealt[self.rank].tolist()
        return dealt.reshape(self.world_size, -1, self.batch_size).swapaxes(0, 1).ravel().tolist()  # batch after batch, each rank's of one step

    def __iter__(self) -> Iterator[int]:
        ended = self._resume >= len(self)
        if ended:
            self._begin_told()
        start = self._yielded = self._resume
        if ended and self._told is None:
            self._resume = 0  # a loader whose state is of the end of an epoch asks once more, for the next one
        return self._from(start)

    def _from(self, start: int) -> Iterator[int]:
        self._resume = 0  # not before the first row: loaders with workers ask twice
        for count, row in enumerate(self._own_rows()[start:], start + 1):
            self._yielded = count
            yield row
        self._begin_told()

    def _begin_told(self) -> None:
        """An epoch that was told before a state of another one was restored follows that one."""
        if self._told not in (None, self.epoch):
            self.epoch, self._yielded, self._resume = self._told, 0, 0

    def __len__(self) -> int:
        batches, over = divmod(len(self.rows), self.world_size * self.batch_size)
        own = self.batch_size if self.rank is not None else self.batch_size * self.world_size
        return own * (batches if self.drop_last or not over else batches + 1)

    def state_dict(self) -> dict:
        """Where the iteration stands: the epoch, and how many rows this rank was given."""
        return {"epoch": self.epoch, "yielded": self._yielded, **self._settings()}

    def _settings(self) -> dict:
        return {
            "rows": len(self.rows), "packing": self._packing, "world_size": self.world_size, "shared": self.rank is None, "batch_size": self.batch_size,
            "seed": self.seed, "drop_last": self.drop_last,
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        """Go on from there at the next `iter`.

        Raises:
            ValueError: a state of other rows, of another number of ranks or of another order.
        """
        for name, own in self._settings().items():
            if state[name] != own:
                raise ValueError(f"load_state_dict: the state is of {name}={state[name]}, this sampler has {own}; restore it with the rows and ranks it was saved with")
        self.epoch, self._yielded, self._resume = state["epoch"], state["yielded"], state["yielded"]
