"""Packing of samples: which share a row, on which rank; a stream of rows; collators that make batches with their token plans."""

from .batches import CollatedBatch
from .collators import PackingCollator, PaddingCollator
from .dataset import PackedDataset
from .lengths import PackedRows, PackStatistics, pack_lengths
from .ranks import RankSampler
from .samples import SampleFormat, SampleSize
from .splitting import Piece, image_spans
from .stream import PackedStream

__all__ = [
    "CollatedBatch", "PackStatistics", "PackedDataset", "PackedRows", "PackedStream", "PackingCollator", "PaddingCollator", "Piece", "RankSampler",
    "SampleFormat", "SampleSize", "image_spans", "pack_lengths",
]  # fmt: skip
