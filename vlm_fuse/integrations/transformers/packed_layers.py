"""Linear-attention and convolution layers of packed rows: run once for each document, with nothing carried over.

Such a layer goes on from token to token without a mask. transformers hands it boundaries only as ``seq_idx`` and
``cu_seq_lens_q``, which its fall-backs in plain torch refuse (or, before 5.20, ignore). The decoder layer around it knows the
positions, from which the boundaries are told; in gradient checkpointing it is the decoder layer that runs again.
"""

from __future__ import annotations

import functools
import importlib.util
import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import binding
from ..rewriting import NotRewritable, innermost, inside
from .call_sites import codes
from .documents import CACHES, documents, is_empty, numbers

#: a part of the names of the kernels that such layers call
_KERNELS = ("causal_conv1d", "delta_rule", "selective_scan", "chunk_scan")
_BOUNDARIES = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_CACHES = ("cache_params", *CACHES)

_lengths: ContextVar[list[list[int]] | None] = ContextVar("lengths of the documents of each row", default=None)


def bindings(model: nn.Module) -> Iterator[tuple[nn.Module, str, Callable | str]]:
    """(module, name, what runs in its place) of the layers, and of the decoder layers that they stand in, or why nothing does."""
    for module in model.modules():
        children = [child for child in module.children() if _carries_over(type(child))]
        if children and _takes(type(module), "position_ids"):
            yield module, "forward", _made(module, _with_lengths)
            for child in children:
                yield child, "forward", _made(child, _by_document)


def _made(module: nn.Module, wrapper: Callable) -> Callable | str:
    try:
        return _inside(binding.method(module, "forward"), wrapper)
    except (binding.Unreachable, NotRewritable) as reason:
        return str(reason)


@functools.cache
def _inside(forward: Callable, wrapper: Callable) -> Callable:
    return inside(forward, wrapper)


@functools.cache
def _carries_over(kind: type) -> bool:
    own = [function for owner in kind.__mro__ if not owner.__module__.startswith("torch.") for function in vars(owner).values()]
    functions = [function for function in own if isinstance(function, types.FunctionType)]
    names = {name for function in functions for code in codes(innermost(function).__code__) for name in code.co_names}
    return _takes(kind, "hidden_states") and any(kernel in name for name in names for kernel in _KERNELS)


def _takes(kind: type, name: str) -> bool:
    forward = getattr(kind, "forward", None)
    if not isinstance(forward, types.FunctionType):
        return False
    code = innermost(forward).__code__
    return name in code.co_varnames[: code.co_argcount]


def _with_lengths(forward: Callable) -> Callable:
    """A decoder layer that tells the layers in it of the documents, if a row holds several."""

    @functools.wraps(forward)
    def decoder_layer(self, *args, **kwargs):
        if not all(is_empty(kwargs.get(name)) for name in _CACHES) and kwargs.get("position_ids") is not None and kwargs["position_ids"].shape[-1] == 1:
            return forward(self, *args, **kwargs)
        if is_compiling():
            _refuse_packed(kwargs)
            return forward(self, *args, **kwargs)
        lengths = _lengths_of(kwargs)
        if lengths is None or _kernels_are_told(kwargs):
            return forward(self, *args, **kwargs)
        token = _lengths.set(lengths)
        try:
            return forward(self, *args, **{name: value for name, value in kwargs.items() if name not in ("seq_idx",)})
        finally:
            _lengths.reset(token)

    return decoder_layer


def _by_document(forward: Callable) -> Callable:
    """A layer that carries over, run for each document of each row."""

    @functools.wraps(forward)
    def layer(self, *args, **kwargs):
        lengths = None if is_compiling() else _lengths.get()
        if lengths is None:
            return forward(self, *args, **kwargs)
        hidden_states = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        mask = kwargs.pop("attention_mask", None)
        kwargs = {name: value for name, value in kwargs.items() if name not in (*_BOUNDARIES, *_CACHES)}
        rows = []
        for row, own in enumerate(lengths):
            parts = hidden_states[row : row + 1].split(own, dim=1)
            masks = [None] * len(own) if not isinstance(mask, Tensor) or mask.dim() != 2 else mask[row : row + 1].split(own, dim=1)
            rows.append(torch.cat([forward(self, part, attention_mask=kept, **kwargs) for part, kept in zip(parts, masks)], dim=1))
        return torch.cat(rows)

    return layer


def _lengths_of(kwargs: dict) -> list[list[int]] | None:
    """The lengths of each row's documents; None: one a row."""
    position_ids, seq_idx = kwargs.get("position_ids"), kwargs.get("seq_idx")
    if isinstance(position_ids, Tensor) and position_ids.dim() == 2:
        found = documents(position_ids, _kept(kwargs.get("attention_mask"), position_ids))
        own = found.numbers if found.packed else None
    elif isinstance(seq_idx, Tensor):
        own = torch.nn.functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).cumsum(-1)
    else:
        own = None
    return None if own is None else [torch.tensor(row).unique_consecutive(return_counts=True)[1].tolist() for row in own.tolist()]


def _kept(mask, position_ids: Tensor) -> Tensor | None:
    """``(B, L)``, nonzero = token, of the mask that the layers get: before 5.0 the one of attention, in which padding does not see itself."""
    rows, length = position_ids.shape
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape == (rows, mask.shape[1], length, length):
        itself = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        return itself if mask.dtype == torch.bool else itself == 0
    return mask if isinstance(mask, Tensor) and mask.shape == (rows, length) else None


def _kernels_are_told(kwargs: dict) -> bool:
    """The kernels that keep documents apart themselves are there, and have been given the boundaries."""
    there = torch.cuda.is_available() and all(importlib.util.find_spec(name) is not None for name in ("fla", "causal_conv1d"))
    return there and kwargs.get("seq_idx") is not None and kwargs.get("cu_seq_lens_q") is not None


def _refuse_packed(kwargs: dict) -> None:
    """Traced code cannot be run by document; that it need not is looked at when it runs."""
    position_ids = kwargs.get("position_ids")
    if isinstance(position_ids, Tensor) and position_ids.dim() == 2 and kwargs.get("cu_seq_lens_q") is None:
        kept = _kept(kwargs.get("attention_mask"), position_ids)
        torch._assert_async(
            (numbers(position_ids, None if kept is None else kept != 0)[:, -1] == 0).all(),
            "vlm_fuse: packed rows in layers of linear attention or convolution are not supported under torch.compile: compile without these rows, "
            "or give seq_idx and cu_seq_lens_q to the kernels of flash-linear-attention and causal-conv1d",
        )
