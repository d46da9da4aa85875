"""`IntervalMask`: two int32 a row say which keys it sees. Its methods delegate to one file a rendering."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import checks, mask_ops
from ..attending import CAUSAL, Attend
from ..transfer import sent
from . import dense as _dense
from . import hf as _hf
from . import varlen as _varlen

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class IntervalMask:
    """A mask in which every query row sees one contiguous run of keys, or two.

    Row q of sample b sees the keys ``kv_lo[b, q] <= k < kv_hi[b, q]`` of the same output row, and those of the second
    pair where there is one. A row that sees nothing (padding) has the empty interval (0, 0). A mask of one row serves
    a batch of any size. The tensors are not to be written afterwards.

    Args:
        kv_lo: ``(B, Q)`` int32, first key seen.
        kv_hi: ``(B, Q)`` int32, key after the last one seen.
        kv_length: number of keys.
        kv_lo2: ``(B, Q)`` int32 or None: first key of the second run, ``kv_hi < kv_lo2`` or (0, 0).
        kv_hi2: ``(B, Q)`` int32 or None.

    Raises:
        TypeError: an interval that is not int32, or only one half of the second pair.
        ValueError: shapes or devices that differ; on a CPU also a row whose intervals are not in order, touch one another or
            leave 0 .. kv_length (on a GPU they are cut to what is there).

    Example:
        >>> import torch
        >>> from vlm_fuse import IntervalMask
        >>> IntervalMask.from_document_ids(torch.tensor([[0, 0, 1, -1]])).dense()[0, 0].int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [0, 0, 1, 0],
                [0, 0, 0, 0]], dtype=torch.int32)
    """

    def __init__(self, kv_lo: Tensor, kv_hi: Tensor, kv_length: int, kv_lo2: Tensor | None = None, kv_hi2: Tensor | None = None):
        checks.interval_pair(kv_lo, kv_hi, kv_length, kv_lo2, kv_hi2)
        self._set(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length)

    def _set(self, kv_lo: Tensor, kv_hi: Tensor, kv_lo2: Tensor | None, kv_hi2: Tensor | None, kv_length: int) -> None:
        self.kv_lo, self.kv_hi, self.kv_length = kv_lo.contiguous(), kv_hi.contiguous(), kv_length
        self.kv_lo2, self.kv_hi2 = (None, None) if kv_lo2 is None else (kv_lo2.contiguous(), kv_hi2.contiguous())
        self._kept: dict = {}  # what `attention` asks for once a layer

    @classmethod
    def _of(cls, parts: tuple, kv_length: int) -> IntervalMask:
        """Of intervals that are known to be in order."""
        mask = object.__new__(cls)
        mask._set(*parts, kv_length)
        return mask

    @property
    def _parts(self) -> mask_ops.Parts:
        return self.kv_lo, self.kv_hi, self.kv_lo2, self.kv_hi2, self.kv_length

    def __repr__(self) -> str:
        pairs = 1 if self.kv_lo2 is None else 2
        return f"IntervalMask(rows={tuple(self.kv_lo.shape)}, keys={self.kv_length}, intervals={pairs}, device={self.kv_lo.device})"

    # --- how it is made

    @classmethod
    def from_document_ids(
        cls,
        document_ids: Tensor,
        attend: Attend = CAUSAL,
        *,
        image_ids: Tensor | None = None,
        prefix_lengths: int | Tensor | list[int] | None = None,
        parent_ids: Tensor | list[int] | None = None,
    ) -> IntervalMask:
        """The mask of packed, padded or plain rows: a row sees rows of its own document only.

        Args:
            document_ids: ``(B, Q)`` int32 or int64, below 0 = padding. Neighbouring rows of equal id are one document; padding
                between them does not end it.
            attend: who sees whom inside a document.
            image_ids: ``(B, Q)`` int32 or int64, -1 = no image; needed where `attend` treats images apart.
            prefix_lengths: int, or ints by document id: that many leading rows of a document are seen by all of it.
            parent_ids: ints by document id, -1 = none: a document also sees all of its parent.

        Returns:
            IntervalMask: ``B`` rows of ``Q`` queries and ``Q`` keys.

        Raises:
            ValueError: a row that would need more than two intervals (named), shapes that differ.

        Example:
            >>> import torch
            >>> from vlm_fuse import Attend, IntervalMask
            >>> mask = IntervalMask.from_document_ids(torch.tensor([[0, 0, 0]]), Attend(window=2))
            >>> mask.kv_lo, mask.kv_hi
            (tensor([[0, 0, 1]], dtype=torch.int32), tensor([[1, 2, 3]], dtype=torch.int32))
        """
        checks.from_document_ids(document_ids, attend, image_ids)
        parts = mask_ops.intervals(document_ids, image_ids, attend, prefix_lengths, parent_ids, pair=True)
        return cls._of(parts, document_ids.shape[1])

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, attend: Attend = CAUSAL, *, length: int | None = None) -> IntervalMask:
        """The mask of one packed row whose documents begin at these offsets.

        Args:
            cu_seqlens: ``(documents + 1,)`` int32 or int64, from 0 up; documents may be empty.
            attend: who sees whom inside a document; images cannot be told here.
            length: rows of the packed row; those behind the last document are padding. Default: where the last one ends, which
                is read back from a GPU.

        Raises:
            ValueError: offsets that do not begin at 0 or fall (on a CPU), a length below the last one, an `attend` that needs
                image ids.

        Example:
            >>> import torch
            >>> from vlm_fuse import IntervalMask
            >>> IntervalMask.from_cu_seqlens(torch.tensor([0, 2, 3]), length=4).kv_lo
            tensor([[0, 0, 2, 0]], dtype=torch.int32)
        """
        length = checks.from_cu_seqlens(cu_seqlens, attend, length)
        row = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        document = torch.bucketize(row, cu_seqlens[1:].contiguous(), out_int32=True, right=True)
        document_ids = torch.where(document < cu_seqlens.shape[0] - 1, document, -1)[None]
        return cls.from_document_ids(document_ids, attend)

    def slice(self, q_start: int, q_stop: int, kv_start: int = 0, kv_stop: int | None = None) -> IntervalMask:
        """The mask of some of its query rows on some of its keys: ``dense()[:, :, q_start:q_stop, kv_start:kv_stop]``.

        For chunked prefill and for decoding with a KV cache: make the mask of the longest row that there will be, and slice
        the rows that are computed now and the keys that the cache holds now (all up to the last row; or, where the mask has
        a window, the last ones only). Keys outside of the slice are not seen.

        Args:
            q_start, q_stop: the query rows.
            kv_start, kv_stop: the keys; default all, None: to the last.

        Raises:
            ValueError: a range that is not inside the mask.

        Example:
            >>> import torch
            >>> from vlm_fuse import IntervalMask
            >>> mask = IntervalMask.from_document_ids(torch.zeros(1, 8, dtype=torch.int32))
            >>> mask.slice(5, 6, 0, 6).dense().shape
            torch.Size([1, 1, 1, 6])
        """
        kv_stop = self.kv_length if kv_stop is None else kv_stop
        checks.inside("q_start, q_stop", q_start, q_stop, self.kv_lo.shape[1], "query rows")
        checks.inside("kv_start, kv_stop", kv_start, kv_stop, self.kv_length, "keys")
        keys = kv_stop - kv_start

        def cut(kv_lo: Tensor, kv_hi: Tensor) -> tuple[Tensor, Tensor]:
            lo, hi = (part[:, q_start:q_stop].sub(kv_start).clamp_(0, keys) for part in (kv_lo, kv_hi))
            some = lo < hi
            return lo * some, hi * some

        lo, hi = cut(self.kv_lo, self.kv_hi)
        if self.kv_lo2 is None:
            return IntervalMask._of((lo, hi, None, None), keys)
        lo2, hi2 = cut(self.kv_lo2, self.kv_hi2)
        none = hi == 0  # the second run is the first one left
        return IntervalMask._of((torch.where(none, lo2, lo), torch.where(none, hi2, hi), lo2 * ~none, hi2 * ~none), keys)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> IntervalMask:
        """The mask on another device. What `attention` has found out about it on the host goes along.

        Args:
            device: where to.
            non_blocking: the host does not wait for copies to a GPU. For those to the CPU it always does.

        Example:
            >>> import torch
            >>> from vlm_fuse import IntervalMask
            >>> IntervalMask.from_document_ids(torch.tensor([[0]])).to("cpu").kv_hi
            tensor([[1]], dtype=torch.int32)
        """
        device = torch.device(device)
        return self._moved(lambda tensor: sent(tensor, device, non_blocking))

    def _moved(self, move) -> IntervalMask:
        mask = IntervalMask._of(tuple([None if part is None else move(part) for part in self._parts[:4]]), self.kv_length)
        mask._kept = self._known()
        return mask

    def _known(self) -> dict:
        """What is known about the mask on the host, wherever it lies."""
        return {name: value for name, value in self._kept.items() if name == "segments"}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": self._known()}

    # --- renderings

    def dense(self) -> Tensor:
        """``(B, 1, Q, kv_length)`` bool, True where a row sees a key: what SDPA takes as attn_mask.

        A row that sees nothing gives zeros in `scaled_dot_product_attention`.

        Example:
            >>> import torch
            >>> from vlm_fuse import IntervalMask
            >>> IntervalMask.from_document_ids(torch.tensor([[0, 0]])).dense().tolist()
            [[[[True, False], [True, True]]]]
        """
        return _dense.dense(self._parts)

    def additive(self, dtype: torch.dtype) -> Tensor:
        """``(B, 1, Q, kv_length)`` of `dtype`: 0 where a row sees a key, else ``torch.finfo(dtype).min``, never -inf.

        A row that sees nothing mixes all keys under such a mask: what it gives is to be ignored.

        Args:
            dtype: float32, bfloat16, float16 or float64, best that of the scores.

        Example:
            >>> import torch
            >>> from vlm_fuse import IntervalMask
            >>> IntervalMask.from_document_ids(torch.tensor([[0, 0]])).additive(torch.float32)[0, 0, 1]
            tensor([0., 0.])
        """
        return _dense.additive(self._parts, dtype)

    def bits(self) -> Tensor:
        """``(B, ceil(Q * kv_length / 8))`` uint8: the dense mask of each sample, flattened, eight entries a byte, the first
        in the lowest bit, padded with zeros to a byte.

        Flattened over the samples it is the ``packed_custom_mask`` of FlashInfer's prefill (``segment_packbits``, little).

        Example:
            >>> import torch
            >>> from vlm_fuse import IntervalMask
            >>> IntervalMask.from_document_ids(torch.tensor([[0, 0, 0]])).bits()  # 100 110 11|1
            tensor([[217,   1]], dtype=torch.uint8)

        Source: flashinfer.ai, ``flashinfer.quantization.segment_packbits``.
        """
        return _dense.bits(self._parts)

    def block_mask(self, BLOCK_SIZE: int | tuple[int, int] = 128) -> BlockMask:
        """FlexAttention's BlockMask, equal in every tensor to ``create_block_mask`` of the same mask.

        Made in O(Q + blocks^2), without a visit to the Q x K elements. A mask of one row serves any batch. No Python number
        is captured, so that ``torch.compile(flex_attention)`` does not compile anew from step to step.

        Args:
            BLOCK_SIZE: rows and keys of a block, or a pair (rows, keys).

        Returns:
            BlockMask: ``(B, 1, Q, kv_length)``, with a ``mask_mod`` that is exact for every element.

        Raises:
            ValueError: a size below 1.

        Example:
            >>> import torch
            >>> from vlm_fuse import IntervalMask
            >>> mask = IntervalMask.from_document_ids(torch.zeros(1, 300, dtype=torch.int32)).block_mask()
            >>> mask.kv_num_blocks + mask.full_kv_num_blocks
            tensor([[[1, 2, 3]]], dtype=torch.int32)

        Source: ``torch.nn.attention.flex_attention`` of pytorch/pytorch; the cost of building it: pytorch issue 151043,
        meta-pytorch/attention-gym issue 149.
        """
        from .block_mask import block_mask  # takes 20 ms to import, and not everyone needs it

        return block_mask(self._parts, BLOCK_SIZE)

    def varlen(self) -> _varlen.Varlen:
        """The mask for flash-attn and ``torch.nn.attention.varlen``: where documents begin, and the window.

        Every run of rows that see nothing (padding) is one more document, whose rows see one another. Reads the mask on
        the host, once.

        Returns:
            Varlen: cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, causal, window_size, of rows flattened to
            ``(B * Q, heads, D)``. A window of w rows is (w - 1, 0): the row itself is not counted there.

        Raises:
            ValueError: a mask that is not causal, full or windowed by document, and why.

        Example:
            >>> import torch
            >>> from vlm_fuse import Attend, IntervalMask
            >>> found = IntervalMask.from_document_ids(torch.tensor([[4, 4, 4, 7, 7]]), Attend(window=2)).varlen()
            >>> found.cu_seqlens, found.max_seqlen, found.window_size
            (tensor([0, 3, 5], dtype=torch.int32), 3, (1, 0))
        """
        return _varlen.varlen(self._segments(), *self.kv_lo.shape, self.kv_length, self.kv_lo.device)

    def hf(self, attn_implementation: str, dtype: torch.dtype | None = None) -> dict:
        """Keyword arguments with which a Hugging Face model applies this one mask to all of its layers.

        Args:
            attn_implementation: "sdpa" (a bool mask), "eager" (an additive one: a bool would be added as 0 and 1),
                "flex_attention" (a BlockMask) or one of flash attention ("flash_attention_2", ...: attention_mask None and
                cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k).
            dtype: of the additive mask, best that of the model; default torch's default dtype.

        Returns:
            dict: attention_mask, with flash attention also the four others (and is_causal=False where the mask is full).
            A window is not among them: there the model's own ``sliding_window`` is taken, and has to be the same.

        Raises:
            ValueError: an unknown implementation; flash attention for a mask that it cannot express.

        Example:
            >>> import torch
            >>> from vlm_fuse import IntervalMask
            >>> mask = IntervalMask.from_document_ids(torch.tensor([[0, 0, 1]]))
            >>> mask.hf("sdpa")["attention_mask"].dtype
            torch.bool
            >>> mask.hf("flash_attention_2")["cu_seq_lens_q"]
            tensor([0, 2, 3], dtype=torch.int32)
        """
        return _hf.hf(self, attn_implementation, dtype)

    def _sample(self, sample: int) -> IntervalMask:
        """The mask of one sample; that of the one row serves all."""
        if self.kv_lo.shape[0] == 1:
            return self
        return IntervalMask._of(tuple([None if part is None else part[sample : sample + 1] for part in self._parts[:4]]), self.kv_length)

    def _segments(self) -> list[_varlen.Segment]:
        """How the rows fall apart, found once."""
        found = self._kept.get("segments")
        if found is None:
            found = self._kept["segments"] = [_varlen.Segment(*fields) for fields in mask_ops.segments(self._parts)]
        return found
