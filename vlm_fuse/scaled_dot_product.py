"""`attention`: scaled dot product attention under an interval mask, by whichever of torch's kernels suits it.

A CPU takes SDPA one segment at a time: the mask says where its rows fall apart, so that no mask of Q x K is made and no
product is computed that it would throw away. A GPU takes FlexAttention, variable-length attention or SDPA.
"""

from __future__ import annotations

import functools
import inspect
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.functional import scaled_dot_product_attention

from . import checks
from .batch import CAUSAL_SEGMENT, EMPTY_SEGMENT, FULL_SEGMENT, OTHER_SEGMENT
from .masks import IntervalMask
from .masks.varlen import Segment, rule_of
from .modes import dispatch_modes

#: rows that are computed at once where a segment needs a mask: memory grows with it, a block mask is written for each.
_BLOCK_ROWS = 256

#: segments of no more rows share a block: a call costs more than the products that it would save.
_SMALL_ROWS = 32

#: the same of segments that need a mask anyway.
_SMALL_MASKED_ROWS = 128


def attention(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, *, scale: float | None = None) -> Tensor:
    """Softmax of the scaled scores of the keys that a row sees, times their values. Differentiable.

    The same result, up to rounding, as ``scaled_dot_product_attention(q, k, v, attn_mask=mask.dense())``, without a mask of
    Q x K: on a CPU segment by segment; on a GPU by compiled FlexAttention, or, where the host knows the mask's documents
    (``mask.varlen()`` was asked for, there or on the CPU before it was moved) by SDPA or variable-length attention where
    they can express it. Nothing is read back from a GPU. Under torch.compile FlexAttention is traced with the rest; on a
    CPU the graph breaks here.

    Args:
        q: ``(B, H, Q, D)`` query rows.
        k: ``(B, H_kv, K, D)``; H is a multiple of H_kv (grouped query attention).
        v: ``(B, H_kv, K, D_v)``.
        mask: of Q rows and K keys, for B samples or one.
        scale: factor of the scores; default ``1 / sqrt(D)``.

    Returns:
        Tensor: ``(B, H, Q, D_v)``. A row that sees nothing gives zeros, and zero gradients.

    Raises:
        ValueError: shapes or devices that do not fit one another or the mask.
        TypeError: dtypes that differ.

    Example:
        >>> import torch, vlm_fuse
        >>> mask = vlm_fuse.IntervalMask.from_document_ids(torch.tensor([[0, 0, 1, -1]]))
        >>> q, k, v = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), torch.eye(4)[None, None].expand(1, 2, 4, 4)
        >>> vlm_fuse.attention(q, k, v, mask)[0, 0]
        tensor([[1.0000, 0.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000, 0.0000],
                [0.0000, 0.0000, 1.0000, 0.0000],
                [0.0000, 0.0000, 0.0000, 0.0000]])

    Source: FlexAttention (arXiv 2412.05496); FlashAttention-2 for variable lengths (arXiv 2307.08691).
    """
    for name, rows in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, rows)
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):  # as SDPA is there, so that all parts of the result agree
        lower = torch.get_autocast_dtype(q.device.type)
        q, k, v = (rows if rows.dtype == torch.float64 else rows.to(lower) for rows in (q, k, v))
    checks.attention(q, k, v, mask, scale)
    if q.is_meta or (not is_compiling() and dispatch_modes() and _without_values(q, mask)):
        return _sdpa(q, k, v, scale, mask.dense())
    if q.is_cpu:
        return _by_segment(q, k, v, mask, scale)
    return _on_gpu(q, k, v, mask, scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None, seen: Tensor | None = None, is_causal: bool = False) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _without_values(q: Tensor, mask: IntervalMask) -> bool:
    """Fake tensors, or a trace that would keep the values of this one mask."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return isinstance(q, FakeTensor) or isinstance(mask.kv_lo, FakeTensor) or get_proxy_mode() is not None


# --- by segment -------------------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """Rows that are computed together, and the keys that they see."""

    rows: int
    begin: int
    end: int
    kind: int


def _pieces(segments: list[Segment]) -> list[_Piece]:
    """The segments of one sample; runs of small ones joined."""
    made: list[_Piece] = []
    joinable = False  # the last piece may take more in
    for segment in segments:
        plain = segment.kind in (CAUSAL_SEGMENT, FULL_SEGMENT)
        small = segment.rows <= (_SMALL_ROWS if plain else _SMALL_MASKED_ROWS) and segment.kind != EMPTY_SEGMENT
        if small and joinable and made[-1].rows + segment.rows <= _BLOCK_ROWS:
            made[-1] = _Piece(made[-1].rows + segment.rows, made[-1].begin, segment.key_end, OTHER_SEGMENT)
            continue
        kind = segment.kind
        if kind == CAUSAL_SEGMENT and segment.rows != segment.keys:  # SDPA counts its triangle from the first key
            kind = FULL_SEGMENT if segment.rows == 1 else OTHER_SEGMENT
        made.append(_Piece(segment.rows, segment.key_begin, segment.key_end, kind))
        joinable = small
    return made


def _by_sample(mask: IntervalMask) -> list[list[Segment]]:
    found: list[list[Segment]] = [[] for _ in range(mask.kv_lo.shape[0])]
    for segment in mask._segments():
        found[segment.sample].append(segment)
    return found


def _segment_by_segment(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float | None) -> Tensor:
    samples = mask._kept.get("pieces")
    if samples is None:
        by_sample = _by_sample(mask)
        # segments say all of a mask, unless one is of another kind
        alike = all(one.kind != OTHER_SEGMENT for segments in by_sample for one in segments) and all(
            [one[1:] for one in segments] == [one[1:] for one in by_sample[0]] for segments in by_sample[1:]
        )
        samples = mask._kept["pieces"] = [_pieces(segments) for segments in (by_sample[:1] if alike else by_sample)]
    if len(samples) == 1:
        out = _of_sample(q, k, v, mask, 0, samples[0], scale)
    else:
        parts = zip(q.split(1), k.split(1), v.split(1))
        made = [_of_sample(*part, mask, sample, pieces, scale) for sample, (part, pieces) in enumerate(zip(parts, samples))]
        out = torch.cat(made) if made else _zeros(q, v)
    if out.requires_grad or not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))):
        return out
    return out + sum(x[:0].sum() for x in (q, k, v))  # nobody sees anything: the gradients are zeros, not missing


def _by_segment(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float | None) -> Tensor:
    """Untraced: what is done depends on the values of the mask, and would be compiled anew for each."""
    before = _set_eval_frame(None)
    try:
        return _segment_by_segment(q, k, v, mask, scale)
    finally:
        _set_eval_frame(before)


# what torch.compiler.disable does, which would load torch's compiler with this module
_frames = getattr(torch._C._dynamo, "eval_frame", None)
_set_eval_frame = getattr(_frames, "set_eval_frame", lambda callback: None)
getattr(_frames, "skip_code", lambda code: None)(_by_segment.__code__)
_by_segment._torchdynamo_disable = True
_by_segment._torchdynamo_disable_msg = "vlm_fuse.attention on a CPU reads the mask to cut it into segments"


def _of_sample(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, sample: int, pieces: list[_Piece], scale: float | None) -> Tensor:
    """Split and joined again: the backward of a split writes each gradient once, that of a slice a whole one for each."""
    if len(pieces) == 1 and pieces[0].rows == q.shape[2] and (pieces[0].begin, pieces[0].end) == (0, k.shape[2]):
        return _of_piece(q, k, v, mask, sample, 0, pieces[0], scale)
    sizes, places, at = [], {}, 0
    for number, piece in enumerate(pieces):
        if piece.kind == EMPTY_SEGMENT:
            continue
        if piece.begin > at:  # keys that nobody sees
            sizes.append(piece.begin - at)
        places[number] = len(sizes)
        sizes.append(piece.end - piece.begin)
        at = piece.end
    if at < k.shape[2] or not sizes:
        sizes.append(k.shape[2] - at)
    keys, values = k.split(sizes, 2), v.split(sizes, 2)
    made, row = [], 0
    for number, (piece, rows) in enumerate(zip(pieces, q.split([piece.rows for piece in pieces], 2) if pieces else ())):
        place = places.get(number)
        if place is None:
            made.append(_zeros(rows, v))
        else:
            made.append(_of_piece(rows, keys[place], values[place], mask, sample, row, piece, scale))
        row += piece.rows
    return torch.cat(made, 2) if made else _zeros(q, v)


def _zeros(rows: Tensor, v: Tensor) -> Tensor:
    return rows.new_zeros((*rows.shape[:3], v.shape[3]))


def _of_piece(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, sample: int, row: int, piece: _Piece, scale: float | None) -> Tensor:
    if piece.kind == EMPTY_SEGMENT:
        return _zeros(q, v)
    # SDPA's own triangle gives NaN under a scale that is not above 0
    if piece.kind == FULL_SEGMENT or (piece.kind == CAUSAL_SEGMENT and (scale is None or scale > 0)):
        return _sdpa(q, k, v, scale, is_causal=piece.kind == CAUSAL_SEGMENT)
    own = mask._sample(sample).slice(row, row + piece.rows, piece.begin, piece.end)
    return _Blocks.apply(q, k, v, own, scale)


class _Block(NamedTuple):
    """Some rows of a piece, and the one or two runs of keys that they reach."""

    rows: slice
    runs: tuple[slice, ...]


def _blocks(mask: IntervalMask) -> list[_Block]:
    """Rows in blocks; two runs of keys where the rows reach nothing between them (sinks and a window far ahead of them)."""
    made = []
    bounds = [None if part is None else part[0].split(_BLOCK_ROWS) for part in (mask.kv_lo, mask.kv_hi, mask.kv_lo2, mask.kv_hi2)]
    for number, (lo, hi) in enumerate(zip(*bounds[:2])):
        some = hi > 0
        runs = [(int(lo[some].min()), int(hi[some].max()))] if bool(some.any()) else []
        if bounds[2] is not None:
            lo2, hi2 = bounds[2][number], bounds[3][number]
            some = hi2 > 0
            if bool(some.any()):
                second = (int(lo2[some].min()), int(hi2[some].max()))
                runs = [*runs, second] if second[0] > runs[0][1] else [(min(runs[0][0], second[0]), max(runs[0][1], second[1]))]
        start = number * _BLOCK_ROWS
        made.append(_Block(slice(start, start + len(lo)), tuple(slice(*run) for run in runs)))
    return made


def _runs_of(rows: Tensor, block: _Block) -> Tensor:
    parts = [rows[:, :, run] for run in block.runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _of_block(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, block: _Block) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The block's rows, the keys and values of its runs, one run behind the other, and who sees whom among them."""
    parts = [mask.slice(block.rows.start, block.rows.stop, run.start, run.stop).dense() for run in block.runs]
    seen = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    q, k, v = q[:, :, block.rows], _runs_of(k, block), _runs_of(v, block)
    nothing = ~seen.any(-1, keepdim=True)
    if bool(nothing.any()):  # padding inside a document: whatever it holds, NaN too, reaches nobody
        unseen = ~seen.any(-2)[..., None]
        q, k, v = q.masked_fill(nothing, 0), k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
    return q, k, v, seen


class _Blocks(torch.autograd.Function):
    """Rows block by block. The backward computes each block again, so that no more than one block's mask and keys are held."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float | None) -> Tensor:
        out = _zeros(q, v)
        for block in _blocks(mask):
            if block.runs:
                *rows, seen = _of_block(q, k, v, mask, block)
                out[:, :, block.rows] = _sdpa(*rows, scale, seen)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        q, k, v, ctx.mask, ctx.scale = inputs
        ctx.save_for_backward(q, k, v)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *_BlocksBackward.apply(grad, *ctx.saved_tensors, ctx.mask, ctx.scale, ctx.needs_input_grad[:3]), None, None


class _BlocksBackward(torch.autograd.Function):
    """A function of its own, so that a second derivative is refused: without it, it would come out as zero."""

    @staticmethod
    def forward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float | None, wanted: tuple[bool, ...]):
        made = [torch.zeros_like(rows) if needed else None for rows, needed in zip((q, k, v), wanted)]
        for block in _blocks(mask):
            if not block.runs:
                continue
            *rows, seen = _of_block(q, k, v, mask, block)
            rows = [x.detach().requires_grad_(needed) for x, needed in zip(rows, wanted)]
            with torch.enable_grad():
                out = _sdpa(*rows, scale, seen)
            found = iter(torch.autograd.grad(out, [x for x in rows if x.requires_grad], grad[:, :, block.rows]))
            if made[0] is not None:
                made[0][:, :, block.rows] = next(found)
            for total in made[1:]:
                if total is not None:
                    sizes = [run.stop - run.start for run in block.runs]
                    for run, part in zip(block.runs, next(found).split(sizes, 2)):
                        total[:, :, run] += part
        return tuple(made)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError("vlm_fuse.attention: second derivatives are not there on a CPU, as in torch's own SDPA; use SDPA's math backend under mask.dense()")


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def _on_gpu(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float | None) -> Tensor:
    if "segments" in mask._kept and not is_compiling():  # the host knows the documents
        kept = mask._kept
        if "rule" not in kept:
            kept["rule"] = _rule(mask)
        rule = kept["rule"]
        if rule == "sdpa_causal" or rule == "sdpa_full":
            return _sdpa(q, k, v, scale, is_causal=rule == "sdpa_causal")
        if rule == "varlen" and _takes_varlen(q, k, v, mask):
            return _by_varlen(q, k, v, mask, scale)
    return _by_flex(q, k, v, mask, scale)


def _rule(mask: IntervalMask) -> str:
    """Which of torch's kernels knows this mask without a table of blocks."""
    segments, keys = mask._segments(), mask.kv_length
    rows = mask.kv_lo.shape[1]
    if len(segments) == mask.kv_lo.shape[0] and all(one.rows == rows and one.keys == keys for one in segments):
        if all(one.kind == CAUSAL_SEGMENT for one in segments) and rows == keys:
            return "sdpa_causal"
        if all(one.kind == FULL_SEGMENT or (one.kind == CAUSAL_SEGMENT and rows == 1) for one in segments):
            return "sdpa_full"
    try:
        rule_of(segments)
    except ValueError:
        return "flex"
    return "varlen"


def _by_flex(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float | None) -> Tensor:
    block_mask = mask._kept.get("block_mask")
    if block_mask is None:
        block_mask = mask.block_mask()
        if not is_compiling():
            mask._kept["block_mask"] = block_mask
    return _flex()(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex():
    """Uncompiled it would compute, and keep, all Q x K scores."""
    if is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention
    return _compiled_flex()


@functools.cache
def _varlen_attn():
    """torch's variable-length attention and whether it takes a window, or None before there was one."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def _takes_varlen(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask) -> bool:
    found = _varlen_attn()
    if found is None or not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or v.shape[3] != q.shape[3] or q.shape[3] > 256:
        return False
    # one row that serves a batch has offsets of one row only
    return "window_size" in found[1] and "enable_gqa" in found[1] and mask.kv_lo.shape[0] == q.shape[0]


def _by_varlen(q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float | None) -> Tensor:
    kept = mask._kept
    if "varlen" not in kept:
        found = mask.varlen()
        empty = (mask.kv_hi == 0)[:, None, :, None] if any(one.kind == EMPTY_SEGMENT for one in mask._segments()) else None
        kept["varlen"] = found, empty
    found, empty = kept["varlen"]
    rows, keys, values = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    made = _varlen_attn()[0](
        rows, keys, values, found.cu_seqlens, found.cu_seqlens_k, found.max_seqlen, found.max_seqlen_k,
        scale=scale, window_size=found.window_size, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    out = made.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)
    return out if empty is None else out.masked_fill(empty, 0)  # padding is a document there
