"""What the row op saves and what its backward calls.

The op is linear in the text (or weight) and in the features, so that nothing but index tensors is kept, and the double
backward is the op itself. Three routes reach the same kernels:

- eager: an old-style `Function` (a new-style one with setup_context costs 10 us more);
- compile, export, modes, tensor subclasses: the registered operator with `register_autograd`;
- torch.func: a new-style `Function`, the only one that functorch takes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import ops

_peek_functorch = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: True)


class Likes(NamedTuple):
    """(shape, dtype) of what gradients are wanted for."""

    table: tuple
    is_weight: bool
    features: tuple


class RowCall(NamedTuple):
    """The arguments of the row op that no gradient flows to."""

    tokens: Tensor | None
    scale: float | None
    starts: tuple[int, ...]
    source_index: Tensor
    text_index: Tensor | None
    add: bool
    dtype: torch.dtype
    validate: str
    backend: str


def merge_rows(text: Tensor | None, weight: Tensor | None, features: tuple[Tensor, ...], call: RowCall, out: Tensor | None = None) -> Tensor:
    """The row op with gradients to text (or weight) and features, by the route that fits the caller."""
    table = text if weight is None else weight
    if ops.traced() or not ops.plain(table, *features) or not ops.plain(call.source_index):
        _no_out(out)
        return _op(text, weight, features, call)
    if _peek_functorch() is not None:
        _no_out(out)
        return _FunctionalMergeRows.apply(call, weight is not None, table, *features)
    if torch.is_grad_enabled() and (table.requires_grad or any(rows.requires_grad for rows in features)):
        return _apply(call, weight is not None, out is not None, table, *features)
    if forward_ad._current_level >= 0:
        _no_tangents(table, *features)
    if out is None:
        return ops.merge_rows(text, weight, call.tokens, call.scale, features, call.starts, call.source_index, call.text_index, call.add, call.dtype, call.validate, call.backend)
    return _in_place(out, text, weight, features, call)


def _in_place(out, text, weight, features, call: RowCall) -> Tensor:
    return ops.merge_rows_in_place(
        out, text, weight, call.tokens, call.scale, features, call.starts, call.source_index, call.text_index, call.add, call.validate, call.backend
    )


def _no_out(out: Tensor | None) -> None:
    if out is not None:
        raise ValueError("out: refused under torch.compile, torch.func, dispatch modes and for tensor subclasses; leave it out")


def _no_tangents(*tensors: Tensor) -> None:
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError("merge: forward-mode gradients are not supported; use reverse mode (backward, torch.func.grad)")


def _op(text, weight, features, call: RowCall) -> Tensor:
    return torch.ops.vlm_fuse.merge_rows(
        text, weight, call.tokens, call.scale, list(features), list(call.starts), call.source_index, call.text_index, call.add, call.dtype, call.validate, call.backend
    )


def _like(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype


# --- the two linear maps, on whatever the caller has -------------------------------------------------------------------


def _gradients(grad: Tensor, call: RowCall, likes: Likes, needs_table: bool, needs_features) -> list[Tensor]:
    """The gradients asked for, table first, by the registered operator (differentiable) or directly."""
    if torch.is_grad_enabled() or ops.traced() or not ops.plain(grad) or _peek_functorch() is not None:
        sizes = [size for shape, _ in likes.features for size in shape]
        return torch.ops.vlm_fuse.merge_rows_backward(
            grad, call.source_index, call.text_index, call.tokens, call.scale, list(call.starts), call.add, list(likes.table[0]), likes.table[1],
            likes.is_weight, needs_table, sizes, [len(shape) for shape, _ in likes.features], [dtype for _, dtype in likes.features],
            list(needs_features), call.backend,
        )  # fmt: skip
    grad_table, grad_features = ops.merge_rows_backward(
        grad, call.source_index, call.text_index, call.tokens, call.scale, call.starts, call.add, likes.table, likes.is_weight, needs_table,
        likes.features, needs_features, call.backend,
    )  # fmt: skip
    return [made for made in (grad_table, *grad_features) if made is not None]


def _spread(gradients: list[Tensor], needs_table: bool, needs_features) -> list[Tensor | None]:
    """Back in the order of the inputs, None where none was asked for."""
    remaining = iter(gradients)
    return [next(remaining) if needed else None for needed in (needs_table, *needs_features)]


def _double_backward(second: list[Tensor | None], grad_dtype: torch.dtype, call: RowCall, likes: Likes, needs_table: bool, needs_features) -> Tensor:
    """The gradient of the backward with respect to `grad`: the merge of what flows into the gradients that were asked for."""
    zero = call.source_index.new_zeros((), dtype=grad_dtype)
    parts = [
        zero.to(like[1]).expand(like[0]) if part is None else part
        for part, like in zip(_spread(second, needs_table, needs_features), (likes.table, *likes.features))
    ]
    call = call._replace(dtype=grad_dtype, validate="off")
    table = parts[0]
    return merge_rows(None if likes.is_weight else table, table if likes.is_weight else None, tuple(parts[1:]), call)


# --- eager ------------------------------------------------------------------------------------------------------------


class _MergeRows(Function):
    @staticmethod
    def forward(ctx, call: RowCall, is_weight: bool, in_place: bool, table: Tensor, *features: Tensor):
        ctx.call = call
        ctx.likes = Likes((table.shape, table.dtype), is_weight, tuple([_like(rows) for rows in features]))
        ctx.set_materialize_grads(False)
        text, weight = (None, table) if is_weight else (table, None)
        if in_place:
            ctx.mark_dirty(table)
            return _in_place(table, text, weight, features, call)
        return ops.merge_rows(text, weight, call.tokens, call.scale, features, call.starts, call.source_index, call.text_index, call.add, call.dtype, call.validate, call.backend)

    @staticmethod
    def backward(ctx, grad):
        _, _, _, needs_table, *needs_features = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        gradients = _gradients(grad, ctx.call, ctx.likes, needs_table, needs_features)
        return (None, None, None, *_spread(gradients, needs_table, needs_features))


# Function.apply is a Python wrapper around this; 1.1 us less
_apply = getattr(super(Function, _MergeRows), "apply", _MergeRows.apply)


# --- compile, export, modes -------------------------------------------------------------------------------------------


def _setup_forward(ctx, inputs, output):
    text, weight, tokens, scale, features, starts, source_index, text_index, add, dtype, validate, backend = inputs
    table = text if weight is None else weight
    ctx.call = RowCall(tokens, scale, tuple(starts), source_index, text_index, add, dtype, validate, backend)
    ctx.likes = Likes(_like(table), weight is not None, tuple(_like(rows) for rows in features))
    ctx.needs_table = table.requires_grad
    ctx.needs_features = [rows.requires_grad for rows in features]


def _op_backward(ctx, grad):
    gradients = _gradients(grad, ctx.call, ctx.likes, ctx.needs_table, ctx.needs_features)
    table, *features = _spread(gradients, ctx.needs_table, ctx.needs_features)
    text, weight = (None, table) if ctx.likes.is_weight else (table, None)
    return text, weight, None, None, features, None, None, None, None, None, None, None


def _setup_backward(ctx, inputs, output):
    (grad, source_index, text_index, tokens, scale, starts, add, text_size, text_dtype, is_weight, needs_text,
     feature_sizes, feature_dims, feature_dtypes, needs_features, backend) = inputs  # fmt: skip
    ctx.call = RowCall(tokens, scale, tuple(starts), source_index, text_index, add, grad.dtype, "off", backend)
    ctx.likes = Likes((tuple(text_size), text_dtype), is_weight, tuple(ops.feature_likes(feature_sizes, feature_dims, feature_dtypes)))
    ctx.needs = needs_text, needs_features
    ctx.grad_dtype = grad.dtype


def _op_double_backward(ctx, second):
    grad = _double_backward(second, ctx.grad_dtype, ctx.call, ctx.likes, *ctx.needs)
    return (grad, *(None,) * 15)


torch.library.register_autograd("vlm_fuse::merge_rows", _op_backward, setup_context=_setup_forward, lib=ops.library)
torch.library.register_autograd("vlm_fuse::merge_rows_backward", _op_double_backward, setup_context=_setup_backward, lib=ops.library)


# --- torch.func -------------------------------------------------------------------------------------------------------


class _NoTransforms(Function):
    """What functorch asks of a Function, refused in words."""

    @staticmethod
    def vmap(info, in_dims, *args):
        raise NotImplementedError("merge: torch.vmap is not supported; the op takes a batch as it is")

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError("merge: forward-mode gradients are not supported; use reverse mode (backward, torch.func.grad)")


class _FunctionalMergeRows(_NoTransforms):
    @staticmethod
    def forward(call: RowCall, is_weight: bool, table: Tensor, *features: Tensor):
        return _op(None if is_weight else table, table if is_weight else None, features, call)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, is_weight, table, *features = inputs
        ctx.likes = Likes(_like(table), is_weight, tuple(_like(rows) for rows in features))

    @staticmethod
    def backward(ctx, grad):
        count = len(ctx.likes.features)
        made = _FunctionalMergeRowsBackward.apply(grad, ctx.call, ctx.likes, True, (True,) * count)
        return (None, None, *made)


class _FunctionalMergeRowsBackward(_NoTransforms):
    @staticmethod
    def forward(grad: Tensor, call: RowCall, likes: Likes, needs_table: bool, needs_features):
        return tuple(_gradients(grad, call, likes, needs_table, needs_features))

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, ctx.call, ctx.likes, *ctx.needs = inputs
        ctx.grad_dtype = grad.dtype

    @staticmethod
    def backward(ctx, *second):
        return (_double_backward(list(second), ctx.grad_dtype, ctx.call, ctx.likes, *ctx.needs), None, None, None, None)
