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
from torch.compiler import is_compiling

from . import ops
from .modes import peek_functorch

is_grad_enabled = torch.is_grad_enabled
#: in the vmap that autograd.grad(is_grads_batched=True) has, which is not torch.func's
_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: False)
_new = tuple.__new__


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
    weight_grad: Tensor | None = None  # the weight's gradient is added to it in the backward


def merge_rows(kernels, text: Tensor | None, weight: Tensor | None, features: tuple[Tensor, ...], call: RowCall, out: Tensor | None = None) -> Tensor:
    """The row op with gradients to text (or weight) and features, by the route that fits the caller.

    `kernels`: what `ops.direct` gave for all of these tensors; None: through the registered operator.
    """
    table = text if weight is None else weight
    if kernels is None:
        _no_out(out)
        if call.weight_grad is not None:
            raise ValueError("weight_grad: refused under torch.compile, torch.func, dispatch modes and for tensor subclasses; leave it out")
        if ops.functorch_active():
            return _FunctionalMergeRows.apply(_Opaque(call), weight is not None, table, *features)
        return _op(text, weight, features, call)
    if is_grad_enabled():
        records = table.requires_grad
        for rows in features:
            records = records or rows.requires_grad
        if records:
            return _apply(kernels, call, weight is not None, out is not None, table, *features)
    if forward_ad._current_level >= 0:
        _no_tangents(table, *features)
    return _run(kernels, text, weight, features, call, out)


def _run(kernels, text, weight, features, call: RowCall, out: Tensor | None) -> Tensor:
    tokens, scale, starts, source_index, text_index, add, dtype, validate, _, _ = call
    if out is None:
        return ops.merge_rows(kernels, text, weight, tokens, scale, features, starts, source_index, text_index, add, dtype, validate)
    return ops.merge_rows_in_place(kernels, out, text, weight, tokens, scale, features, starts, source_index, text_index, add, validate)


def _no_out(out: Tensor | None) -> None:
    if out is not None:
        raise ValueError("out: refused under torch.compile, torch.func, dispatch modes and for tensor subclasses; leave it out")


def _no_tangents(*tensors: Tensor) -> None:
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError("merge: forward-mode gradients are not supported; use reverse mode (backward, torch.func.grad)")


def _op(text, weight, features, call: RowCall) -> Tensor:
    return torch.ops.vlm_fuse.merge_rows(
        text,
        weight,
        call.tokens,
        call.scale,
        list(features),
        list(call.starts),
        call.source_index,
        call.text_index,
        call.add,
        call.dtype,
        call.validate,
        call.backend,
    )


def _like(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype


# --- the two linear maps, on whatever the caller has -------------------------------------------------------------------


def _gradients(grad: Tensor, call: RowCall, likes: Likes, needs_table: bool, needs_features):
    """The gradients in the order of the inputs, None where not needed; differentiable where gradients are recorded."""
    tokens, scale, source_index, text_index, add, backend = call.tokens, call.scale, call.source_index, call.text_index, call.add, call.backend
    kernels = None if is_grad_enabled() else ops.direct(backend, grad)
    if kernels is not None:
        table = likes.table if needs_table else None
        features = [like if needed else None for like, needed in zip(likes.features, needs_features)]
        return ops.merge_rows_backward(kernels, grad, source_index, text_index, tokens, scale, call.starts, add, table, likes.is_weight, features)
    made = torch.ops.vlm_fuse.merge_rows_backward(
        grad, source_index, text_index, tokens, scale, list(call.starts), add, list(likes.table[0]), likes.table[1], likes.is_weight, needs_table,
        *ops.feature_lists(likes.features), list(needs_features), backend,
    )  # fmt: skip
    return _spread(made, needs_table, needs_features)


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
    features = tuple(parts[1:])
    kernels = ops.direct(call.backend, table, features)
    return merge_rows(kernels, None if likes.is_weight else table, table if likes.is_weight else None, features, call)


def row_call(*fields) -> RowCall:
    """A RowCall by position, all fields; its own __new__ takes twice as long."""
    return _new(RowCall, fields)


def _version(tokens: Tensor | None) -> int | None:
    """The ids are kept for the gradient of the weight; they must not be overwritten before the backward."""
    return None if tokens is None or tokens.is_inference() else tokens._version


def _check_version(tokens: Tensor | None, version: int | None) -> None:
    if version is not None and tokens._version != version:
        raise RuntimeError(
            "input_ids: modified by an inplace operation between merge and its backward, which needs them for the gradient of weight; give merge a clone"
        )


# --- eager ------------------------------------------------------------------------------------------------------------


class _MergeRows(Function):
    boxed_grads_call = False  # where it is not said, torch looks for it in every backward, and catches an AttributeError

    @staticmethod
    def forward(ctx, kernels, call: RowCall, is_weight: bool, in_place: bool, table: Tensor, *features: Tensor):
        tokens, scale, starts, source_index, text_index, add, dtype, validate, _, _ = call
        version = None if tokens is None else _version(tokens)
        # one attribute: each costs 0.1 us, and so does a NamedTuple more than a plain one
        ctx.held = kernels, call, (table.shape, table.dtype), is_weight, [(rows.shape, rows.dtype) for rows in features], version
        ctx.set_materialize_grads(False)
        text, weight = (None, table) if is_weight else (table, None)
        if in_place:
            ctx.mark_dirty(table)
            return _run(kernels, text, weight, features, call, table)
        return ops.merge_rows(kernels, text, weight, tokens, scale, features, starts, source_index, text_index, add, dtype, validate)

    @staticmethod
    def backward(ctx, grad):
        needs = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(needs)
        if _batched(grad):
            raise NotImplementedError("merge: is_grads_batched and jacobian(vectorize=True) are not supported; call torch.vmap on torch.autograd.grad instead")
        kernels, call, table, is_weight, features, version = ctx.held
        tokens, scale, starts, source_index, text_index, add, _, _, backend, weight_grad = call
        if version is not None:
            _check_version(tokens, version)
        _, _, _, _, needs_table, *needs_features = needs
        if weight_grad is not None and needs_table:
            ops.accumulate_weight(ops.direct(backend, grad), grad, source_index, text_index, tokens, scale, add, weight_grad)
            needs_table = False
        if kernels.MAKES_TENSORS and not is_compiling() and not is_grad_enabled() and peek_functorch() is None:
            wanted_table = table if needs_table else None
            text, weight = (None, wanted_table) if is_weight else (wanted_table, None)
            wanted = [like if needed else None for like, needed in zip(features, needs_features)]
            made = kernels.gradients(grad, source_index, text_index, tokens, scale, starts, add, text, weight, wanted)
            if made is not None:
                return (None, None, None, None, *made)
        return (None, None, None, None, *_gradients(grad, call, Likes(table, is_weight, features), needs_table, needs_features))


# what the engine calls is a Python method that looks up `backward`; 1 us less without
if hasattr(_MergeRows, "_backward_cls"):
    _MergeRows._backward_cls.apply = _MergeRows.backward

# Function.apply is a Python wrapper around this; 1.1 us less
_apply = getattr(super(Function, _MergeRows), "apply", _MergeRows.apply)


# --- compile, export, modes -------------------------------------------------------------------------------------------


def _nothing(numbers):
    """No gradient for a list of numbers, in the structure that torch.library expects: an empty list stays one."""
    return None if numbers else []


def _setup_forward(ctx, inputs, output):
    text, weight, tokens, scale, features, starts, source_index, text_index, add, dtype, validate, backend = inputs
    table = text if weight is None else weight
    ctx.call = RowCall(tokens, scale, tuple(starts), source_index, text_index, add, dtype, validate, backend)
    ctx.likes = Likes(_like(table), weight is not None, tuple(_like(rows) for rows in features))
    ctx.needs_table = table.requires_grad
    ctx.needs_features = [rows.requires_grad for rows in features]


def _op_backward(ctx, grad):
    table, *features = _gradients(grad, ctx.call, ctx.likes, ctx.needs_table, ctx.needs_features)
    text, weight = (None, table) if ctx.likes.is_weight else (table, None)
    return text, weight, None, None, features, _nothing(ctx.call.starts), None, None, None, None, None, None


def _setup_backward(ctx, inputs, output):
    (grad, source_index, text_index, tokens, scale, starts, add, text_size, text_dtype, is_weight, needs_text,
     feature_sizes, feature_dims, feature_dtypes, needs_features, backend) = inputs  # fmt: skip
    ctx.call = RowCall(tokens, scale, tuple(starts), source_index, text_index, add, grad.dtype, "off", backend)
    ctx.likes = Likes((tuple(text_size), text_dtype), is_weight, ops.feature_likes(feature_sizes, feature_dims, feature_dtypes))
    ctx.needs = needs_text, needs_features
    ctx.grad_dtype = grad.dtype


def _op_double_backward(ctx, second):
    grad = _double_backward(second, ctx.grad_dtype, ctx.call, ctx.likes, *ctx.needs)
    nothing = _nothing(ctx.call.starts)  # as empty as the lists that describe the features
    return grad, None, None, None, None, nothing, None, _nothing(ctx.likes.table[0]), None, None, None, nothing, nothing, nothing, nothing, None


torch.library.register_autograd("vlm_fuse::merge_rows", _op_backward, setup_context=_setup_forward, lib=ops.library)
torch.library.register_autograd("vlm_fuse::merge_rows_backward", _op_double_backward, setup_context=_setup_backward, lib=ops.library)


@torch.library.register_vmap("vlm_fuse::merge_rows_backward", lib=ops.library)
def _(info, in_dims, grad, *others):
    """The gradients of many losses, one after another."""
    made = [torch.ops.vlm_fuse.merge_rows_backward(one, *others) for one in grad.unbind(in_dims[0])]
    return [torch.stack(parts) for parts in zip(*made)], [0] * len(made[0])


# --- torch.func -------------------------------------------------------------------------------------------------------


class _Opaque:
    """Keeps functorch from looking into a RowCall and wrapping its index tensors."""

    def __init__(self, call: RowCall):
        self.call = call


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
    def forward(held: _Opaque, is_weight: bool, table: Tensor, *features: Tensor):
        return _op(None if is_weight else table, table if is_weight else None, features, held.call)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.held, is_weight, table, *features = inputs
        ctx.likes = Likes(_like(table), is_weight, tuple(_like(rows) for rows in features))

    @staticmethod
    def backward(ctx, grad):
        count = len(ctx.likes.features)
        made = _FunctionalMergeRowsBackward.apply(grad, ctx.held, ctx.likes, True, (True,) * count)
        return (None, None, *made)


class _FunctionalMergeRowsBackward(_NoTransforms):
    @staticmethod
    def forward(grad: Tensor, held: _Opaque, likes: Likes, needs_table: bool, needs_features):
        return tuple(_gradients(grad, held.call, likes, needs_table, needs_features))

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, ctx.held, ctx.likes, *ctx.needs = inputs
        ctx.grad_dtype = grad.dtype

    @staticmethod
    def backward(ctx, *second):
        return (_double_backward(list(second), ctx.grad_dtype, ctx.held.call, ctx.likes, *ctx.needs), None, None, None, None)
