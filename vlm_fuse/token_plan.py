"""`TokenPlan`: for every output row the integers that say where it comes from and where it belongs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import checks, mask_ops, ops
from .attending import Attend
from .batch import IGNORE_INDEX, KIND_FIELDS, LAYOUTS, PAD, SCHEMES, Batch
from .masks import IntervalMask
from .positions import after_parents
from .transfer import sent

if TYPE_CHECKING:
    from .sharding import PlanShard

SIDES = ("right", "left")
UNUSED = ("error", "allow")

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


class _Fact:
    """A tensor of the plan that is made when first read; from then on it stands in the plan's __dict__, before this."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, plan: TokenPlan | None, owner: type):
        if plan is None:
            return self
        name = self.name
        if name == "labels" and plan._batch.labels is None:
            return None
        fill = plan._fill
        if fill is not None and name not in _SELDOM and not is_compiling():
            plan._keep(_STEP if plan._batch.labels is None else _STEP_LABELS, fill(plan._batch, plan._versions, plan.source_index))
            plan._fill = None
        else:
            plan._make(plan._group(name))
        return plan.__dict__[name]


class _Once:
    """A method read as an attribute, called once. (functools.cached_property takes a lock, which torch.compile refuses.)"""

    def __init__(self, make):
        self.make, self.name, self.__doc__ = make, make.__name__, make.__doc__

    def __get__(self, plan: TokenPlan | None, owner: type):
        if plan is None:
            return self
        made = plan.__dict__[self.name] = self.make(plan)
        return made


class TokenPlan:
    """What `plan` returns and `merge` makes: index tensors of the output rows, each made when it is first read (or, where
    labels are given, together with source_index).

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

    _where: tuple[str, ...] = ()  # what is made again where the plan is moved to
    _is_ambiguous = False  # whose tokens are given, a shard's or the batch's
    _tokens_are = "the tokens that the plan was made from"  # in an error

    def __init__(self, batch: Batch, settings: Settings, source_index: Tensor, fill=None, versions: tuple | None = None, step_facts: tuple[Tensor, ...] = ()):
        """`fill`: a backend's `step_facts`, where it may be called on this batch without a further look; or what it gave."""
        self._batch = batch
        self._settings = settings
        self._masks: dict = {}
        self._own_intervals = None  # int32 (2, at least G * W), kv_lo and kv_hi of settings.attend, where they were made with the rows
        self._target = None  # device that facts are sent to, where it is not the batch's own
        self._fill = fill
        self._versions = _versions(batch) if versions is None else versions
        self.source_index = source_index
        if step_facts:
            self.labels, self.position_ids, self.document_ids, self.attention_mask, self.cu_seqlens = step_facts

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
    def has_document_ids(self) -> bool:
        """Whether the rows came with ids of documents, so that one may hold several."""
        return self._batch.document_ids is not None

    @property
    def device(self) -> torch.device:
        return self.source_index.device

    @property
    def token_shape(self) -> torch.Size:
        """(B, T) of the tokens that the plan was made from."""
        return self._batch.tokens.shape

    # --- facts of the rows

    text_index = _Fact()
    position_ids = _Fact()
    document_ids = _Fact()
    image_ids = _Fact()
    kind_ids = _Fact()
    attention_mask = _Fact()
    labels = _Fact()
    cu_seqlens = _Fact()

    def _group(self, name: str) -> tuple[str, ...]:
        """The facts made together when one of them is first read: those of a training step in one pass, or one alone."""
        batch = self._batch
        if name in _SELDOM or "position_ids" in self.__dict__ or (name == "cu_seqlens" and batch.document_ids is not None):
            return (name,)
        if batch.document_ids is None:
            return _STEP if batch.labels is None else _STEP_LABELS
        return _STEP[:-1] if batch.labels is None else _STEP_LABELS[:-1]  # how many documents there are is not known yet

    def _make(self, names: tuple[str, ...]) -> None:
        made, batch = None, self._batch
        if not _written(self._versions, _versions(batch)):
            made = ops.facts(batch, self.source_index.shape[1], names, self._settings.max_documents, self._settings.backend)
        self._keep(names, made)

    def _keep(self, names: tuple[str, ...], made: tuple[Tensor, ...] | None) -> None:
        """Facts made in one pass over the tokens, kept for the next reader. None: the tokens are not what they were."""
        if made is None:
            raise RuntimeError(
                f"{', '.join(names)}: made when first read, but the tokens, attention_mask, document_ids or labels were changed in place since "
                "the plan was made; read it before, or give merge clones"
            )
        if self._target is not None:
            made = tuple([sent(fact, self._target) for fact in made])
        self.__dict__.update(zip(names, made))
        if self._settings.parent_ids is not None and "position_ids" in names:
            parent_ids = self._settings.parent_ids
            checks.documents_of(self.document_ids, None, parent_ids)
            self.position_ids = after_parents(self.position_ids, self.document_ids, parent_ids.to(self.device))

    @_Once
    def max_seqlen(self) -> int:
        lengths = self.cu_seqlens.diff()
        return int(lengths.max()) if lengths.numel() else 0

    @_Once
    def shift_labels(self) -> Tensor | None:
        """labels one to the left, -100 behind: what each row predicts. For losses that do not shift themselves, as transformers' do
        with ``shift_labels=``; under context parallelism a row's next token may be another rank's."""
        return None if self.labels is None else shifted_rows(self.labels, IGNORE_INDEX)

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
        checks.attend_of(attend)
        found = self._masks.get(attend)
        if found is None and self._own_intervals is not None and attend == self.attend:
            shape = self.source_index.shape
            kv_lo, kv_hi = (bounds[: shape.numel()].view(shape) for bounds in self._own_intervals)
            found = self._masks[attend] = IntervalMask._of((kv_lo, kv_hi, None, None), shape[1])
        if found is None:
            _, _, _, validate, backend, _, prefix_lengths, parent_ids, _ = self._settings
            needs_images = attend.images != "causal"
            pair = self._may_have_holes or bool(attend.sinks) or prefix_lengths is not None or parent_ids is not None
            pair = pair or (needs_images and attend.window is not None) or (needs_images and attend.chunk_size is not None)
            image_ids = self.image_ids if needs_images else None
            parts = mask_ops.intervals(self.document_ids, image_ids, attend, prefix_lengths, parent_ids, pair=pair, validate=validate, backend=backend)
            found = self._masks[attend] = IntervalMask._of(parts, self.source_index.shape[1])
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

    # --- parts of it

    def shard(self, rank: int, world_size: int, *, order: str = "contiguous", features: str = "all") -> PlanShard:
        """The plan of the rows that one rank has, where ranks share every row out (context or sequence parallelism).

        ``merge(shard.input_ids, embedding(shard.input_ids), image_embeds, plan=shard)`` makes those rows and no others; with
        ``weight=`` the lookup is fused as ever. Ids and embeddings of the whole batch do as well, of which the rank's rows are
        read. `add_features` takes the shard too.

        Args:
            rank: of this rank in the group that shares the rows out, from 0 (``mesh.get_local_rank()``).
            world_size: ranks of that group (``mesh.size()``).
            order: "contiguous": rank r has the r-th part of each row. "zigzag": the r-th piece of 2 * world_size from the front and
                from the back, so that all have like work under a causal mask.
            features: "all": every rank gives the features of the whole batch. "own": only of the images in ``shard.images``, so that
                none runs the vision tower for rows that it does not have; where they are none, whatever rows are given (of a dummy
                image, so that every rank runs the tower) get a zero gradient. Reads the plan on the host.

        Returns:
            PlanShard: a TokenPlan of ``(G, W / world_size)`` rows; `slice` cuts what else has the whole's rows, `restore` puts
            gathered rows in order.

        Raises:
            ValueError: a number of rows that does not divide, a rank that is none, "own" without image sizes.

        Example:
            >>> import torch, vlm_fuse
            >>> whole = vlm_fuse.plan(torch.tensor([[1, 9, 9, 2, 3, 4]]), image_token_id=9)
            >>> shard = whole.shard(1, 3)
            >>> shard.input_ids, shard.source_index, shard.position_ids
            (tensor([[0, 2]]), tensor([[ 1, -2]], dtype=torch.int32), tensor([[2, 3]]))

        Source: context parallelism, Llama 3 (arXiv 2407.21783, section 3.3.2); sequence parallelism, arXiv 2205.05198.
        """
        from .sharding import PlanShard  # a plan itself, made from this one

        return PlanShard(self, rank, world_size, order, features)

    def pack(self, values: Tensor, fill=0) -> Tensor:
        """What each token has, at the rows of the output: the way back of `MergedBatch.unpack`. Differentiable.

        Args:
            values: ``(B, T, ...)`` beside input_ids: weights of the loss, embeddings.
            fill: at rows that stand for no token (padding, image rows but those of "placeholders").

        Returns:
            Tensor: ``(G, W, ...)``.

        Raises:
            ValueError: values of another batch.

        Example:
            >>> import torch, vlm_fuse
            >>> made = vlm_fuse.plan(torch.tensor([[1, 2, 0], [0, 0, 3]]), image_token_id=9, length=4, layout="packed",
            ...                      attention_mask=torch.tensor([[1, 1, 0], [0, 0, 1]]))
            >>> made.pack(torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]))
            tensor([[0.1000, 0.2000, 0.6000, 0.0000]])
        """
        checks.tensor("values", values)
        shape = self._value_shape
        if values.shape[:2] != shape:
            raise ValueError(f"values: expected {tuple(shape)} and any further dimensions, as input_ids, got {tuple(values.shape)}")
        index = self._token_index
        checks.same_device("values", values, index.device, "the plan")
        flat = values.flatten(0, 1)
        if not len(flat):  # nothing to take, but still part of the graph
            flat = torch.cat([flat, flat.new_full((1, *flat.shape[1:]), fill)])
        there = (index >= 0).view(*index.shape, *(1,) * (values.dim() - 2))
        return torch.where(there, flat[index.clamp(min=0).long()], fill)

    @property
    def _token_index(self) -> Tensor:
        """(G, W) tokens of the batch that the rows stand for; a shard's text_index counts its own."""
        return self.text_index

    @property
    def _batch_source_index(self) -> Tensor:
        """source_index that counts the batch's tokens, also for a shard."""
        return self.source_index

    def _numbering(self, shape: torch.Size, input_ids: Tensor | None) -> TokenPlan:
        """What numbers the rows of tokens of this shape; a shard's may be its own or the batch's."""
        return self

    @property
    def _batch_tokens(self) -> Tensor:
        """The batch's tokens, also for a shard."""
        return self._batch.tokens

    @property
    def _value_shape(self) -> torch.Size:
        """(B, T) of the batch, also for a shard of it."""
        return self.token_shape

    # --- moving it

    def _moved(self, move) -> TokenPlan:
        plan = object.__new__(type(self))
        plan.__dict__.update({name: move(value) if isinstance(value, Tensor) else value for name, value in self.__dict__.items() if name not in self._where})
        plan._masks = {attend: mask._moved(move) for attend, mask in self._masks.items()}
        return plan

    def to(self, device: torch.device | str, non_blocking: bool = True) -> TokenPlan:
        """The plan on another device, masks made so far included. Facts not made yet are made where the tokens are, and sent when
        first read.

        Args:
            device: where to.
            non_blocking: the host does not wait for copies to a GPU. For those to the CPU it always does.

        Example:
            >>> import torch, vlm_fuse
            >>> vlm_fuse.plan(torch.tensor([[1, 2]]), image_token_id=9).to("cpu").device
            device(type='cpu')
        """
        device = torch.device(device)
        plan = self._moved(lambda tensor: sent(tensor, device, non_blocking))
        plan._target = None if device == self._batch.tokens.device else device
        return plan

    def pin_memory(self) -> TokenPlan:
        """The plan in page-locked memory, from which copies to a GPU need not wait. Needs a GPU."""
        return self._moved(lambda tensor: tensor.pin_memory())

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name not in ("_versions", "_fill")}

    def __setstate__(self, state) -> None:
        self.__dict__.update(state)
        self._versions, self._fill = _versions(self._batch), None

    # --- what merging needs beside the rows

    def with_labels(self, labels: Tensor) -> TokenPlan:
        """The same plan for labels given later."""
        plan = self._moved(lambda tensor: tensor)
        plan._batch = self._batch._replace(labels=labels.to(self._batch.tokens.device).contiguous())
        plan._versions, plan._fill = _versions(plan._batch), None
        plan.__dict__.pop("labels", None)
        plan.__dict__.pop("shift_labels", None)
        return plan

    @_Once
    def unpack_index(self) -> Tensor:
        """int32 ``(B, T)`` or ``(B, longest sample)``: -1 - r for the output row r that goes there, else -2**31."""
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
            fits = address < width
        else:
            first = (width - rows).clamp(min=0)[:, None] if self.padding_side == "left" else 0
            address = torch.arange(samples, device=device)[:, None] * width + first + within
            fits = within < width
        return torch.where(there & fits, -1 - address, PAD).int()

    def _rows_per_sample(self) -> tuple[Tensor, int]:
        """((B,) int64 kept rows, the largest of them)."""
        plain = self._batch._replace(document_ids=None, attention_mask=self._kept_tokens())
        (bounds,) = ops.facts(plain, self.source_index.shape[1], ("cu_seqlens",), 0, self._settings.backend)
        rows = bounds.diff().long().to(self.source_index.device)
        return rows, int(rows.max()) if rows.numel() else 0

    def _kept_tokens(self) -> Tensor | None:
        batch = self._batch
        if batch.document_ids is None:
            return batch.attention_mask
        kept = batch.document_ids >= 0
        return kept if batch.attention_mask is None else kept & (batch.attention_mask != 0)


def shifted_rows(rows: Tensor, fill) -> Tensor:
    """``(G, W)``: each row one to the left, `fill` behind."""
    return torch.cat([rows[:, 1:], rows.new_full((rows.shape[0], min(1, rows.shape[1])), fill)], dim=1)


def _written(then: tuple, now: tuple) -> bool:
    return bool(then and now) and then != now


def _versions(batch: Batch) -> tuple:
    """Counters that PyTorch raises at every write in place; inference tensors have none."""
    if is_compiling():
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
