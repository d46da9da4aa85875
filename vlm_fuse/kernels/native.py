"""The C++ kernels for the CPU (csrc/): allocation of outputs, and the module that was compiled on installation.

Tensors reach the module through torch's DLPack exchange table, threads are torch's own. Nothing is compiled at import.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..batch import RAISE, ROW_DTYPES, Batch, RecordedError
from ..modes import MODES
from .torch_library import address

if TYPE_CHECKING:
    import numpy as np


def _why_missing() -> str:
    """What the build left behind; it says nothing of a module that was built for another Python."""
    try:
        found = json.loads((Path(__file__).parent.parent / "_build_info.json").read_text())
    except (OSError, ValueError):
        return "never built: run pip install -e ."
    return f"compiled, but not for this Python: run pip install -e . ({found['reason']})" if found["native"] else found["reason"]


def _load():
    """(the module, how it was built), or (None, why it is not there)."""
    try:
        module = importlib.import_module("vlm_fuse._native")
    except ModuleNotFoundError:
        return None, _why_missing()
    except ImportError as error:
        return None, f"does not load: {error}"
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if table is None:
        return None, f"torch {torch.__version__} has no DLPack exchange table: torch >= 2.10 is needed"
    try:
        attached = module.attach(table, address("libtorch_cpu", "torch_parallel_for"), RAISE, RecordedError, Tensor, torch.nn.Parameter, ROW_DTYPES, MODES)
    except TypeError:
        return None, "the compiled module is older than the Python code: run pip install -e . (or make native) again"
    if not attached:
        return None, f"the DLPack exchange table of torch {torch.__version__} is of another major version"
    return module, _why_there()


def _why_there() -> str:
    try:
        return json.loads((Path(__file__).parent.parent / "_build_info.json").read_text())["reason"]
    except (OSError, ValueError):
        return "compiled"


_native, _reason = _load()


def available() -> tuple[bool, str]:
    """Whether the compiled module can be used here, and how it was compiled, or why it is not there."""
    return _native is not None, _reason


if _native is not None:
    _plan, _facts, _intervals = _native.plan, _native.facts, _native.intervals

    #: usual_plan(input_ids, inputs_embeds, weight, image_embeds, attention_mask, labels, document_ids, image_token_id,
    #: layout, left, unused, width, status, out) -> (source_index, kinds, versions, step facts where labels are given), or None where
    #: the batch is not of the usual form
    usual_plan = _native.usual_plan

    #: step_facts(batch, versions, source_index) -> labels (if there are any), position_ids, document_ids,
    #: attention_mask and cu_seqlens of a batch without document_ids, or None where the batch was written in place since its tensors had these versions
    step_facts = _native.step_facts

    #: rows_of(input_ids, inputs_embeds, weight, image_embeds, out, source_index) -> rows of image_embeds, or None as above
    rows_of = _native.rows_of

    #: rows(out, text, weight, tokens, scale, features, starts, source_index, text_index, add, only_features, status) -> out
    rows = _native.rows

    #: rows_backward(grad, source_index, text_index, tokens, scale, starts, add, grad_text, grad_weight, grad_features)
    #: -> (gradient of the text or weight, *those of the features)
    rows_backward = _native.rows_backward

    #: gradients(as rows_backward) -> the same, or None where `grad` is not an ordinary tensor or a mode is active
    gradients = _native.gradients

    #: of a mask's kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length, as reference_renderings.py defines them
    bits, block_map, segments = _native.bits, _native.block_map, _native.segments

    #: mrope_position_ids(types, image_grid, video_grid, intervals, attention_mask, document_ids, merge, interval, split, status)
    #: -> (position_ids, rope_deltas), as reference_positions.py defines them
    mrope_position_ids = _native.mrope_position_ids

    #: memory() -> (bytes of tensors made here that are alive, the most since reset_peak(), bytes kept for the next call)
    memory, reset_peak = _native.memory, _native.reset_peak

#: `rows` takes a dtype for an output, `rows_backward` (shape, dtype) for a gradient, and makes the tensor.
MAKES_TENSORS = True

def count(batch: Batch) -> tuple[int, int, int, tuple[int, ...]]:
    """Kept rows of the longest sample, of all samples, documents, and the placeholders of each kind."""
    return _native.count(*batch)


def plan(batch: Batch, width: int, status=RAISE) -> Tensor:
    """``(G, W)`` int32 source_index."""
    return _plan(*batch, width, status)


#: by the number under which the module knows them
_FACTS = ("text_index", "position_ids", "document_ids", "image_ids", "kind_ids", "attention_mask", "labels", "cu_seqlens")


@functools.cache
def _numbers(names: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(map(_FACTS.index, names))


def facts(batch: Batch, width: int, names: tuple[str, ...], documents: int) -> tuple[Tensor, ...]:
    """The named facts of the output rows, in that order, in one pass over the tokens."""
    return _facts(*batch, width, _numbers(names), len(batch[0]) if batch[2] is None else documents)


def intervals(document_ids, image_ids, attend, prefix_lengths, parent_ids, pair, status):
    """``(kv_lo, kv_hi, kv_lo2, kv_hi2)`` int32 (G, W); the second pair None without `pair` or where no row needs it."""
    shape = document_ids.shape
    lo, hi = document_ids.new_empty(shape), document_ids.new_empty(shape)
    lo2, hi2 = (document_ids.new_empty(shape), document_ids.new_empty(shape)) if pair else (None, None)
    second = _intervals(document_ids, image_ids, attend, prefix_lengths, parent_ids, lo, hi, lo2, hi2, status)
    return (lo, hi, lo2, hi2) if second and pair else (lo, hi, None, None)


def best_fit(needs: np.ndarray, order: np.ndarray, budgets: tuple[int, ...]) -> np.ndarray:
    """``(samples,)`` row of each sample, as `packing.best_fit` defines it."""
    rows = torch.empty(len(needs), dtype=torch.int64, device="cpu")
    _native.best_fit(torch.from_numpy(needs), torch.from_numpy(order), budgets, rows)
    return rows.numpy()


def accumulate_weight(grad, source_index, text_index, tokens, scale, add: bool, weight_grad: Tensor) -> None:
    """Add the embedding weight's gradient to what is in `weight_grad`; rows of ids that do not occur are not touched."""
    _native.accumulate_weight(grad, source_index, text_index, tokens, scale, (), add, weight_grad)


def dense(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length: int, dtype: torch.dtype) -> Tensor:
    """``(B, 1, Q, kv_length)`` bool, or 0 and the lowest number of a floating dtype."""
    return _native.dense(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length, None if dtype is torch.bool else dtype)
