"""The operators of masks: schemas, fake kernels, registration. The intervals of rows, and the renderings of intervals."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from . import checks, status
from .attending import Attend
from .backend import name_from
from .batch import RecordedError
from .ops import direct, functorch_active, kernels_for, library, mode_of, outside_functorch, unwrapped

library.define(
    "intervals(Tensor document_ids, Tensor? image_ids, int[] attend, Tensor? prefix_lengths, Tensor? parent_ids, bool pair, "
    "str validate, str backend) -> Tensor[]"
)

_MASK = "Tensor kv_lo, Tensor kv_hi, Tensor? kv_lo2, Tensor? kv_hi2, SymInt kv_length"
library.define(f"dense({_MASK}, ScalarType dtype, str backend) -> Tensor")
library.define(f"bits({_MASK}, str backend) -> Tensor")
library.define(f"block_map({_MASK}, SymInt q_block, SymInt kv_block, str backend) -> Tensor[]")

#: ``(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length)`` of a mask.
Parts = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None", int]


# --- intervals --------------------------------------------------------------------------------------------------------


def _intervals(document_ids, image_ids, attend, prefix_lengths, parent_ids, pair: bool, validate: str, backend: str):
    try:
        return kernels_for(backend, document_ids).intervals(
            document_ids, image_ids, tuple(attend), prefix_lengths, parent_ids, pair, status.for_mode(validate, document_ids.device)
        )
    except RecordedError as error:
        raise checks.explain(error.record) from None


def intervals(document_ids, image_ids, attend: Attend, prefix_lengths=None, parent_ids=None, *, pair: bool, validate="auto", backend="auto"):
    """``(kv_lo, kv_hi, kv_lo2, kv_hi2)`` int32 (G, W); the second pair None without `pair` or where no row needs it."""
    prefix_lengths, parent_ids = checks.prefix_lengths(prefix_lengths), checks.parent_ids(parent_ids)
    mode = mode_of(validate, document_ids)
    if mode == "sync" and (prefix_lengths is not None or parent_ids is not None):
        checks.documents_of(document_ids, prefix_lengths, parent_ids)
    document_ids = _int32(document_ids)
    image_ids = _int32(image_ids) if image_ids is not None and attend.images != "causal" else None
    prefix_lengths, parent_ids = (None if value is None else value.to(document_ids.device) for value in (prefix_lengths, parent_ids))
    args = (document_ids, image_ids, attend.codes, prefix_lengths, parent_ids, pair, mode, name_from(backend))
    if functorch_active():
        with outside_functorch():
            return _intervals(*args)
    if direct(args[-1], document_ids) is None:
        made = torch.ops.vlm_fuse.intervals(*args)
        return (*made, None, None) if len(made) == 2 else tuple(made)
    return _intervals(*args)


def _int32(ids: Tensor) -> Tensor:
    """Ids below 0 mean nothing, whichever they are."""
    return (ids.clamp(min=-1).int() if ids.dtype == torch.int64 else ids).contiguous()


def _intervals_op(*args):
    made, pair = _intervals(*args), args[5]
    if not pair:
        return list(made[:2])
    return [part if part is not None else torch.zeros_like(made[0]) for part in made]


library.impl("intervals", _intervals_op, "CompositeExplicitAutograd")


@torch.library.register_fake("vlm_fuse::intervals", lib=library)
def _(document_ids, image_ids, attend, prefix_lengths, parent_ids, pair, validate, backend):
    return [torch.empty_like(document_ids) for _ in range(4 if pair else 2)]


# --- renderings -------------------------------------------------------------------------------------------------------


def _rendered(name: str, parts: Parts, *more):
    """The backend's function of that name on plain tensors, else the registered operator."""
    backend = name_from("auto")
    kernels = direct(backend, parts[0])
    if kernels is not None:
        return getattr(kernels, name)(*parts, *more)
    if functorch_active():
        tensors = [unwrapped(part) for part in parts[:4]]
        with outside_functorch():
            return getattr(kernels_for(backend, tensors[0]), name)(*tensors, parts[4], *more)
    return getattr(torch.ops.vlm_fuse, name)(*parts, *more, backend)


def dense(parts: Parts, dtype: torch.dtype) -> Tensor:
    """``(B, 1, Q, kv_length)``: of bool what is seen, of a floating dtype 0 there and ``finfo(dtype).min`` elsewhere."""
    return _rendered("dense", parts, dtype)


def bits(parts: Parts) -> Tensor:
    """``(B, ceil(Q * kv_length / 8))`` uint8, lowest bit first."""
    return _rendered("bits", parts)


def block_map(parts: Parts, q_block: int, kv_block: int) -> tuple[Tensor, ...]:
    """The eight tensors of a BlockMask, int32: partial and full blocks of keys, then of query rows."""
    return tuple(_rendered("block_map", parts, q_block, kv_block))


def segments(parts: Parts) -> list[tuple[int, ...]]:
    """(sample, first row, row after, first key, key after, class, window) of each segment; reads the mask on the host."""
    *tensors, kv_length = parts
    backend = name_from("auto")
    if isinstance(tensors[0], torch._subclasses.FakeTensor) or tensors[0].is_meta:
        raise RuntimeError("varlen: reads the mask on the host, and a fake tensor has no values; use dense() or block_mask() while tracing")
    with outside_functorch() if functorch_active() else nullcontext():
        tensors = [None if part is None else unwrapped(part).cpu() for part in tensors]
        # the host has the mask now: a backend that is a GPU's alone does not count
        return kernels_for("auto" if backend in ("cuda", "triton") else backend, tensors[0]).segments(*tensors, kv_length).tolist()


def _op_of(name: str):
    def op(kv_lo, *args):
        *args, backend = args
        made = getattr(kernels_for(backend, kv_lo), name)(kv_lo, *args)
        return list(made) if isinstance(made, tuple) else made

    return op


for _name in ("dense", "bits", "block_map"):
    library.impl(_name, _op_of(_name), "CompositeExplicitAutograd")


@torch.library.register_fake("vlm_fuse::dense", lib=library)
def _(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length, dtype, backend):
    return kv_lo.new_empty((kv_lo.shape[0], 1, kv_lo.shape[1], kv_length), dtype=dtype)


@torch.library.register_fake("vlm_fuse::bits", lib=library)
def _(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length, backend):
    return kv_lo.new_empty((kv_lo.shape[0], (kv_lo.shape[1] * kv_length + 7) // 8), dtype=torch.uint8)


@torch.library.register_fake("vlm_fuse::block_map", lib=library)
def _(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length, q_block, kv_block, backend):
    samples, rows = kv_lo.shape[0], (kv_lo.shape[1] + q_block - 1) // q_block
    columns = (kv_length + kv_block - 1) // kv_block
    made = []
    for outer, inner in ((rows, columns), (rows, columns), (columns, rows), (columns, rows)):
        made += [kv_lo.new_empty((samples, 1, outer)), kv_lo.new_empty((samples, 1, outer, inner))]
    return made
