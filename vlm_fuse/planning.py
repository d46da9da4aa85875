"""The token plan: for every output row the integers that say where it comes from and where it belongs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import checks, ops
from . import features as forms
from .attending import Attend
from .backend import name_from
from .batch import KIND_FIELDS, LAYOUTS, PAD, SCHEMES, Batch
from .masks import IntervalMask

COMBINE = ("replace", "add")
SIDES = ("right", "left")
UNUSED = ("error", "allow")
VALIDATE = ("auto", "sync", "async", "off")

_SELDOM = ("text_index", "image_ids", "kind_ids")
_STEP = ("position_ids", "document_ids", "attention_mask", "cu_seqlens")
_STEP_LABELS = ("labels", *_STEP)


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

    __slots__ = (
        "_batch", "_width", "_facts", "_masks", "_versions", "_target", "attend", "prefix_lengths", "parent_ids", "max_documents",
        "validate", "backend", "combine", "length", "masked_by_tensor", "source_index", "__weakref__",
    )  # fmt: skip

    def __init__(self, batch: Batch, attend, prefix_lengths, parent_ids, max_documents, validate, backend, combine, length, masked_by_tensor):
        self._batch = batch
        self._facts: dict = {}
        self._masks: dict = {}
        self._target = None  # device that facts are sent to, where it is not the batch's own
        self._versions = _versions(batch)
        self.attend, self.prefix_lengths, self.parent_ids, self.max_documents = attend, prefix_lengths, parent_ids, max_documents
        self.validate, self.backend, self.combine, self.length = validate, backend, combine, length
        self.masked_by_tensor = masked_by_tensor
        self.source_index = ops.plan(
            batch, batch.tokens.shape[1] if LAYOUTS[batch.layout] == "keep" else length, ops.mode_of(validate, batch.tokens), backend
        )
        self._width = self.source_index.shape[1]

    def __repr__(self) -> str:
        batch = self._batch
        return (
            f"TokenPlan({SCHEMES[batch.scheme]}, {LAYOUTS[batch.layout]}, tokens={tuple(batch.tokens.shape)}, "
            f"rows={tuple(self.source_index.shape)}, kinds={batch.kind_count}, device={self.source_index.device})"
        )

    # --- what it was made with

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
        made = ops.facts(self._batch, self._width, names, self.max_documents, self.backend)
        if self._target is not None:
            made = tuple([fact.to(self._target, non_blocking=True) for fact in made])
        self._facts.update(zip(names, made))

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
            needs_images = attend.images != "causal"
            pair = self._may_have_holes or bool(attend.sinks) or self.prefix_lengths is not None or self.parent_ids is not None
            pair = pair or (needs_images and attend.window is not None) or (needs_images and attend.chunk_size is not None)
            image_ids = self.image_ids if needs_images else None
            parts = ops.intervals(
                self.document_ids, image_ids, attend, self.prefix_lengths, self.parent_ids, pair=pair, validate=self.validate, backend=self.backend
            )
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
        (bounds,) = ops.facts(plain, self._width, ("cu_seqlens",), 0, self.backend)
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


def make(
    tokens: Tensor, attention_mask, labels, document_ids, kinds: tuple[forms.Kind, ...], feature_counts, masked_by_tensor: bool,
    scheme: str, combine: str, layout: str, padding_side: str, length, attend, unused_features: str, validate: str, backend: str,
    prefix_lengths=None, parent_ids=None, max_documents=None,
) -> TokenPlan:  # fmt: skip
    """The plan of a checked batch. `kinds` as `features.describe` gives them."""
    words = (scheme, combine, layout, padding_side, unused_features, validate)
    if words not in _known_words:
        _check_words(words)
    if length is not None:
        _check_length(length, layout)
    if type(attend) is not Attend:
        _check_attend(attend)
    if scheme != "placeholders":
        _check_scheme(scheme, combine, layout, document_ids)
    samples, unused = tokens.shape[0], unused_features == "allow"
    counts = None
    if feature_counts is not None:
        counts = forms.counts_table(feature_counts, kinds, samples, masked_by_tensor, tokens.device)
    if counts is not None or scheme != "placeholders" or forms.unsettled(kinds):
        kinds = forms.settle(kinds, counts, scheme, unused, samples)
    batch = Batch(
        tokens if tokens.is_contiguous() else tokens.contiguous(),
        _integers(attention_mask),
        None if document_ids is None else document_ids.contiguous(),
        None if labels is None else labels.contiguous(),
        forms.flat(kinds),
        forms.sizes_tensor(kinds, tokens.device) if kinds else None,
        counts,
        SCHEMES.index(scheme),
        LAYOUTS.index(layout),
        padding_side == "left",
        unused,
    )
    backend = name_from(backend)
    for kind in kinds:
        if kind.rows < 0:
            batch = _count_rows(batch, kinds, backend)
            break
    return TokenPlan(batch, attend, prefix_lengths, parent_ids, max_documents, validate, backend, combine, length, masked_by_tensor)


def _integers(attention_mask: Tensor | None) -> Tensor | None:
    if attention_mask is None:
        return None
    if attention_mask.dtype not in checks.MASK_DTYPES:
        return attention_mask != 0
    return attention_mask.contiguous()


def _count_rows(batch: Batch, kinds: tuple[forms.Kind, ...], backend: str) -> Batch:
    """Without sizes, counts or tensors a kind has as many rows as placeholders; known after they are counted."""
    placeholders = ops.count(batch, backend)[3]
    kinds = tuple(kind if kind.rows >= 0 else kind._replace(rows=number) for kind, number in zip(kinds, placeholders))
    return batch._replace(kinds=forms.flat(kinds))


_known_words: set = set()  # combinations that were checked already


def _check_words(words: tuple[str, ...]) -> None:
    names = ("scheme", "combine", "layout", "padding_side", "unused_features", "validate")
    for name, word, allowed in zip(names, words, (SCHEMES, COMBINE, LAYOUTS, SIDES, UNUSED, VALIDATE)):
        checks.choice(name, word, allowed)
    _known_words.add(words)


def _check_length(length, layout: str) -> None:
    if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)) or (isinstance(length, int) and length < 0):
        raise ValueError(f"length: expected a number of rows, got {length!r}")
    if layout == "keep":
        raise ValueError("length: layout='keep' has the width of input_ids; take layout='padded' or 'packed'")


def _check_attend(attend) -> None:
    wrong = [value for value in attend.values() if not isinstance(value, Attend)] if isinstance(attend, Mapping) else [attend]
    if wrong and not isinstance(wrong[0], Attend):
        raise TypeError(f"attend: expected an Attend or a dict {{layer type: Attend}}, got {type(wrong[0]).__name__}")


def _check_scheme(scheme: str, combine: str, layout: str, document_ids) -> None:
    if layout == "keep":
        raise ValueError(f"layout: 'keep' is the layout of input_ids, but scheme={scheme!r} changes the number of rows; take layout='padded' or 'packed'")
    if scheme == "images_first" and document_ids is not None:
        raise ValueError("document_ids: refused with scheme='images_first', whose images stand in front of whole samples")
    if scheme == "images_first" and combine == "add":
        raise ValueError("combine: 'add' needs a placeholder to add to; images_first has none")


def plan(
    input_ids: Tensor | None,
    *,
    image_token_id: int | tuple[int, ...] | None = None,
    placeholder_mask: Tensor | None = None,
    image_sizes=None,
    feature_counts=None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    document_ids: Tensor | None = None,
    scheme: str = "placeholders",
    combine: str = "replace",
    layout: str = "keep",
    padding_side: str = "right",
    length: int | None = None,
    attend: Attend | Mapping[str, Attend] = Attend(),
    unused_features: str = "error",
    validate: str = "auto",
    backend: str = "auto",
    prefix_lengths=None,
    parent_ids=None,
    max_documents: int | None = None,
) -> TokenPlan:
    """The token plan of a batch, made ahead of the rows: on any device, also in a data-loader worker.

    A mismatch of placeholders, sizes and counts is found here, where the sample can still be named. The arguments mean
    what they mean in `merge`.

    Args:
        input_ids: ``(B, T)`` int32 or int64. May be None with `placeholder_mask`.
        image_token_id: the placeholder's id; a tuple of ids for several kinds.
        placeholder_mask: ``(B, T)`` bool instead of an id.
        image_sizes: feature rows of each image in reading order: ints, an int tensor, or a dict by placeholder id.
        feature_counts: ``(B,)`` feature rows that each sample owns, or a dict by placeholder id.
        attention_mask: ``(B, T)``, nonzero = token.
        labels: ``(B, T)`` int32 or int64.
        document_ids: ``(B, T)`` int32 or int64, below 0 = padding.
        scheme, combine, layout, padding_side, length, attend, unused_features, validate, backend: as in `merge`.
        prefix_lengths: int, or ints by output document id: that many leading tokens of a document are seen by all of it.
        parent_ids: ints by output document id, -1 = none: a document also sees all of that earlier document.
        max_documents: with document_ids, makes ``cu_seqlens`` ``(max_documents + 1,)`` long, without a read-back on a GPU.

    Returns:
        TokenPlan: for `merge(..., plan=...)`, `add_features`, and its own facts.

    Raises:
        ValueError, TypeError: as `merge`.

    Example:
        >>> import torch, vlm_fuse
        >>> made = vlm_fuse.plan(torch.tensor([[5, 9, 9, 6], [0, 0, 7, 8]]), image_token_id=9,
        ...                      attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]), layout="packed")
        >>> made.source_index
        tensor([[-1,  0,  1, -4, -7, -8]], dtype=torch.int32)
        >>> made.position_ids
        tensor([[0, 1, 2, 3, 0, 1]])
        >>> made.cu_seqlens
        tensor([0, 4, 6], dtype=torch.int32)
    """
    tokens = checks.batch_tensors(input_ids, placeholder_mask, attention_mask, labels, document_ids)
    if image_token_id is None and placeholder_mask is None and scheme == "placeholders" and not isinstance(image_sizes, Mapping):
        if image_sizes is not None or feature_counts is not None:
            raise ValueError("image_token_id: image_sizes or feature_counts say how many rows there are, but not which id marks them")
    kinds = forms.describe(None, image_token_id, image_sizes, placeholder_mask, scheme)
    if max_documents is not None and (isinstance(max_documents, bool) or not isinstance(max_documents, int) or max_documents < 0):
        raise ValueError(f"max_documents: expected a number of documents, got {max_documents!r}")
    made = make(
        tokens, attention_mask, labels, document_ids, kinds, feature_counts, placeholder_mask is not None, scheme, combine, layout,
        padding_side, length, attend, unused_features, validate, backend, prefix_lengths, parent_ids, max_documents,
    )  # fmt: skip
    if max_documents is not None and document_ids is not None and tokens.is_cpu and validate in ("auto", "sync"):
        documents = ops.count(made._batch, made.backend)[2]
        if documents > max_documents:
            raise ValueError(f"max_documents: the batch has {documents} documents, more than {max_documents}; raise max_documents")
    return made

