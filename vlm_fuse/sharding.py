"""`TokenPlan.shard`: the rows of one rank, where several ranks share out every row of the batch.

Context parallelism and sequence parallelism cut the sequence; what a rank needs of the plan is then the plan of its own rows,
which numbers the rank's own text rows and (all or the rank's own) feature rows. No rank makes rows of another.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from . import checks
from .attending import Attend
from .batch import PAD, Batch
from .masks import IntervalMask
from .token_plan import TokenPlan, _Once
from .transfer import sent

ORDERS = ("contiguous", "zigzag")
FEATURES = ("all", "own")


class OverBatch:
    """A shard's rows as numbers of the whole batch's tokens, for a call that gives those."""

    def __init__(self, shard: PlanShard):
        self._shard, device = shard, shard.source_index.device
        own = sent(shard.slice(shard.whole._batch_source_index), device)
        self.source_index = torch.where(shard.source_index >= 0, shard.source_index, own)
        self.token_shape = shard._value_shape

    @property
    def text_index(self) -> Tensor:
        return sent(self._shard._token_index, self.source_index.device).contiguous()


class PlanShard(TokenPlan):
    """The plan of one rank's rows: a TokenPlan over tokens of its own, for `merge` and `add_features` on that rank.

    Its facts are the whole plan's, cut to the rank's rows: position_ids, document_ids, labels, ... ``(G, w)``. Its masks have w
    query rows and the keys of the whole row. cu_seqlens, max_seqlen are those of the whole: documents do not change by being cut.
    source_index and text_index count the shard's own tokens; `merge` takes the whole batch's ids and embeddings as well, and reads the
    rank's rows of them.

    Attributes:
        whole: the TokenPlan that it is a shard of.
        runs: ((start, stop), ...) the columns of the whole that this rank has, in its order.
        input_ids: ``(G, w)`` ids to embed; see there.
    """

    _where = ("_over_batch", "_ids")
    _tokens_are = "shard.input_ids, the tokens of this rank's rows, or of the whole batch's input_ids; the former"

    def __init__(self, whole: TokenPlan, rank: int, world_size: int, order: str, features: str):
        checks.choice("order", order, ORDERS)
        checks.choice("features", features, FEATURES)
        self.whole, self.order = whole, order
        self.rank, self.world_size = _place(rank, world_size)
        self.runs = _runs(whole.source_index.shape[1], self.rank, self.world_size, order, whole.layout)
        source_index = self.slice(whole.source_index)
        batch, settings = whole._batch, whole._settings
        kinds, image_rows, unused = batch.kinds, batch.image_rows, batch.unused
        if features == "own":
            source_index, kinds, image_rows, read = _with_own_images(source_index, batch)
            unused = unused or not read  # a rank that reads none still has to run the tower, on whatever
        text = (source_index < 0) & (source_index != PAD)
        token = self.slice(whole.text_index) if settings.combine == "add" else torch.where(text, -1 - source_index, -1)  # to be embedded
        ids = sent(batch.tokens, source_index.device).reshape(-1)
        nothing = ids.new_zeros(())
        tokens = torch.where(token >= 0, ids[token.clamp(min=0).long()], nothing) if len(ids) else nothing.expand(token.shape).contiguous()
        # labels stand here only to say that there are some: the facts are cut from the whole's
        own = Batch(tokens, None, None, batch.labels, kinds, image_rows, None, batch.scheme, batch.layout, batch.left, unused)
        super().__init__(own, settings, torch.where(text, -1 - _counted(source_index), source_index))

    def __repr__(self) -> str:
        return f"PlanShard(rank {self.rank} of {self.world_size}, {self.order}, rows={tuple(self.source_index.shape)}, of {self.whole!r})"

    @property
    def input_ids(self) -> Tensor:
        """``(G, w)`` ids to embed on this rank: the token of each row, 0 where no embedding is read (image rows that are replaced,
        padding), so that an id outside the table reaches no embedding.

        Raises:
            ValueError: the plan was made from a placeholder_mask, which knows no ids.
        """
        if self._settings.masked_by_tensor:
            raise ValueError("input_ids: the plan was made from a placeholder_mask; cut the embeddings instead, shard.pack(inputs_embeds)")
        return self._ids

    @property
    def has_document_ids(self) -> bool:
        return self.whole.has_document_ids

    # --- rows of the whole and of this rank

    def slice(self, rows: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a tensor in the layout of the whole: M-RoPE positions, hidden states, loss weights.

        Args:
            rows: any tensor with the W rows of the whole along `dim`.
            dim: e.g. -1 for position_ids ``(3, G, W)``.

        Returns:
            Tensor: with w rows along `dim`; a view where they lie together. Differentiable.

        Raises:
            ValueError: another number of rows.

        Example:
            >>> import torch, vlm_fuse
            >>> whole = vlm_fuse.plan(torch.arange(8)[None], image_token_id=99)
            >>> whole.shard(1, 2, order="zigzag").slice(torch.arange(8)[None])
            tensor([[2, 3, 4, 5]])
        """
        checks.tensor("rows", rows)
        width = self.whole.source_index.shape[1]
        if not -rows.dim() <= dim < rows.dim() or rows.shape[dim] != width:
            raise ValueError(f"rows: expected the {width} rows of the whole along dimension {dim}, got {tuple(rows.shape)}")
        parts = [rows.narrow(dim, start, stop - start) for start, stop in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def restore(self, rows: Tensor, dim: int = 1) -> Tensor:
        """Rows of all ranks, one rank's behind the other's as an all-gather leaves them, in the order of the whole.

        Args:
            rows: W rows along `dim`: w of rank 0, w of rank 1, ...
            dim: 2 for keys and values ``(G, heads, W, D)``.

        Returns:
            Tensor: of the same shape; `rows` itself where the order is "contiguous". Differentiable.

        Raises:
            ValueError: another number of rows.

        Example:
            >>> import torch, vlm_fuse
            >>> whole = vlm_fuse.plan(torch.arange(8)[None], image_token_id=99)
            >>> shards = [whole.shard(rank, 2, order="zigzag") for rank in (0, 1)]
            >>> gathered = torch.cat([shard.input_ids for shard in shards], 1)
            >>> gathered, shards[0].restore(gathered)
            (tensor([[0, 1, 6, 7, 2, 3, 4, 5]]), tensor([[0, 1, 2, 3, 4, 5, 6, 7]]))
        """
        checks.tensor("rows", rows)
        width = self.whole.source_index.shape[1]
        if not -rows.dim() <= dim < rows.dim() or rows.shape[dim] != width:
            raise ValueError(f"rows: expected {width} rows along dimension {dim}, those of all ranks, got {tuple(rows.shape)}")
        if len(self.runs) == 1:
            return rows
        chunks = rows.chunk(2 * self.world_size, dim) if width else (rows,)
        # rank r's chunks stand at 2r and 2r + 1, and are r and 2n - 1 - r of the whole
        return torch.cat([*chunks[::2], *chunks[1::2][::-1]], dim)

    @property
    def images(self) -> tuple[tuple[int, ...], ...]:
        """Of each kind the images that this rank's rows read, numbered as in the whole: with ``features="own"`` those whose features
        are to be given. Reads the plan on the host.

        Raises:
            ValueError: the whole plan does not know its images' sizes.
        """
        read = self.slice(self.whole.source_index)
        return tuple(tuple(image.tolist()) for image in _images_read(read, self.whole._batch))

    # --- facts: the whole's, cut

    @property
    def _token_index(self) -> Tensor:
        return self.slice(self.whole._token_index)

    @property
    def _batch_source_index(self) -> Tensor:
        return self._over_batch.source_index

    def _numbering(self, shape: torch.Size, input_ids: Tensor | None) -> OverBatch | PlanShard:
        own, of_batch = shape == self.token_shape, shape == self._value_shape
        if own and of_batch and self._is_ambiguous:
            own, of_batch = input_ids is self._ids, input_ids is self._batch_tokens
            if not own and not of_batch:
                raise ValueError(
                    f"input_ids: {tuple(shape)} is the shape of the batch's tokens and of this shard's; give input_ids=shard.input_ids with rows of the shard, or the "
                    "very tensor that the plan was made from with rows of the batch, so that it is clear which"
                )
        return self._over_batch if of_batch and not own else self

    @_Once
    def _over_batch(self) -> OverBatch:
        return OverBatch(self)

    @_Once
    def _is_ambiguous(self) -> bool:
        """Tokens of the shard and of the batch cannot be told by their shape, and are not the same."""
        return self.token_shape == self._value_shape and not torch.equal(self._over_batch.source_index, self.source_index)

    @property
    def _batch_tokens(self) -> Tensor:
        return self.whole._batch_tokens

    @_Once
    def _ids(self) -> Tensor:
        return self._batch.tokens if self._target is None else sent(self._batch.tokens, self._target)

    @property
    def _value_shape(self) -> torch.Size:
        return self.whole._value_shape

    def _group(self, name: str) -> tuple[str, ...]:
        return (name,)

    def _make(self, names: tuple[str, ...]) -> None:
        for name in names:
            if name == "text_index":
                own = self.source_index
                fact = torch.where(sent(self._token_index, own.device) >= 0, _counted(own), -1)
            else:
                fact = getattr(self.whole, name)
                fact = fact if name == "cu_seqlens" else self.slice(fact).contiguous()
            self.__dict__[name] = fact if self._target is None else sent(fact, self._target)

    @property
    def shift_labels(self) -> Tensor | None:
        labels = self.whole.shift_labels
        if labels is None:
            return None
        return self.slice(labels) if self._target is None else sent(self.slice(labels), self._target)

    def with_labels(self, labels: Tensor) -> TokenPlan:
        raise ValueError("labels: the plan was cut into shards without them; give labels to vlm_fuse.plan, or to merge on the whole plan, before shard()")

    def mask(self, attend: Attend | None = None) -> IntervalMask:
        """Who sees whom: this rank's w rows and all W keys of the whole row, in the order of the whole (`restore`).

        Args:
            attend: default the plan's own; where that is a dict, name one of its values.

        Returns:
            IntervalMask: of ``(G, w)`` rows and W keys. ``slice(0, w, kv_start, kv_stop)`` is that of some keys, as for a ring.

        Raises:
            ValueError: a row that would need more than two intervals.

        Example:
            >>> import torch, vlm_fuse
            >>> vlm_fuse.plan(torch.arange(4)[None], image_token_id=99).shard(1, 2).mask().dense()[0, 0].int()
            tensor([[1, 1, 1, 0],
                    [1, 1, 1, 1]], dtype=torch.int32)
        """
        attend = self._own_attend("mask()") if attend is None else attend
        found = self._masks.get(attend)
        if found is None:
            whole = self.whole.mask(attend)
            found = IntervalMask._of(tuple(None if part is None else self.slice(part) for part in whole._parts[:4]), whole.kv_length)
            self._masks[attend] = found = found if self._target is None else found.to(self._target)
        return found

    @property
    def unpack_index(self) -> Tensor:
        """As that of the whole, but only rows that this rank has are found."""
        index = self.whole.unpack_index
        own = self.source_index
        if self._target is not None:
            index = sent(index, self._target)
        place = torch.full(self.whole.source_index.shape, PAD, dtype=torch.int32, device=own.device)
        here = -1 - _counted(own)
        at = 0
        for start, stop in self.runs:
            place[:, start:stop] = here[:, at : at + stop - start]
            at += stop - start
        flat = place.reshape(-1)
        row = (-1 - index.long()).clamp(0, max(flat.numel() - 1, 0))
        return torch.where(index == PAD, PAD, flat[row]) if flat.numel() else torch.full_like(index, PAD)


def _counted(rows: Tensor) -> Tensor:
    """0, 1, 2, ... in the shape of the rows, int32."""
    return torch.arange(rows.numel(), dtype=torch.int32, device=rows.device).view(rows.shape)


def _place(rank, world_size) -> tuple[int, int]:
    numbers = []
    for name, value in (("rank", rank), ("world_size", world_size)):
        if isinstance(value, bool):
            raise TypeError(f"{name}: expected an int, got bool")
        try:
            numbers.append(operator.index(value))
        except TypeError:
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None
    rank, world_size = numbers
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank: {rank} is none of the {world_size} ranks that share the rows out, 0 to {world_size - 1}; give the rank within their group")
    return rank, world_size


def _runs(width: int, rank: int, world_size: int, order: str, layout: str) -> tuple[tuple[int, int], ...]:
    """Which columns are whose. Zigzag as in Llama 3 (arXiv 2407.21783, section 3.3.2) and torch's context_parallel: the row in two
    pieces a rank, of which each rank has one from the front and one from the back, so that under a causal mask all have like work."""
    pieces = world_size if order == "contiguous" else 2 * world_size
    if width % pieces:
        fitting = -(-width // pieces) * pieces
        remedy = f"pad input_ids to {fitting}" if layout == "keep" else f"make the plan with length={fitting}"
        raise ValueError(f"shard: {width} rows do not fall into {pieces} equal pieces ({order!r} order, {world_size} ranks); {remedy}")
    size = width // pieces
    if order == "contiguous" or world_size == 1:
        return ((rank * width // world_size, (rank + 1) * width // world_size),)
    last = pieces - 1 - rank
    return (rank * size, (rank + 1) * size), (last * size, (last + 1) * size)


def _sizes(batch: Batch) -> list[Tensor]:
    """``(images,)`` int64 rows of each image, by kind, on the device of the batch."""
    sizes, listed = [], 0
    for index in range(batch.kind_count):
        token, _, _, images, each = batch.kind(index)
        if images < 0:
            raise ValueError(
                f"images: which rows of placeholder id {token} belong to which image is not known; make the plan with image_sizes, or shard it with features='all'"
            )
        if each >= 0:
            sizes.append(torch.full((images,), each, dtype=torch.int64, device=batch.tokens.device))
        else:
            sizes.append(batch.image_rows[listed : listed + images])
            listed += images
    return sizes


def _images_read(source_index: Tensor, batch: Batch) -> list[Tensor]:
    """Of each kind the images, ascending, of which a row is read."""
    found = []
    for index, sizes in enumerate(_sizes(batch)):
        _, first, rows, _, _ = batch.kind(index)
        read = source_index[(source_index >= first) & (source_index < first + rows)].long() - first
        ends = sent(sizes, source_index.device).cumsum(0)
        found.append(torch.searchsorted(ends, read, right=True).unique())
    return found


def _with_own_images(source_index: Tensor, batch: Batch) -> tuple[Tensor, tuple[int, ...], Tensor | None, int]:
    """(source_index, kinds, image_rows) as they are where only the images that are read are given, and how many rows those have."""
    kinds: list[int] = []
    listed, start = [], 0
    made = source_index
    for index, (sizes, images) in enumerate(zip(_sizes(batch), _images_read(source_index, batch))):
        token, first, rows, _, each = batch.kind(index)
        sizes = sent(sizes, source_index.device)
        ends = sizes.cumsum(0)
        own = torch.zeros_like(sizes)
        own[images] = sizes[images]
        # a row of image i moves by as much as the rows of the images before it that are left out
        moved = start - first - (ends - sizes - (own.cumsum(0) - own))
        here = (source_index >= first) & (source_index < first + rows)
        image = torch.searchsorted(ends, (source_index.long() - first).clamp(0, max(rows - 1, 0)), right=True)
        if len(sizes):
            made = torch.where(here, (source_index + moved[image.clamp(max=len(sizes) - 1)]).int(), made)
        given = int(own.sum())
        kinds += (token, start, given, len(images), each)
        if each < 0:
            listed.append(sizes[images])
        start += given
    return made, tuple(kinds), torch.cat(listed) if listed else None, start
