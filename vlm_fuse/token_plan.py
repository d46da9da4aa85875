"""`TokenPlan`: for every output row the integers that say where it comes from and where it belongs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .attending import Attend
from .batch import KIND_FIELDS, LAYOUTS, PAD, SCHEMES, Batch
from .masks import IntervalMask
from .positions import after_parents

SIDES = ("right", "left")
UNUSED = ("error", "allow")

_KEEP = LAYOUTS.index("keep")
_SELDOM = ("text_index", "image_ids", "kind_ids")
_STEP = ("position_ids", "document_ids", "attention_mask", "cu_seqlens")
_STEP_LABELS = ("labels", *_STEP)


class Settings(NamedTuple):
    """What a plan was made with, beside its batch."""

    combine: str
    length: int | None
    attend: Attend | Mapping[str, Attend]
    validate: str
    backend: str
    masked_by_tensor: bool = False  # by a placeholder_mask instead of ids
    prefix_lengths: object = None
    parent_ids: object = None
    max_documents: int | None = None


class TokenPlan:
    """What `plan` returns and `merge` makes: index tensors of the output rows, each made when it is first read.

    All have the shape of the output, ``(G, W)``, unless said otherwise; `design <../docs/token_plan.md>`_ defines each.

    Attributes:
        source_index: int32. k >= 0: feature row k; -1 - j: token j of the flattened input_ids; -2**31: a row of zeros.
        text_index: int32. The token that the row stands for, -1 where none.
        position_ids: int64. Earlier tokens of the same document; 0 at padding, but the tail of a packed row counts 0, 1, 2, ...
        document_ids: int32. -1 at padding.
        image_ids: int32. Number of the image over the batch, -1 elsewhere.
        kind_ids: int8. 0 text, 1, 2, ... the kinds of placeholder in order, -1 padding.
        attention_mask: bool. False at padding.
        labels: dtype of the labels given, or None. -100 at image rows, padding and (packed) the first token of a document.
        kv_lo, kv_hi, kv_lo2, kv_hi2: int32. Intervals of ``mask(plan.attend)``; the second pair None where no row needs it.
        cu_seqlens: int32 ``(B + 1,)``, or ``(documents + 1,)`` where document_ids were given.
        max_seqlen: int. Tokens of the longest document; read back from the device when first asked for.
        feature_starts: tuple of ints, ``kinds + 1``: the number of each kind's first feature row, and of all.
    """

    __slots__ = ("_batch", "_facts", "_masks", "_settings", "_target", "_versions", "_width", "source_index", "__weakref__")

    def __init__(self, batch: Batch, settings: Settings, kernels=None):
        """`kernels`: the backend's module where the caller knows that it may be called directly."""
        self._batch = batch
        self._settings = settings
        self._facts: dict = {}
        self._masks: dict = {}
        self._target = None  # device that facts are sent to, where it is not the batch's own
        self._versions = _versions(batch)
        width = batch.tokens.shape[1] if batch.layout == _KEEP else settings.length
        self.source_index = ops.plan(batch, width, ops.mode_of(settings.validate, batch.tokens), settings.backend, kernels)
        self._width = self.source_index.shape[1]

    def __repr__(self) -> str:
        batch = self._batch
        return (
            f"TokenPlan({SCHEMES[batch.scheme]}, {LAYOUTS[batch.layout]}, tokens={tuple(batch.tokens.shape)}, "
            f"rows={tuple(self.source_index.shape)}, kinds={batch.kind_count}, device={self.source_index.device})"
        )

    # --- what it was made with

    @property
    def attend(self) -> Attend | Mapping[str, Attend]:
        return self._settings.attend

    @property
    def combine(self) -> str:
        return self._settings.combine

    @property
    def length(self) -> int | None:
        return self._settings.length

    @property
    def scheme(self) -> str:
        return SCHEMES[self._batch.scheme]

    @property
    def layout(self) -> str:
        return LAYOUTS[self._batch.layout]

    @property
    def padding_side(self) -> str:
        return SIDES[self._batch.left]

    @property
    def unused_features(self) -> str:
        return UNUSED[self._batch.unused]

    @property
    def feature_starts(self) -> tuple[int, ...]:
        kinds = self._batch.kinds
        starts = kinds[1::KIND_FIELDS]
        return (*starts, starts[-1] + kinds[-3]) if kinds else (0,)

    @property
    def kind_tokens(self) -> tuple[int, ...]:
        """Placeholder id of each kind, in order."""
        return self._batch.kinds[::KIND_FIELDS]

    @property
    def device(self) -> torch.device:
        return self.source_index.device

    @property
    def token_shape(self) -> torch.Size:
        """(B, T) of the tokens that the plan was made from."""
        return self._batch.tokens.shape

    # --- facts of the rows

    def _fact(self, name: str) -> Tensor:
        found = self._facts.get(name)
        if found is None:
            self._make(self._group(name))
            found = self._facts[name]
        return found

    def _group(self, name: str) -> tuple[str, ...]:
        """The facts made together when one of them is first read: those of a training step in one pass, or one alone."""
        batch = self._batch
        if name in _SELDOM or "position_ids" in self._facts or (name == "cu_seqlens" and batch.document_ids is not None):
            return (name,)
        if batch.document_ids is None:
            return _STEP if batch.labels is None else _STEP_LABELS
        return _STEP[:-1] if batch.labels is None else _STEP_LABELS[:-1]  # how many documents there are is not known yet

    def _make(self, names: tuple[str, ...]) -> None:
        """Facts of the rows in one pass over the tokens, kept for the next reader."""
        versions = _versions(self._batch)
        if versions and self._versions and versions != self._versions:
            raise RuntimeError(
                f"{', '.join(names)}: made when first read, but the tokens, attention_mask, document_ids or labels were changed in place since "
                "the plan was made; read it before, or give merge clones"
            )
        made = ops.facts(self._batch, self._width, names, self._settings.max_documents, self._settings.backend)
        if self._target is not None:
            made = tuple([fact.to(self._target, non_blocking=True) for fact in made])
        self._facts.update(zip(names, made))
        if "position_ids" in names and self._settings.parent_ids is not None:
            parent_ids = torch.as_tensor(self._settings.parent_ids, device=self.device)
            self._facts["position_ids"] = after_parents(self._facts["position_ids"], self.document_ids, parent_ids)

    @property
    def text_index(self) -> Tensor:
        return self._fact("text_index")

    @property
    def position_ids(self) -> Tensor:
        return self._fact("position_ids")

    @property
    def document_ids(self) -> Tensor:
        return self._fact("document_ids")

    @property
    def image_ids(self) -> Tensor:
        return self._fact("image_ids")

    @property
    def kind_ids(self) -> Tensor:
        return self._fact("kind_ids")

    @property
    def attention_mask(self) -> Tensor:
        return self._fact("attention_mask")

    @property
    def labels(self) -> Tensor | None:
        return None if self._batch.labels is None else self._fact("labels")

    @property
    def cu_seqlens(self) -> Tensor:
        return self._fact("cu_seqlens")

    @property
    def max_seqlen(self) -> int:
        found = self._facts.get("max_seqlen")
        if found is None:
            lengths = self.cu_seqlens.diff()
            found = self._facts["max_seqlen"] = int(lengths.max()) if lengths.numel() else 0
        return found

    # --- masks

    @property
    def _may_have_holes(self) -> bool:
        batch = self._batch
        return LAYOUTS[batch.layout] == "keep" and (batch.attention_mask is not None or batch.document_ids is not None)

    def mask(self, attend: Attend | None = None) -> IntervalMask:
        """Who sees whom among the output rows, for one layer type.

        Args:
            attend: default the plan's own; where that is a dict, name one of its values.

        Returns:
            IntervalMask: of ``(G, W)`` rows and W keys; made once for each `attend`.

        Raises:
            ValueError: a row that would need more than two intervals.

        Example:
            >>> import torch, vlm_fuse
            >>> made = vlm_fuse.plan(torch.tensor([[1, 2, 3]]), image_token_id=9)
            >>> made.mask(vlm_fuse.Attend(window=2)).kv_lo
            tensor([[0, 0, 1]], dtype=torch.int32)
        """
        attend = self._own_attend("mask()") if attend is None else attend
        if not isinstance(attend, Attend):
            raise TypeError(f"attend: expected an Attend, got {type(attend).__name__}")
        found = self._masks.get(attend)
        if found is None:
            _, _, _, validate, backend, _, prefix_lengths, parent_ids, _ = self._settings
            needs_images = attend.images != "causal"
            pair = self._may_have_holes or bool(attend.sinks) or prefix_lengths is not None or parent_ids is not None
            pair = pair or (needs_images and attend.window is not None) or (needs_images and attend.chunk_size is not None)
            image_ids = self.image_ids if needs_images else None
            parts = ops.intervals(self.document_ids, image_ids, attend, prefix_lengths, parent_ids, pair=pair, validate=validate, backend=backend)
            found = self._masks[attend] = IntervalMask(parts[0], parts[1], self._width, *parts[2:])
        return found

    def _own_attend(self, asked: str) -> Attend:
        if isinstance(self.attend, Mapping):
            raise AttributeError(f"{asked}: attend is a dict of layer types {list(self.attend)}; use plan.mask(attend) with one of its values")
        return self.attend

    @property
    def kv_lo(self) -> Tensor:
        return self.mask(self._own_attend("kv_lo")).kv_lo

    @property
    def kv_hi(self) -> Tensor:
        return self.mask(self._own_attend("kv_hi")).kv_hi

    @property
    def kv_lo2(self) -> Tensor | None:
        return self.mask(self._own_attend("kv_lo2")).kv_lo2

    @property
    def kv_hi2(self) -> Tensor | None:
        return self.mask(self._own_attend("kv_hi2")).kv_hi2

    # --- moving it

    def _moved(self, move) -> TokenPlan:
        plan = object.__new__(TokenPlan)
        for name in TokenPlan.__slots__[:-1]:
            setattr(plan, name, getattr(self, name))
        plan.source_index = move(self.source_index)
        plan._facts = {name: move(fact) if isinstance(fact, Tensor) else fact for name, fact in self._facts.items()}
        plan._masks = {}
        return plan

    def to(self, device: torch.device | str, non_blocking: bool = True) -> TokenPlan:
        """The plan on another device. Facts not made yet are made where the tokens are, and sent when first read.

        Example:
            >>> import torch, vlm_fuse
            >>> vlm_fuse.plan(torch.tensor([[1, 2]]), image_token_id=9).to("cpu").device
            device(type='cpu')
        """
        device = torch.device(device)
        plan = self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        plan._target = None if device == self._batch.tokens.device else device
        return plan

    def pin_memory(self) -> TokenPlan:
        """The plan in page-locked memory, from which copies to a GPU need not wait. Needs a GPU."""
        return self._moved(lambda tensor: tensor.pin_memory())

    def __getstate__(self):
        return {name: getattr(self, name) for name in TokenPlan.__slots__[:-1] if name not in ("_versions", "_masks")}

    def __setstate__(self, state) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._masks, self._versions = {}, _versions(self._batch)

    # --- what merging needs beside the rows

    def with_labels(self, labels: Tensor) -> TokenPlan:
        """The same plan for labels given later."""
        plan = self._moved(lambda tensor: tensor)
        plan._batch = self._batch._replace(labels=labels.to(self._batch.tokens.device).contiguous())
        plan._versions = _versions(plan._batch)
        return plan

    def unpack_index(self) -> Tensor:
        """int32 ``(B, T)`` or ``(B, longest sample)``: -1 - r for the output row r that goes there, else -2**31."""
        found = self._facts.get("unpack_index")
        if found is None:
            found = self._facts["unpack_index"] = self._unpack_index()
        return found

    def _unpack_index(self) -> Tensor:
        samples, tokens = self._batch.tokens.shape
        groups, width = self.source_index.shape
        device = self.source_index.device
        row = torch.arange(groups * width, dtype=torch.int32, device=device)
        if self.scheme == "placeholders":
            text_index = self.text_index.reshape(-1).long()
            place = torch.where(text_index < 0, samples * tokens, text_index)
            index = torch.full((samples * tokens + 1,), PAD, dtype=torch.int32, device=device)
            return index.scatter_(0, place, -1 - row)[:-1].view(samples, tokens)
        rows, longest = self._rows_per_sample()
        column = torch.arange(longest, device=device).expand(samples, longest)
        within = column - (longest - rows)[:, None] if self.padding_side == "left" else column
        there = (within >= 0) & (within < rows[:, None])
        if self.layout == "packed":
            address = (rows.cumsum(0) - rows)[:, None] + within
        else:
            first = (width - rows)[:, None] if self.padding_side == "left" else 0
            address = torch.arange(samples, device=device)[:, None] * width + first + within
        return torch.where(there, -1 - address, PAD).int()

    def _rows_per_sample(self) -> tuple[Tensor, int]:
        """((B,) int64 kept rows, the largest of them)."""
        plain = self._batch._replace(document_ids=None, attention_mask=self._kept_tokens())
        (bounds,) = ops.facts(plain, self._width, ("cu_seqlens",), 0, self._settings.backend)
        rows = bounds.diff().long().to(self.source_index.device)
        return rows, int(rows.max()) if rows.numel() else 0

    def _kept_tokens(self) -> Tensor | None:
        batch = self._batch
        if batch.document_ids is None:
            return batch.attention_mask
        kept = batch.document_ids >= 0
        return kept if batch.attention_mask is None else kept & (batch.attention_mask != 0)


def _versions(batch: Batch) -> tuple:
    """Counters that PyTorch raises at every write in place; inference tensors have none."""
    if torch.compiler.is_compiling():
        return ()
    tokens, attention_mask, document_ids, labels = batch[:4]
    try:
        return (
            tokens._version,
            attention_mask is None or attention_mask._version,
            document_ids is None or document_ids._version,
            labels is None or labels._version,
        )
    except RuntimeError:  # "Inference tensors do not track version counter"
        return ()
