"""Collators for torch's DataLoader: from samples to a batch with its token plan, made and checked in the worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..attending import CAUSAL, Attend
from ..batch import IGNORE_INDEX
from ..planning import plan
from ..positions import mrope_position_ids
from ..token_plan import SIDES, TokenPlan, shifted_rows
from . import labels as of_labels
from .batches import CollatedBatch
from .dummy import DummyImage
from .samples import Read, SampleFormat
from .vision import join

#: keys of a batch that no model's forward takes in training, besides what samples bring along.
EXTRAS = ("plan", "token_counts", "loss_weights", "cu_seqlens_padded", "rope_deltas")


class _Collator:
    """What both collators do with samples that are read, once it is settled where their tokens go."""

    def __init__(
        self, sample_format: SampleFormat, length: int | None, pad_token_id: int, multiple_of: int, attend: Attend | Mapping[str, Attend],
        mrope: bool, tokens_per_second: float, loss_weights: bool, unused_features: str, dummy_image: Mapping | None, extras: bool | Sequence[str],
    ):  # fmt: skip
        self.sample_format = sample_format
        self.length, self.pad_token_id, self.multiple_of = length, pad_token_id, multiple_of
        self.attend, self.mrope, self.tokens_per_second = attend, mrope, tokens_per_second
        self.loss_weights, self.unused_features = loss_weights, unused_features
        if multiple_of < 1:
            raise ValueError(f"multiple_of: expected at least 1, got {multiple_of}")
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise ValueError(f"length: expected a number of tokens, got {length!r}")
        if pad_token_id in (sample_format.image_token_id, sample_format.video_token_id):
            raise ValueError(f"pad_token_id: {pad_token_id} is a placeholder, which would ask for a feature row; take another id, such as that of the end of text")
        if length is not None and length % multiple_of:
            raise ValueError(f"length: {length} is no multiple of multiple_of={multiple_of}; take {-(-length // multiple_of) * multiple_of}")
        if isinstance(extras, str) or not isinstance(extras, (bool, Sequence)):
            raise TypeError(f"extras: expected True, False or a list of keys, got {extras!r}")
        self.extras = extras
        self.dummy = None if dummy_image is None else DummyImage(dummy_image, sample_format)
        if self.capacity is not None and self.capacity < 1:
            raise ValueError(f"dummy_image: its {len(self.dummy)} tokens leave none of length={length} to the samples; take a smaller image, or raise length")

    @property
    def capacity(self) -> int | None:
        """Tokens of a row that its samples may take, for `pack_lengths`: `length`, less those of the dummy image. None without a length."""
        if self.length is None or self.dummy is None:
            return self.length
        return (self.length - len(self.dummy)) // self.multiple_of * self.multiple_of

    def _dummy_row(self, reads: list[Read], used: list[int]) -> int | None:
        """The emptiest of the rows, of which so many tokens are used, where the batch needs the dummy image."""
        if self.dummy is None or not self.dummy.is_needed_by(reads):
            return None
        row = int(np.argmin(used))
        if self.length is not None and used[row] + len(self.dummy) > self.length:
            raise ValueError(
                f"dummy_image: the batch has no image, and its emptiest row has {self.length - used[row]} tokens free; the dummy image takes {len(self.dummy)}. "
                f"Give samples the collator's `capacity`, {self.capacity} of length={self.length}"
            )
        return row

    def _without_extras(self, batch: CollatedBatch, reads: list[Read]) -> CollatedBatch:
        """The batch with those keys that a model takes, and of the others those that are asked for."""
        if self.extras is True:
            return batch
        asked = self.extras or ()
        extras = {*EXTRAS, *(name for read in reads for name in read.rest)}.difference(asked)
        return CollatedBatch({name: value for name, value in batch.items() if name not in extras})

    def _read(self, samples: Sequence) -> list[Read]:
        return [self.sample_format.read(sample, _name(sample, number)) for number, sample in enumerate(samples) if sample is not None]

    def _width(self, needed: int, what: str) -> int:
        if self.length is None:
            return -(-needed // self.multiple_of) * self.multiple_of
        if needed > self.length:
            raise ValueError(f"length: {what} {needed} tokens, more than {self.length}; raise length, or pack with capacity={self.length}")
        return self.length

    def _placed(self, reads: list[Read], starts: list[tuple[int, int]], shape: tuple[int, int]) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """input_ids, labels and what else goes by token, each ``(G, W)``: sample i at (row, column) ``starts[i]``."""
        labelled = [read.labels is not None for read in reads]
        if any(labelled) != all(labelled):
            raise ValueError(f"labels: {sum(labelled)} of {len(reads)} samples have them; give all of them labels or a loss mask, or none")
        shift = self.sample_format.shifted_labels
        input_ids = _at([read.input_ids for read in reads], starts, shape, self.pad_token_id)
        labels = None
        if any(labelled):
            # nothing stands before the first token that could have it as a target; behind left padding a loss would take it for one
            after = [of_labels.before_shift(read.labels) if shift else of_labels.without_first(read.labels) for read in reads]
            labels = _at(after, starts, shape, IGNORE_INDEX)
        names = dict.fromkeys(name for read in reads for name in read.by_token)
        if "mm_token_type_ids" in names:
            # texts that the tokenizer alone has seen come without
            reads = [read._replace(by_token={"mm_token_type_ids": self.sample_format.kinds_of(read), **read.by_token}) for read in reads]
        missing = [name for name in names if not all(name in read.by_token for read in reads)]
        if missing:
            raise ValueError(f"{missing[0]}: some samples have it and some do not; give it for all of them, or for none")
        return input_ids, labels, {name: _at([read.by_token[name] for read in reads], starts, shape, 0) for name in names}

    def _plan(self, input_ids: Tensor, labels: Tensor | None, reads: list[Read], **settings) -> TokenPlan:
        """The token plan, with what a training step reads of it made here."""
        form = self.sample_format
        tokens = tuple(dict.fromkeys(token for token in (form.image_token_id, form.video_token_id) if token is not None))
        sizes = None
        if len(tokens) == sum(token is not None for token in (form.image_token_id, form.video_token_id)):
            sizes = {form.image_token_id: _all_of(read.image_sizes for read in reads), form.video_token_id: _all_of(form.runs_of_videos(read) for read in reads)}
            sizes = {token: found for token, found in sizes.items() if token is not None and found is not None}
        made = plan(
            input_ids, image_token_id=tokens or None, image_sizes=sizes or None, labels=labels, attend=self.attend, unused_features=self.unused_features,
            **settings,
        )  # fmt: skip
        if self.extras is not True and "plan" not in (self.extras or ()):
            return made
        _ = made.position_ids, made.document_ids, made.attention_mask, made.cu_seqlens, made.max_seqlen, made.labels
        if tokens:
            _ = made.kind_ids
        for attend in self.attend.values() if isinstance(self.attend, Mapping) else (self.attend,):
            made.mask(attend)
        return made

    def _finish(self, batch: CollatedBatch, reads: list[Read], dummy: list[Read], made: TokenPlan, document_ids: Tensor, documents: int) -> CollatedBatch:
        """Labels as the samples have them, counts and weights, vision inputs, and what else the samples bring along."""
        if made.labels is not None:
            shift = self.sample_format.shifted_labels
            batch["labels"] = shifted_rows(made.labels, IGNORE_INDEX) if shift else made.labels
            batch["token_counts"] = counts = of_labels.token_counts(made.labels, document_ids, documents)
            if self.loss_weights:
                weights = of_labels.loss_weights(made.labels, document_ids, counts)
                batch["loss_weights"] = shifted_rows(weights, 0.0) if shift else weights
        batch.update(join([read.vision for read in (*reads, *dummy)]))
        for name in dict.fromkeys(name for read in reads for name in read.rest):
            batch[name] = [read.rest.get(name) for read in reads]
        batch["plan"] = made
        return batch

    def _types(self, input_ids: Tensor, by_token: dict[str, Tensor], dummy: Sequence[Read] = ()) -> Tensor:
        """``(G, W)``: 0 text, 1 image, 2 video, as the processor says, else by the ids; a dummy image is padding."""
        if dummy:
            return torch.zeros_like(input_ids)
        types = by_token.get("mm_token_type_ids")
        return self.sample_format.kinds_by_id(input_ids) if types is None else types

    def _mrope(self, types: Tensor, batch: dict, reads: list[Read], **rows) -> tuple[Tensor, Tensor]:
        try:
            return self._mrope_of(types, batch, **rows)
        except ValueError:
            for read in reads:  # a row may hold several samples: which one was it?
                try:
                    self._mrope_of(self._types(read.input_ids, read.by_token)[None], join([read.vision]))
                except ValueError as error:
                    raise ValueError(f"{read.named}: {str(error).replace('sample 0', 'it')}") from None
            raise

    def _mrope_of(self, types: Tensor, vision: dict, **rows) -> tuple[Tensor, Tensor]:
        form = self.sample_format
        grids = {name: vision.get(name) for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
        return mrope_position_ids(
            types, **grids, **rows, spatial_merge_size=form.spatial_merge_size, tokens_per_second=self.tokens_per_second, split_video_frames=form.frames_apart
        )


class PackingCollator(_Collator):
    """Samples one after another in a row, each a document of its own; for ``DataLoader(collate_fn=...)``.

    Called with a list of samples it makes one row of them; with a list of lists, as a `PackedDataset` gives them, a row of each. A
    sample is a dict as a Hugging Face processor or nanoVLM's dataset gives it (see `SampleFormat`); None is left out.

    Args:
        image_token_id, video_token_id, rows_per_image, spatial_merge_size, frames_apart, shifted_labels, marks: of the samples, see
            `SampleFormat`. With shifted_labels the batch's labels are shifted too.
        length: tokens of a row, for a static shape. Default: as long as the longest row.
        pad_token_id: fills what is left.
        multiple_of: each document is padded to a multiple (2 * context-parallel size), and ``cu_seqlens_padded`` says where they lie.
        max_documents: makes ``cu_seqlens`` and ``token_counts`` of the batch that long, whatever it holds (CUDA graphs).
        attend: who sees whom; its masks are made in the worker.
        mrope: position_ids ``(4, G, W)`` for models with M-RoPE, the text row first, by the samples' grids.
        tokens_per_second: of those positions (Qwen2.5-VL's config).
        loss_weights: also give weights with which a sum of losses is the mean over samples.
        unused_features: of the plan: "allow" feature rows behind those of the batch, for a model that merges by the plan.
        dummy_image: a sample with a small image, as the processor gives it, which a batch without images gets in its padding, so that
            the tower runs on every rank. Nobody sees it and nothing counts it. Pack with the collator's `capacity`, which leaves room for it.
        extras: which keys that no model's forward takes the batch has: plan, token_counts, loss_weights, cu_seqlens_padded, rope_deltas and what
            samples bring along. True: all; False: none, for a trainer that hands the whole batch to the model; or the names of some.

    Returns (of a call): CollatedBatch, a dict:
        input_ids ``(G, W)`` int64; position_ids ``(G, W)`` or ``(4, G, W)`` int64; plan, the `TokenPlan` for ``merge(..., plan=plan)``
        with its masks, document_ids (documents numbered over the batch) and cu_seqlens made; use_cache, which is False;
        labels ``(G, W)`` int64, token_counts ``(documents,)`` int64 (labels of each document), loss_weights ``(G, W)`` float32, where
        the samples have labels; cu_seqlens_padded int32 ``(documents + 1,)``: where each document begins in the flattened rows, then
        their end; the vision inputs of all samples, joined; what else the samples have, as lists.

    Raises (of a call):
        ValueError, TypeError: a sample whose parts do not agree, named by its number in the batch (and its "id"), with both counts and
            the remedy; rows longer than `length`; more documents than `max_documents`.

    position_ids go on through the padding behind a document and start anew at the tail, so that transformers, called without an
    attention_mask, sees one document each and one of padding: ``model(**batch)`` isolates in the families that go by positions.
    With a cache it does not look for documents, and makes one unless told not to, in training too (its Trainer switches that off for
    the whole model's config, of which most VLMs' text models see nothing): hence use_cache. A sample of no tokens is no document.

    Example:
        >>> from vlm_fuse.packing import PackingCollator
        >>> collate = PackingCollator(image_token_id=9, rows_per_image=2)
        >>> batch = collate([{"input_ids": [9, 9, 5], "labels": [-100, -100, 5], "images": ["cat.png"]}, {"input_ids": [6, 7], "labels": [6, 7]}])
        >>> batch["input_ids"], batch["position_ids"]
        (tensor([[9, 9, 5, 6, 7]]), tensor([[0, 1, 2, 0, 1]]))
        >>> batch["labels"], batch["token_counts"]
        (tensor([[-100, -100,    5, -100,    7]]), tensor([1, 1]))
        >>> batch["plan"].source_index
        tensor([[ 0,  1, -3, -4, -5]], dtype=torch.int32)
    """

    def __init__(
        self,
        *,
        image_token_id: int | None = None,
        video_token_id: int | None = None,
        rows_per_image: int | Callable[[Mapping], Sequence[int]] | None = None,
        spatial_merge_size: int = 2,
        frames_apart: bool = False,
        shifted_labels: bool = False,
        marks: Sequence[int] = (),
        length: int | None = None,
        pad_token_id: int = 0,
        multiple_of: int = 1,
        max_documents: int | None = None,
        attend: Attend | Mapping[str, Attend] = CAUSAL,
        mrope: bool = False,
        tokens_per_second: float = 1,
        loss_weights: bool = False,
        unused_features: str = "error",
        dummy_image: Mapping | None = None,
        extras: bool | Sequence[str] = True,
    ):
        form = SampleFormat(image_token_id, video_token_id, rows_per_image, spatial_merge_size, frames_apart, shifted_labels, tuple(marks))
        super().__init__(form, length, pad_token_id, multiple_of, attend, mrope, tokens_per_second, loss_weights, unused_features, dummy_image, extras)
        self.max_documents = max_documents

    def __call__(self, samples: Sequence[Mapping] | Sequence[Sequence[Mapping]]) -> CollatedBatch:
        of_rows = {isinstance(sample, (list, tuple)) for sample in samples}
        if len(of_rows) > 1:
            raise TypeError("the batch mixes samples and rows of samples; give a list of dicts, or a list of lists of dicts")
        rows = samples if True in of_rows else [samples]
        reads, starts, bounds, tails = [], [], [], []
        number = 0
        for row, members in enumerate(rows):
            column = 0
            for sample in members:
                if sample is not None:
                    read = self.sample_format.read(sample, _name(sample, number))
                    reads.append(read)
                    starts.append((row, column))
                    if len(read.input_ids):
                        bounds.append((row, column, len(read.input_ids)))
                    column += -(-len(read.input_ids) // self.multiple_of) * self.multiple_of
                number += 1
            tails.append(column)
        if not reads:
            raise ValueError("the batch has no samples, or every one is None; leave such batches out in the dataset")
        width = self._width(max(tails), f"the samples of row {int(np.argmax(tails))} have" if len(rows) > 1 else "the samples have")
        row, dummy = self._dummy_row(reads, tails), []
        if row is not None:
            dummy = [self.dummy.beside(reads)]
            starts.append((row, tails[row]))
            width = max(width, self._width(tails[row] + len(self.dummy), "the samples and the dummy image have"))
        shape = (len(rows), width)
        document_ids, position_ids = _documents(bounds, tails, shape)
        input_ids, labels, by_token = self._placed(reads + dummy, starts, shape)
        made = self._plan(input_ids, labels, reads + dummy, document_ids=document_ids, max_documents=self.max_documents)
        batch = CollatedBatch(input_ids=input_ids, **by_token)
        documents = len(bounds) if self.max_documents is None else self.max_documents
        if self.multiple_of > 1:
            batch["cu_seqlens_padded"] = _padded_bounds(bounds, shape, documents)
        self._finish(batch, reads, dummy, made, document_ids, documents)
        batch["position_ids"], batch["use_cache"] = position_ids, False
        if self.mrope:
            four, _ = self._mrope(self._types(input_ids, by_token, dummy), {} if dummy else batch, reads, document_ids=document_ids)
            four[0] = position_ids
            batch["position_ids"] = four
        return self._without_extras(batch, reads)


class PaddingCollator(_Collator):
    """One sample a row, padded on one side; for ``DataLoader(collate_fn=...)``.

    Args:
        padding_side: "right" or "left".
        length: tokens of a row, for a static shape. Default: those of the longest sample.
        multiple_of: the width is rounded up to a multiple.
        image_token_id, ..., pad_token_id, attend, mrope, tokens_per_second, loss_weights, unused_features, dummy_image, extras: as of
            `PackingCollator`.

    Returns (of a call): CollatedBatch, a dict:
        input_ids, attention_mask ``(B, T)`` int64; position_ids ``(B, T)``, or with mrope ``(3, B, T)`` and rope_deltas ``(B, 1)``; plan;
        labels, token_counts ``(B,)``, loss_weights, vision inputs and the rest as of `PackingCollator`.

    Raises (of a call): as `PackingCollator`.

    Example:
        >>> from vlm_fuse.packing import PaddingCollator
        >>> batch = PaddingCollator(padding_side="left")([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}])
        >>> batch["input_ids"], batch["position_ids"]
        (tensor([[5, 6, 7],
                [0, 0, 8]]), tensor([[0, 1, 2],
                [0, 0, 0]]))
    """

    def __init__(
        self,
        *,
        padding_side: str = "right",
        image_token_id: int | None = None,
        video_token_id: int | None = None,
        rows_per_image: int | Callable[[Mapping], Sequence[int]] | None = None,
        spatial_merge_size: int = 2,
        frames_apart: bool = False,
        shifted_labels: bool = False,
        marks: Sequence[int] = (),
        length: int | None = None,
        pad_token_id: int = 0,
        multiple_of: int = 1,
        attend: Attend | Mapping[str, Attend] = CAUSAL,
        mrope: bool = False,
        tokens_per_second: float = 1,
        loss_weights: bool = False,
        unused_features: str = "error",
        dummy_image: Mapping | None = None,
        extras: bool | Sequence[str] = True,
    ):
        checks.choice("padding_side", padding_side, SIDES)
        form = SampleFormat(image_token_id, video_token_id, rows_per_image, spatial_merge_size, frames_apart, shifted_labels, tuple(marks))
        super().__init__(form, length, pad_token_id, multiple_of, attend, mrope, tokens_per_second, loss_weights, unused_features, dummy_image, extras)
        self.padding_side = padding_side

    def __call__(self, samples: Sequence[Mapping]) -> CollatedBatch:
        reads = self._read(samples)
        if not reads:
            raise ValueError("the batch has no samples, or every one is None; leave such batches out in the dataset")
        lengths = [len(read.input_ids) for read in reads]
        width = self._width(max(lengths), f"{reads[int(np.argmax(lengths))].named} has")
        dummy_row, dummy = self._dummy_row(reads, lengths), []
        if dummy_row is not None:
            dummy = [self.dummy.beside(reads)]
            width = max(width, self._width(lengths[dummy_row] + len(self.dummy), f"{reads[dummy_row].named} and the dummy image have"))
        starts = [(row, width - own if self.padding_side == "left" else 0) for row, own in enumerate(lengths)]
        kept = _at([torch.ones(own, dtype=torch.int64) for own in lengths], starts, (len(reads), width), 0)
        if dummy_row is not None:
            starts.append((dummy_row, 0 if self.padding_side == "left" else lengths[dummy_row]))
        input_ids, labels, by_token = self._placed(reads + dummy, starts, (len(reads), width))
        made = self._plan(input_ids, labels, reads + dummy, attention_mask=kept)
        batch = CollatedBatch(input_ids=input_ids, attention_mask=kept, position_ids=made.position_ids, **by_token)
        self._finish(batch, reads, dummy, made, made.document_ids, len(reads))
        if self.mrope:
            types, vision = self._types(input_ids, by_token, dummy), {} if dummy else batch
            batch["position_ids"], batch["rope_deltas"] = self._mrope(types, vision, reads, attention_mask=kept)
        return self._without_extras(batch, reads)


def _name(sample, number: int) -> str:
    own = sample.get("id") if isinstance(sample, Mapping) else None
    return f"sample {number} of the batch" if own is None else f"sample {number} of the batch (id {own!r})"


def _all_of(sizes) -> list[int] | None:
    """The sizes of all samples one after another; None where one sample's are not known."""
    joined: list[int] = []
    for own in sizes:
        if own is None:
            return None
        joined += own
    return joined


def _at(parts: list[Tensor], starts: list[tuple[int, int]], shape: tuple[int, int], fill: int) -> Tensor:
    """``(G, W)`` int64 with every part at its place."""
    out = np.full(shape, fill, dtype=np.int64)
    for part, (row, column) in zip(parts, starts):
        out[row, column : column + len(part)] = part.numpy()
    return torch.from_numpy(out)


def _documents(bounds: list[tuple[int, int, int]], tails: list[int], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """document_ids int32 and position_ids int64, ``(G, W)``: positions go on behind a document, and start anew at the tail."""
    documents = np.full(shape, -1, dtype=np.int32)
    first = np.zeros(shape, dtype=np.int64)  # at the first token of a document its column, so that a running maximum gives it to the others
    for document, (row, column, length) in enumerate(bounds):
        documents[row, column : column + length] = document
        first[row, column] = column
    for row, column in enumerate(tails):
        if column < shape[1]:
            first[row, column] = column
    positions = np.arange(shape[1]) - np.maximum.accumulate(first, axis=1)
    return torch.from_numpy(documents), torch.from_numpy(positions)


def _padded_bounds(bounds: list[tuple[int, int, int]], shape: tuple[int, int], documents: int) -> Tensor:
    """int32 ``(documents + 1,)``: where each document begins in the flattened rows, then their end."""
    begins = [row * shape[1] + column for row, column, _ in bounds]
    return torch.tensor(begins + [shape[0] * shape[1]] * (documents + 1 - len(begins)), dtype=torch.int32)
