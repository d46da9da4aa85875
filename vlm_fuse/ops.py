"""The operators: schemas, fake kernels, registration. Imports torch alone; a backend is chosen at the call.

Plain eager tensors go straight to the backend's function; under torch.compile, export, a dispatch mode or for a tensor
subclass the registered operator is called instead (about 4 us more). Without that guard FakeTensorMode would hand null
pointers to the kernels, and make_fx would bake results in as constants.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import ModuleType

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import checks, status
from .backend import choose
from .batch import LAYOUTS, RAISE, ROW_DTYPES, Batch, RecordedError
from .modes import dispatch_modes, function_modes, peek_functorch

library = torch.library.Library("vlm_fuse", "DEF")

_BATCH = (
    "Tensor tokens, Tensor? attention_mask, Tensor? document_ids, Tensor? labels, SymInt[] kinds, Tensor? image_rows, "
    "Tensor? feature_counts, int scheme, int layout, bool left, bool unused"
)
library.define(f"plan({_BATCH}, SymInt? width, str validate, str backend) -> Tensor")
library.define(f"facts({_BATCH}, SymInt width, str names, SymInt? documents, str backend) -> Tensor[]")
library.define(
    "merge_rows(Tensor? text, Tensor? weight, Tensor? tokens, float? scale, Tensor[] features, SymInt[] starts, "
    "Tensor source_index, Tensor? text_index, bool add, ScalarType dtype, str validate, str backend) -> Tensor"
)
library.define(
    "merge_rows_backward(Tensor grad, Tensor source_index, Tensor? text_index, Tensor? tokens, float? scale, SymInt[] starts, "
    "bool add, SymInt[] text_size, ScalarType text_dtype, bool is_weight, bool needs_text, SymInt[] feature_sizes, int[] feature_dims, "
    "int[] feature_dtypes, bool[] needs_features, str backend) -> Tensor[]"
)

_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_PLAIN = (Tensor, torch.nn.Parameter)


def plain(tensor: Tensor) -> bool:
    """An ordinary tensor with memory of its own, which a kernel may read directly."""
    return type(tensor) in _PLAIN and (tensor.is_cpu or tensor.is_cuda or tensor.is_xpu) and not _wrapped(tensor)


def direct(backend: str, tensor: Tensor, others: tuple[Tensor, ...] = ()) -> ModuleType | None:
    """The backend's module where it may be called without the registered operators, else None."""
    if is_compiling() or dispatch_modes() or function_modes() or peek_functorch() is not None or type(tensor) not in _PLAIN:
        return None
    if tensor.is_neg():  # negated lazily: the dispatcher resolves that, a kernel would read the values before
        return None
    for other in others:
        if type(other) not in _PLAIN or other.is_neg():
            return None
    if tensor.is_cpu:
        return choose(backend, "cpu")
    return choose(backend, tensor.device.type) if plain(tensor) else None


def _direct(backend: str, batch: Batch) -> ModuleType | None:
    return direct(backend, batch.tokens, tuple([beside for beside in batch[1:4] if beside is not None]))


def functorch_active() -> bool:
    """Inside a transform of torch.func."""
    return not is_compiling() and peek_functorch() is not None


#: inside it torch.func does not wrap new tensors: a plan takes part in no transform.
outside_functorch = getattr(torch._C, "_DisableFuncTorch", nullcontext)


def unwrapped(tensor: Tensor | None) -> Tensor | None:
    """The plain tensor inside those of torch.func: ids and masks take part in no gradient."""
    while tensor is not None and not is_compiling() and _wrapped(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            raise NotImplementedError("merge: torch.vmap is not supported; the op takes a batch as it is")
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def kernels_for(backend: str, tensor: Tensor) -> ModuleType:
    return choose(backend, "cpu" if tensor.is_cpu else tensor.device.type)


def mode_of(validate: str, tensor: Tensor) -> str:
    """ "auto" is "sync" on a CPU and "async" elsewhere."""
    if validate == "auto":
        return "sync" if tensor.is_cpu else "async"
    return validate


# --- plan -------------------------------------------------------------------------------------------------------------


def count(batch: Batch, backend: str) -> tuple[int, int, int, tuple[int, ...]]:
    """Kept rows of the longest sample, of all, documents, placeholders by kind. Read back from a GPU, errors with it."""
    found = kernels_for(backend, batch.tokens).count(batch)
    if not batch.tokens.is_cpu:
        status.raise_errors(batch.tokens.device)
    return found


def needed_width(batch: Batch, backend: str) -> int:
    """The width that the layout needs where no length is given."""
    if LAYOUTS[batch.layout] == "keep":
        return batch.tokens.shape[1]
    longest, total, _, _ = count(batch, backend)
    return longest if LAYOUTS[batch.layout] == "padded" else total


def _plan(kernels: ModuleType, batch: Batch, width: int | None, validate: str, backend: str) -> Tensor:
    if width is None:
        width = needed_width(batch, backend)
    try:
        return kernels.plan(batch, width, status.for_mode(validate, batch.tokens.device))
    except RecordedError as error:
        raise checks.explain(error.record, batch) from None


def plan(batch: Batch, width: int | None, validate: str, backend: str) -> Tensor:
    """``(G, W)`` int32 source_index of the batch; W as needed where `width` is None."""
    kernels = _direct(backend, batch)
    if kernels is None:
        if functorch_active():
            with outside_functorch():
                return _plan(kernels_for(backend, batch.tokens), batch, width, validate, backend)
        return torch.ops.vlm_fuse.plan(*batch, width, validate, backend)
    return _plan(kernels, batch, width, validate, backend)


def _plan_op(*args):
    batch, backend = _batch(args[:11]), args[13]
    return _plan(kernels_for(backend, batch.tokens), batch, *args[11:])


library.impl("plan", _plan_op, "CompositeExplicitAutograd")


def _batch(fields) -> Batch:
    tokens, attention_mask, document_ids, labels, kinds, *rest = fields
    return Batch(tokens, attention_mask, document_ids, labels, tuple(kinds), *rest)


def _output_shape(batch: Batch, width) -> tuple:
    return (1 if LAYOUTS[batch.layout] == "packed" else batch.tokens.shape[0], width)


@torch.library.register_fake("vlm_fuse::plan", lib=library)
def _(*args):
    batch, width = _batch(args[:11]), args[11]
    if width is None:
        width = batch.tokens.shape[1] if LAYOUTS[batch.layout] == "keep" else _unknown_size()
    return batch.tokens.new_empty(_output_shape(batch, width), dtype=torch.int32)


def _unknown_size(least: int = 0):
    try:
        return torch.library.get_ctx().new_dynamic_size(min=least)
    except Exception as error:  # FakeTensorMode without a ShapeEnv raises one of several kinds
        raise RuntimeError(
            "length: the width of this layout depends on the data, and this FakeTensorMode has no ShapeEnv to say so; give length"
        ) from error


_FACT_DTYPES = {
    "text_index": torch.int32,
    "position_ids": torch.int64,
    "document_ids": torch.int32,
    "image_ids": torch.int32,
    "kind_ids": torch.int8,
    "attention_mask": torch.bool,
    "labels": None,
    "cu_seqlens": torch.int32,
}


def _facts(kernels: ModuleType, batch: Batch, width: int, names: tuple[str, ...], documents: int | None, backend: str) -> tuple[Tensor, ...]:
    if documents is None:
        documents = count(batch, backend)[2] if batch.document_ids is not None and "cu_seqlens" in names else 0
    return kernels.facts(batch, width, names, documents)


def facts(batch: Batch, width: int, names: tuple[str, ...], documents: int | None, backend: str) -> tuple[Tensor, ...]:
    """The named facts of the rows; `documents` sizes cu_seqlens where document_ids are given, None: as many as there are."""
    kernels = _direct(backend, batch)
    if kernels is None:
        if functorch_active():
            with outside_functorch():
                return _facts(kernels_for(backend, batch.tokens), batch, width, names, documents, backend)
        return tuple(torch.ops.vlm_fuse.facts(*batch, width, ",".join(names), documents, backend))
    return _facts(kernels, batch, width, names, documents, backend)


def _facts_op(*args):
    batch, (width, names, documents, backend) = _batch(args[:11]), args[11:]
    return list(_facts(kernels_for(backend, batch.tokens), batch, width, tuple(names.split(",")), documents, backend))


library.impl("facts", _facts_op, "CompositeExplicitAutograd")


@torch.library.register_fake("vlm_fuse::facts", lib=library)
def _(*args):
    batch, (width, names, documents, _) = _batch(args[:11]), args[11:]
    made = []
    for name in names.split(","):
        dtype = batch.labels.dtype if name == "labels" else _FACT_DTYPES[name]
        shape = _output_shape(batch, width)
        if name == "cu_seqlens":
            if batch.document_ids is None:
                shape = (batch.tokens.shape[0] + 1,)
            else:
                shape = (_unknown_size(1) if documents is None else documents + 1,)
        made.append(batch.tokens.new_empty(shape, dtype=dtype))
    return made


# --- rows -------------------------------------------------------------------------------------------------------------


def merge_rows(kernels: ModuleType, text, weight, tokens, scale, features, starts, source_index, text_index, add, dtype, validate) -> Tensor:
    """The row op on plain tensors: ``(G, W, D)``, every row copied from one source row (two with `add`)."""
    table = text if weight is None else weight
    makes = kernels.MAKES_TENSORS
    out = dtype if makes else table.new_empty(*source_index.shape, table.shape[-1], dtype=dtype)
    try:
        # without asking for the device: 0.2 us
        status_ = RAISE if validate == "sync" else status.for_mode(validate, source_index.device)
        made = kernels.rows(out, text, weight, tokens, scale, features, starts, source_index, text_index, add, False, status_)
    except RecordedError as error:
        # kernels that plan as well say of which batch
        raise checks.explain(error.record, getattr(kernels, "batch", None), input_ids=tokens) from None
    return made if makes else out


def merge_rows_in_place(kernels: ModuleType, out, text, weight, tokens, scale, features, starts, source_index, text_index, add, validate) -> Tensor:
    """The row op written into `out`; where that is the text itself only the feature rows are written."""
    status_ = status.for_mode(validate, source_index.device)
    try:
        kernels.rows(out, text, weight, tokens, scale, features, starts, source_index, text_index, add, out is text, status_)
    except RecordedError as error:
        raise checks.explain(error.record, input_ids=tokens) from None
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def _merge_rows_op(*args):
    *args, backend = args
    return merge_rows(kernels_for(backend, args[6]), *args)


library.impl("merge_rows", _merge_rows_op, "CompositeExplicitAutograd")


@torch.library.register_fake("vlm_fuse::merge_rows", lib=library)
def _(text, weight, tokens, scale, features, starts, source_index, text_index, add, dtype, validate, backend):
    table = text if weight is None else weight
    return table.new_empty((*source_index.shape, table.shape[-1]), dtype=dtype)


def merge_rows_backward(
    kernels: ModuleType, grad, source_index, text_index, tokens, scale, starts, add, table_like, is_weight, feature_likes
) -> tuple[Tensor | None, ...]:
    """Gradients of the text (or weight) and of each feature tensor: (shape, dtype) of those wanted, None for the others."""
    makes = kernels.MAKES_TENSORS
    if not makes:
        table_like, *feature_likes = [like and grad.new_empty(*like[0], dtype=like[1]) for like in (table_like, *feature_likes)]
    text, weight = (None, table_like) if is_weight else (table_like, None)
    made = kernels.rows_backward(grad, source_index, text_index, tokens, scale, starts, add, text, weight, feature_likes)
    return made if makes else (table_like, *feature_likes)


def accumulate_weight(kernels: ModuleType | None, grad, source_index, text_index, tokens, scale, add, weight_grad: Tensor) -> None:
    """Add the weight's gradient to `weight_grad`."""
    if kernels is None or torch.is_grad_enabled():
        raise RuntimeError("weight_grad: the backward adds to it in place, which has no gradient of its own; leave it out where one is needed")
    kernels.accumulate_weight(grad, source_index, text_index, tokens, scale, add, weight_grad)
    torch.autograd.graph.increment_version(weight_grad)


def feature_lists(likes: tuple) -> tuple[list, list[int], list[int]]:
    """(shape, dtype) of each feature tensor as flat lists, which is what a schema can carry."""
    sizes = [size for shape, _ in likes for size in shape]
    return sizes, [len(shape) for shape, _ in likes], [ROW_DTYPES.index(dtype) for _, dtype in likes]


def feature_likes(sizes, dims, dtypes) -> tuple:
    """The reverse of `feature_lists`."""
    likes, at = [], 0
    for dim, dtype in zip(dims, dtypes):
        likes.append((tuple(sizes[at : at + dim]), ROW_DTYPES[dtype]))
        at += dim
    return tuple(likes)


def _merge_rows_backward_op(
    grad, source_index, text_index, tokens, scale, starts, add, text_size, text_dtype, is_weight, needs_text,
    feature_sizes, feature_dims, feature_dtypes, needs_features, backend,
):  # fmt: skip
    likes = feature_likes(feature_sizes, feature_dims, feature_dtypes)
    made = merge_rows_backward(
        kernels_for(backend, grad), grad, source_index, text_index, tokens, scale, starts, add, (tuple(text_size), text_dtype) if needs_text else None,
        is_weight, [like if needed else None for like, needed in zip(likes, needs_features)],
    )  # fmt: skip
    return [gradient for gradient in made if gradient is not None]


library.impl("merge_rows_backward", _merge_rows_backward_op, "CompositeExplicitAutograd")


@torch.library.register_fake("vlm_fuse::merge_rows_backward", lib=library)
def _(
    grad, source_index, text_index, tokens, scale, starts, add, text_size, text_dtype, is_weight, needs_text,
    feature_sizes, feature_dims, feature_dtypes, needs_features, backend,
):  # fmt: skip
    made = [grad.new_empty(tuple(text_size), dtype=text_dtype)] if needs_text else []
    likes = feature_likes(feature_sizes, feature_dims, feature_dtypes)
    return made + [grad.new_empty(like[0], dtype=like[1]) for like, needed in zip(likes, needs_features) if needed]
