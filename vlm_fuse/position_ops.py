"""The operator of M-RoPE positions: schema, fake kernel, registration."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import checks, status
from .backend import backends, choose
from .batch import RecordedError
from .ops import direct, functorch_active, kernels_for, library, outside_functorch, unwrapped

library.define(
    "mrope_position_ids(Tensor types, Tensor? image_grid, Tensor? video_grid, Tensor? intervals, Tensor? attention_mask, Tensor? document_ids, "
    "int merge, int interval, bool split, str validate, str backend) -> (Tensor, Tensor)"
)


def _kernels(backend: str, types: Tensor) -> ModuleType:
    """The backend's module. CUDA C++ has no such kernel: "auto" goes on to Triton or the reference there, "cuda" says so."""
    kernels = kernels_for(backend, types)
    if hasattr(kernels, "mrope_position_ids"):
        return kernels
    if backend != "auto":
        raise RuntimeError(f"mrope_position_ids: backend {backend!r} has no kernel for it; leave backend='auto', or give 'triton' or 'reference'")
    return choose("triton" if backends()["triton"].available else "reference", types.device.type)


def _run(types, image_grid, video_grid, intervals, attention_mask, document_ids, merge, interval, split, validate, backend):
    try:
        return _kernels(backend, types).mrope_position_ids(
            types, image_grid, video_grid, intervals, attention_mask, document_ids, merge, interval, split, status.for_mode(validate, types.device)
        )
    except RecordedError as error:
        raise checks.explain(error.record) from None


def mrope_position_ids(types: Tensor, *args):
    """``(position_ids, rope_deltas)`` of checked tensors; arguments as in the schema."""
    if functorch_active():
        types, *args = [unwrapped(value) if isinstance(value, Tensor) else value for value in (types, *args)]
        with outside_functorch():
            return _run(types, *args)
    if direct(args[-1], types) is None:
        return torch.ops.vlm_fuse.mrope_position_ids(types, *args)
    return _run(types, *args)


library.impl("mrope_position_ids", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("vlm_fuse::mrope_position_ids", lib=library)
def _(types, image_grid, video_grid, intervals, attention_mask, document_ids, merge, interval, split, validate, backend):
    samples, length = types.shape
    rows = 3 if document_ids is None else 4
    return types.new_empty((rows, samples, length), dtype=torch.int64), types.new_empty((samples, 1), dtype=torch.int64)
