"""`PackedDataset`: a dataset of rows over a dataset of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.utils.data import Dataset

from .splitting import Piece


class PackedDataset(Dataset):
    """Row k is the list of its samples, fetched when it is asked for: what `PackingCollator` takes.

    Args:
        dataset: of samples, by index.
        rows: what `pack_lengths` gave.
        cut: ``cut(sample, start, stop)`` makes a piece of a sample (`SampleFormat.cut`); needed where rows have pieces.

    Raises:
        ValueError: rows that have pieces, without `cut`.

    Example:
        >>> from vlm_fuse import packing
        >>> words = packing.PackedDataset(["a", "b", "c"], packing.pack_lengths([3, 5, 2], 5))
        >>> words[0], words[1]
        (['b'], ['a', 'c'])
    """

    def __init__(self, dataset, rows: Sequence[Sequence[int | Piece]], cut: Callable | None = None):
        if cut is None and any(isinstance(item, Piece) for row in rows for item in row):
            raise ValueError("cut: the rows have pieces of split samples; give the function that cuts one, such as SampleFormat.cut")
        self.dataset, self.rows, self.cut = dataset, rows, cut

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> list:
        return [self._fetch(item) for item in self.rows[row]]

    def _fetch(self, item: int | Piece):
        if isinstance(item, Piece):
            return self.cut(self.dataset[item.sample], item.start, item.stop)
        return self.dataset[item]
