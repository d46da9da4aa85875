"""The errors of the public functions. Each names the argument or the sample, the counts, and the remedy."""

from __future__ import annotations

import operator
import sys

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .attending import NO_LIMIT, Attend
from .batch import (
    BAD_GRID,
    COUNTS_DIFFER,
    DOCUMENT_RETURNS,
    GRID_CUT,
    GRID_UNUSED,
    IMAGE_CUT,
    NO_GRID,
    OUTSIDE_VOCABULARY,
    ROW_DTYPES,
    SCHEMES,
    TOO_FEW_ROWS,
    TOO_LONG,
    TOO_MANY_INTERVALS,
    TOO_MANY_ROWS,
    UNKNOWN_TYPE,
    Batch,
)
from .modes import dispatch_modes

ID_DTYPES = (torch.int64, torch.int32)
MASK_DTYPES = (torch.int64, torch.bool, torch.int32, torch.int16, torch.int8, torch.uint8)
VALIDATE = ("auto", "sync", "async", "off")
_PLAIN = (Tensor, torch.nn.Parameter)
_ATTENTION_DTYPES = (*MASK_DTYPES, *ROW_DTYPES)


def names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


# --- single arguments -------------------------------------------------------------------------------------------------


def choice(name: str, value, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: unknown {value!r}; choose one of {', '.join(allowed)}")


def tensor(name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if type(value) not in _PLAIN and not is_compiling():
        _on_this_rank(name, value)


def _on_this_rank(name: str, value: Tensor) -> None:
    """No tensor that is spread over ranks, of which a kernel would read nothing or another's."""
    spread = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())  # where it was never imported there are none
    if isinstance(value, spread):
        remedy = "inputs_embeds=embedding(input_ids), which looks up each rank's part" if name == "weight" else f"{name}.to_local()"
        raise TypeError(
            f"{name}: is a DTensor over {value.device_mesh.size()} ranks ({', '.join(map(str, value.placements))}), but vlm_fuse works on what this rank has; "
            f"give {remedy}, or {name}.full_tensor(); plan.shard makes the plan of the rows that one rank has"
        )


def dtype_of(name: str, value: Tensor, allowed) -> None:
    tensor(name, value)
    if value.dtype not in allowed:
        raise TypeError(f"{name}: expected one of {names(allowed)}, got {names([value.dtype])}")


def floating(name: str, dtype: torch.dtype) -> None:
    if dtype not in ROW_DTYPES:
        raise TypeError(f"{name}: expected one of {names(ROW_DTYPES)}, got {dtype!r}")


def same_shape(name: str, value: Tensor, shape: torch.Size, of: str) -> None:
    if value.shape != shape:
        extra = "; a 4-D mask is a rendering, give the (B, T) mask that it came from" if value.dim() == 4 else ""
        raise ValueError(f"{name}: expected the shape of {of}, {tuple(shape)}, got {tuple(value.shape)}{extra}")


def same_device(name: str, value: Tensor, device: torch.device, of: str) -> None:
    if value.device != device:
        raise ValueError(f"{name}: is on {value.device}, but {of} is on {device}; move one of them")


def token_id(name: str, value) -> int:
    """An id as an int; a bool or a float is a mistake, a one-element tensor would be read back from its device."""
    if isinstance(value, (bool, float, Tensor)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    try:
        found = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None
    if not -(2**63) <= found < 2**63:
        raise ValueError(f"{name}: {found} is no token id, which are int64; give the id that the tokenizer has for the placeholder")
    return found


def whole_numbers(name: str, value) -> Tensor:
    """A list of ints or an integer tensor as ``(n,)`` int64."""
    if isinstance(value, Tensor):
        if value.dtype not in (*ID_DTYPES, torch.int16, torch.int8, torch.uint8):
            raise TypeError(f"{name}: expected integers, got {names([value.dtype])}")
        found = value.reshape(-1).to(torch.int64)
        least = int(found.min()) if on_host(found) and found.numel() else 0
    else:
        try:
            numbers = [operator.index(number) for number in value]
        except TypeError:
            raise TypeError(f"{name}: expected a list of ints or an integer tensor, got {value!r}") from None
        found, least = torch.tensor(numbers, dtype=torch.int64, device="cpu"), min(numbers, default=0)
    if least < 0:
        raise ValueError(f"{name}: {least} is below 0")
    return found


def on_host(numbers: Tensor) -> bool:
    """The values can be read without waiting for a device and without breaking a trace."""
    return not torch.compiler.is_compiling() and type(numbers) is Tensor and numbers.is_cpu and not dispatch_modes()


# --- batches ----------------------------------------------------------------------------------------------------------


def batch_tensors(input_ids, placeholder_mask, attention_mask, labels, document_ids) -> Tensor:
    """The tensor that gives the tokens, (B, T); the others agree with it."""
    tokens, name, dtypes = (input_ids, "input_ids", ID_DTYPES) if placeholder_mask is None else (placeholder_mask, "placeholder_mask", (torch.bool,))
    if tokens is None:
        raise ValueError("input_ids: missing; only a placeholder_mask together with inputs_embeds can stand in for it")
    dtype_of(name, tokens, dtypes)
    if tokens.dim() != 2:
        raise ValueError(f"{name}: expected (B, T), got {tuple(tokens.shape)}" + ("; unsqueeze(0) one sample" if tokens.dim() == 1 else ""))
    if tokens.numel() >= 2**31:
        raise ValueError(f"{name}: {tokens.numel()} tokens; a plan counts at most {2**31 - 1}, split the batch")
    if attention_mask is not None:
        _beside(tokens, name, "attention_mask", attention_mask, _ATTENTION_DTYPES)
    if labels is not None:
        _beside(tokens, name, "labels", labels, ID_DTYPES)
    if document_ids is not None:
        _beside(tokens, name, "document_ids", document_ids, ID_DTYPES)
    if placeholder_mask is not None and input_ids is not None:
        _beside(tokens, name, "input_ids", input_ids, ID_DTYPES)
    return tokens


def _beside(tokens: Tensor, tokens_name: str, name: str, value: Tensor, dtypes) -> None:
    """`value` says something about each token."""
    dtype_of(name, value, dtypes)
    same_shape(name, value, tokens.shape, tokens_name)
    if value.device != tokens.device:
        same_device(name, value, tokens.device, tokens_name)


def text_source(inputs_embeds, weight, input_ids, embed_scale, token_shape: torch.Size, device: torch.device, of: str) -> None:
    """Exactly one of inputs_embeds and weight, of a dtype and shape that rows can be read from."""
    if (inputs_embeds is None) == (weight is None):
        raise ValueError("inputs_embeds, weight: give exactly one, the text embeddings or the embedding table that they are looked up in")
    if inputs_embeds is not None:
        dtype_of("inputs_embeds", inputs_embeds, ROW_DTYPES)
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[:2] != token_shape:
            raise ValueError(f"inputs_embeds: expected (B, T, D) with (B, T) = {tuple(token_shape)}, got {tuple(inputs_embeds.shape)}")
        if inputs_embeds.device != device:
            same_device("inputs_embeds", inputs_embeds, device, of)
        if embed_scale is not None:
            raise ValueError("embed_scale: goes with weight; inputs_embeds come scaled from the model's own embedding")
        return
    if input_ids is None:
        raise ValueError("weight: needs input_ids to look up")
    dtype_of("weight", weight, ROW_DTYPES)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected (V, D), got {tuple(weight.shape)}")
    same_device("weight", weight, device, of)
    if embed_scale is not None and (isinstance(embed_scale, bool) or not isinstance(embed_scale, (int, float))):
        raise TypeError(f"embed_scale: expected a float, got {type(embed_scale).__name__}; a tensor would be read back")


def feature_tensors(tensors, dim: int, device: torch.device) -> None:
    for rows in tensors:
        if type(rows) not in _PLAIN:
            tensor("image_embeds", rows)
        if rows.dtype not in ROW_DTYPES:
            raise TypeError(f"image_embeds: expected one of {names(ROW_DTYPES)}, got {names([rows.dtype])}")
        if rows.shape[-1] != dim:
            raise ValueError(f"image_embeds: rows of {rows.shape[-1]} features, but the text has D = {dim}; project them first")
        if rows.device != device:
            same_device("image_embeds", rows, device, "the text")


def output(out: Tensor, inputs_embeds, keep: bool, records: bool) -> None:
    """`out` may be written: no gradient is lost, and no row is needed after it was overwritten."""
    if out is inputs_embeds:
        if not keep:
            raise ValueError("out: inputs_embeds can be written in place with layout='keep' and scheme='placeholders' only; other layouts move rows")
        if torch.is_grad_enabled() and out.is_leaf and out.requires_grad:
            raise ValueError("out: inputs_embeds is a leaf that requires grad and cannot be written in place; leave out=None")
    elif records or (torch.is_grad_enabled() and out.requires_grad):
        raise ValueError("out: cannot be written while gradients are recorded, unless it is inputs_embeds; leave it out or use torch.no_grad()")


def output_memory(out: Tensor, shape, dim: int, sources: tuple[Tensor, ...]) -> None:
    """`out` can be written: its shape, its strides, no overlap with what is read."""
    wanted = (*shape, dim)
    if tuple(out.shape) != wanted:
        raise ValueError(f"out: expected {wanted}, got {tuple(out.shape)}")
    start, stop = _extent(out)
    for source in sources:
        if source is not out and source.numel() and out.numel():
            first, last = _extent(source)
            if first < stop and start < last:
                raise ValueError("out: shares memory with a tensor that is read; give memory of its own")
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        raise ValueError(f"out: the elements of a row are {out.stride(-1)} apart; give a tensor whose last dimension is contiguous")
    if out.numel() and any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape)):
        raise ValueError("out: is expanded, several elements share one place in memory; give a contiguous tensor")


def weight_gradient(weight_grad: Tensor, weight: Tensor | None) -> None:
    """`weight_grad` can be added to: rows of the weight, contiguous, and something will be added."""
    if weight is None:
        raise ValueError("weight_grad: there is no weight; text embeddings that are given have a gradient of their own")
    tensor("weight_grad", weight_grad)
    dtype_of("weight_grad", weight_grad, ROW_DTYPES)
    if weight_grad.shape != weight.shape:
        raise ValueError(f"weight_grad: expected {tuple(weight.shape)} as weight, got {tuple(weight_grad.shape)}")
    same_device("weight_grad", weight_grad, weight.device, "weight")
    if not weight_grad.is_contiguous() or weight_grad.requires_grad:
        raise ValueError("weight_grad: is written in place; give a contiguous tensor that requires no gradient")
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError("weight_grad: weight requires no gradient, so that nothing would be added; leave it out")
    if not is_compiling() and weight_grad.numel():
        start, stop = _extent(weight)
        first, last = _extent(weight_grad)
        if first < stop and start < last:
            raise ValueError("weight_grad: shares memory with weight; give memory of its own")


def _extent(value: Tensor) -> tuple[int, int]:
    """First byte and the byte after the last that a tensor reaches."""
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride()))
    return value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()


# --- masks ------------------------------------------------------------------------------------------------------------


def interval_pair(kv_lo, kv_hi, kv_length, kv_lo2, kv_hi2) -> None:
    """Intervals of one shape and device; where they can be read on the host, in order, apart and inside the keys."""
    if (kv_lo2 is None) != (kv_hi2 is None):
        raise TypeError("kv_lo2, kv_hi2: give both or neither")
    given = {"kv_lo": kv_lo, "kv_hi": kv_hi} | ({} if kv_lo2 is None else {"kv_lo2": kv_lo2, "kv_hi2": kv_hi2})
    for name, value in given.items():
        dtype_of(name, value, (torch.int32,))
        if value.dim() != 2:
            raise ValueError(f"{name}: expected (B, Q), got {tuple(value.shape)}")
        same_shape(name, value, kv_lo.shape, "kv_lo")
        same_device(name, value, kv_lo.device, "kv_lo")
    if not isinstance(kv_length, (int, torch.SymInt)) or isinstance(kv_length, bool) or not 0 <= kv_length < 2**31:
        raise ValueError(f"kv_length: expected a number of keys from 0 to {2**31 - 1}, got {kv_length!r}")
    if not on_host(kv_lo):
        return
    empty = (kv_lo == 0) & (kv_hi == 0)
    right = empty | ((kv_lo >= 0) & (kv_lo < kv_hi) & (kv_hi <= kv_length))
    if kv_lo2 is not None:
        right &= ((kv_lo2 == 0) & (kv_hi2 == 0)) | (~empty & (kv_hi < kv_lo2) & (kv_lo2 < kv_hi2) & (kv_hi2 <= kv_length))
    if bool(right.all()):
        return
    sample, row = (~right).nonzero()[0].tolist()
    told = ", ".join(f"{name} {int(value[sample, row])}" for name, value in given.items())
    raise ValueError(
        f"IntervalMask: row {row} of sample {sample} has {told} of {kv_length} keys. Expected 0 <= kv_lo < kv_hi < kv_lo2 < kv_hi2 <= kv_length, with (0, 0) for an interval "
        "that is not there; join intervals that touch, and put the only one of a row first"
    )


def attend_of(value) -> None:
    if not isinstance(value, Attend):
        more = "; ask for one layer type at a time" if isinstance(value, dict) else ""
        raise TypeError(f"attend: expected an Attend, got {type(value).__name__}{more}")


def ids_fit(name: str, ids: Tensor) -> None:
    """Ids are kept as int32: a larger one would be taken for another. Other faults of theirs are found elsewhere."""
    if isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.dim() == 2 and on_host(ids) and ids.numel() and int(ids.max()) >= 2**31:
        sample, row = (ids >= 2**31).nonzero()[0].tolist()
        raise ValueError(f"{name}: id {int(ids[sample, row])} (sample {sample}, row {row}) does not fit in int32; number them from 0")


def prefix_lengths(value) -> Tensor | None:
    """Rows of every document's prefix, or one number for all, as int64 on the device that it was given on."""
    found = _by_document("prefix_lengths", value)
    if found is not None and on_host(found) and found.numel() and int(found.min()) < 0:
        raise ValueError(f"prefix_lengths: {int(found.min())} is below 0; a document without a prefix has 0")
    return None if found is None else found.clamp(max=NO_LIMIT)


def parent_ids(value) -> Tensor | None:
    """The parent of every document, -1 for none, as int64 on the device that it was given on."""
    found = _by_document("parent_ids", value)
    if found is None:
        return None
    if found.dim() == 0:
        raise TypeError("parent_ids: expected one for each document id, got a single number")
    if on_host(found) and found.numel() and int(found.min()) < -1:
        raise ValueError(f"parent_ids: {int(found.min())} is no document id; a document without a parent has -1")
    return found


def _by_document(name: str, value) -> Tensor | None:
    """An int, a list of ints or an integer tensor of at most one dimension; None where there is nothing in it."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        dtype_of(name, value, (*ID_DTYPES, torch.int16, torch.int8, torch.uint8))
        found = value.long()
    else:
        try:
            numbers = [value] if not isinstance(value, (list, tuple)) else value
            if any(isinstance(number, bool) for number in numbers):
                raise TypeError
            numbers = [min(operator.index(number), 2**62) for number in numbers]
        except TypeError:
            raise TypeError(f"{name}: expected ints by document id, got {value!r}") from None
        found = torch.tensor(numbers if isinstance(value, (list, tuple)) else numbers[0], dtype=torch.int64, device="cpu")
    if found.dim() > 1:
        raise ValueError(f"{name}: expected (documents,), got {tuple(found.shape)}")
    return found if found.numel() else None


def documents_of(document_ids: Tensor, prefixes: Tensor | None, parents: Tensor | None) -> None:
    """There is an entry for every document, and a parent stands earlier in the same output row."""
    if not on_host(document_ids) or not document_ids.numel():
        return
    most = int(document_ids.max())
    for name, value in (("prefix_lengths", prefixes), ("parent_ids", parents)):
        if value is not None and value.dim() and most >= len(value):
            raise ValueError(f"{name}: has {len(value)} entries, but there is a document id {most}; give one for every document id")
    if parents is None or not on_host(parents):
        return
    above = parents.tolist()
    for sample, line in enumerate(document_ids.tolist()):
        met = set()
        for document in dict.fromkeys(line):  # in order of their first rows
            if document >= 0:
                if above[document] >= 0 and above[document] not in met:
                    raise ValueError(
                        f"parent_ids: document {document} (sample {sample}) has parent {above[document]}, which does not stand before it in the same row; a parent comes first, "
                        "and -1 means none"
                    )
                met.add(document)


def inside(name: str, start, stop, size: int, of: str) -> None:
    """A range of a mask's rows or keys."""
    for value in (start, stop):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name}: expected ints, got {value!r}")
    if not 0 <= start <= stop <= size:
        raise ValueError(f"{name}: {start} to {stop} is not a range of the {size} {of} of the mask")


def block_size(value) -> tuple[int, int]:
    """(rows, keys) of a block."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or any(isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 2**31 for size in pair):
        raise ValueError(f"BLOCK_SIZE: expected a whole number of at least 1, or two of them (rows, keys), got {value!r}")
    return pair


def from_cu_seqlens(cu_seqlens, attend, length) -> int:
    """The number of rows that the offsets are for."""
    dtype_of("cu_seqlens", cu_seqlens, ID_DTYPES)
    if cu_seqlens.dim() != 1 or not cu_seqlens.shape[0]:
        raise ValueError(f"cu_seqlens: expected (documents + 1,), got {tuple(cu_seqlens.shape)}")
    attend_of(attend)
    if length is not None and (isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)) or length < 0):
        raise ValueError(f"length: expected a number of rows, got {length!r}")
    if attend.images != "causal":
        raise ValueError(f"attend: Attend(images={attend.images!r}) needs image ids; use from_document_ids(..., image_ids=...)")
    if on_host(cu_seqlens):
        offsets = cu_seqlens.tolist()
        falls = next((i for i in range(1, len(offsets)) if offsets[i] < offsets[i - 1]), None)
        if offsets[0] != 0 or falls is not None:
            wrong = f"begins at {offsets[0]}" if falls is None else f"falls from {offsets[falls - 1]} to {offsets[falls]} at document {falls - 1}"
            raise ValueError(f"cu_seqlens: {wrong}; offsets begin at 0 and never fall")
        if length is not None and length < offsets[-1]:
            raise ValueError(f"length: {length} rows, but the documents of cu_seqlens end at {offsets[-1]}; raise length")
    return int(cu_seqlens[-1]) if length is None else length


def from_document_ids(document_ids, attend, image_ids) -> None:
    dtype_of("document_ids", document_ids, ID_DTYPES)
    attend_of(attend)
    if document_ids.dim() != 2:
        raise ValueError(f"document_ids: expected (B, Q), got {tuple(document_ids.shape)}")
    ids_fit("document_ids", document_ids)
    if image_ids is not None:
        dtype_of("image_ids", image_ids, ID_DTYPES)
        same_shape("image_ids", image_ids, document_ids.shape, "document_ids")
        same_device("image_ids", image_ids, document_ids.device, "document_ids")
        ids_fit("image_ids", image_ids)
    elif attend.images != "causal":
        raise ValueError(f"image_ids: needed by Attend(images={attend.images!r}), -1 where there is no image")


def attention(q, k, v, mask, scale) -> None:
    """(B, H, Q, D), (B, H_kv, K, D) and (B, H_kv, K, D_v) under a mask of Q rows and K keys."""
    if not hasattr(mask, "kv_length"):
        raise TypeError(f"mask: expected an IntervalMask, got {type(mask).__name__}")
    for name, value in (("q", q), ("k", k), ("v", v)):
        if value.dim() != 4:
            raise ValueError(f"{name}: expected (B, heads, rows, D), got {tuple(value.shape)}")
        same_device(name, value, mask.kv_lo.device, "the mask")
        if value.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q, {names([q.dtype])}, got {names([value.dtype])}")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise TypeError(f"scale: expected a float, got {type(scale).__name__}")
    if not q.dtype.is_floating_point:
        raise TypeError(f"q: expected a floating dtype, got {names([q.dtype])}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v: expected the batch, heads and keys of k, {tuple(k.shape[:3])}, got {tuple(v.shape[:3])}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k: expected the batch and D of q, {q.shape[0]} and {q.shape[3]}, got {k.shape[0]} and {k.shape[3]}")
    if q.shape[1] % k.shape[1] if k.shape[1] else q.shape[1]:
        raise ValueError(f"k: {q.shape[1]} heads of q cannot be shared out among {k.shape[1]} heads of keys; give a divisor")
    samples, rows = mask.kv_lo.shape
    if samples not in (1, q.shape[0]) or rows != q.shape[2] or mask.kv_length != k.shape[2]:
        raise ValueError(
            f"mask: has {samples} samples of {rows} rows and {mask.kv_length} keys, but q has {q.shape[0]} of {q.shape[2]} rows and k {k.shape[2]} keys; slice or rebuild it"
        )


# --- positions --------------------------------------------------------------------------------------------------------


def mrope_tensors(types, image_grid_thw, video_grid_thw, attention_mask, document_ids) -> int:
    """The tensors of mrope_position_ids agree; the number of videos."""
    dtype_of("mm_token_type_ids", types, MASK_DTYPES)
    if types.dim() != 2:
        raise ValueError(f"mm_token_type_ids: expected (B, L), got {tuple(types.shape)}" + ("; unsqueeze(0) one sample" if types.dim() == 1 else ""))
    if types.numel() >= 2**31:
        raise ValueError(f"mm_token_type_ids: {types.numel()} tokens; at most {2**31 - 1} are taken, split the batch")
    if attention_mask is not None:
        _beside(types, "mm_token_type_ids", "attention_mask", attention_mask, _ATTENTION_DTYPES)
    if document_ids is not None:
        _beside(types, "mm_token_type_ids", "document_ids", document_ids, ID_DTYPES)
    for name, grid in (("image_grid_thw", image_grid_thw), ("video_grid_thw", video_grid_thw)):
        if grid is not None:
            dtype_of(name, grid, (*ID_DTYPES, torch.int16, torch.int8, torch.uint8))
            if grid.dim() != 2 or grid.shape[1] != 3:
                raise ValueError(f"{name}: expected (n, 3), a row of t, h, w for each, got {tuple(grid.shape)}")
    return 0 if video_grid_thw is None else video_grid_thw.shape[0]


def merge_size(value) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ValueError(f"spatial_merge_size: expected a whole number of at least 1, got {value!r}")
    return value


def token_rate(value) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"tokens_per_second: expected a number, got {type(value).__name__}")
    if not 0 <= value < 2**31:
        raise ValueError(f"tokens_per_second: expected a number of at least 0, got {value!r}")
    return value


def seconds(value, videos: int):
    """Seconds between the frames of each video: a tensor as it is, anything else as a list of numbers."""
    if isinstance(value, Tensor):
        dtype_of("second_per_grid_ts", value, (*ROW_DTYPES, *ID_DTYPES))
        if value.dim() != 1:
            raise ValueError(f"second_per_grid_ts: expected (videos,), got {tuple(value.shape)}")
        given = value.tolist() if on_host(value) else []
    else:
        given = value = list(value)
        if any(isinstance(number, bool) or not isinstance(number, (int, float)) for number in given):
            raise TypeError(f"second_per_grid_ts: expected a tensor or a list of numbers, got {value!r}")
    if len(value) != videos:
        raise ValueError(f"second_per_grid_ts: has {len(value)} entries, but video_grid_thw has {videos} rows; give one for each video")
    wrong = next((i for i, number in enumerate(given) if not 0 <= number < 2**31), None)
    if wrong is not None:
        raise ValueError(f"second_per_grid_ts: video {wrong} has {given[wrong]!r}; expected seconds of at least 0")
    return value


# --- what backends found ----------------------------------------------------------------------------------------------


def _placeholder_name(kind: int, batch: Batch | None) -> str:
    if batch is None or not batch.kind_count:
        return f"kind {kind + 1}"
    if SCHEMES[batch.scheme] == "images_first":
        return "images"
    return "placeholder_mask" if batch.tokens.dtype == torch.bool else f"placeholder id {batch.kind(kind)[0]}"


_ALLOW = "pass unused_features='allow' if the rest is meant to be unused"


def _unit(batch: Batch | None) -> str:
    return "feature rows" if batch is None or SCHEMES[batch.scheme] == "placeholders" else "images"


def explain(record: tuple[int, ...], batch: Batch | None = None, input_ids: Tensor | None = None) -> Exception:
    """The exception that says what a record means; with the batch or input_ids at hand it names the id or the sample."""
    code, sample, kind, wanted, have, total, total_have, extra = record
    name, unit = _placeholder_name(kind, batch), _unit(batch)
    if code == TOO_FEW_ROWS:
        return ValueError(
            f"image_embeds: sample {sample} has {wanted} placeholders ({name}) but only {have} {unit} are left for it; the batch has {total} "
            f"placeholders and {total_have} {unit}. Give one for each placeholder, in reading order, or check image_token_id and truncation"
        )
    if code == TOO_MANY_ROWS:
        return ValueError(f"image_embeds: {total_have} {unit} but {total} placeholders ({name}) in the batch; {_ALLOW}, or check truncation")
    if code == COUNTS_DIFFER and sample < 0:
        return ValueError(
            f"feature_counts: they add up to {wanted} rows, but image_embeds has {have}; " + (_ALLOW if wanted < have else "give the missing rows")
        )
    if code == COUNTS_DIFFER:
        named = f"has {wanted} placeholders ({name})"
        if batch is not None and SCHEMES[batch.scheme] == "expand":
            named = f"has placeholders ({name}) for images of {wanted} feature rows or more"
        return ValueError(
            f"feature_counts: sample {sample} {named} but owns {have} feature rows; the batch has {total} placeholders and {total_have} rows. "
            f"Check the sample's tokens and images" + (f", or {_ALLOW}" if wanted < have else "")
        )
    if code == IMAGE_CUT:
        return ValueError(
            f"image_sizes: in sample {sample} an image begins and does not end: it has {wanted} placeholders ({name}), and the images that begin in "
            f"it have {have} feature rows. Check truncation and the order of images; with feature_counts a cut image can be allowed"
        )
    if code == DOCUMENT_RETURNS:
        return ValueError(
            f"document_ids: in sample {sample} id {extra} returns after another document; a document is one run of tokens. Number the runs differently"
        )
    if code == TOO_LONG:
        where = "the packed row" if sample < 0 else f"sample {sample}"
        return ValueError(f"length: {where} needs {extra} rows, more than the length given; raise length, or pack fewer samples")
    if code == OUTSIDE_VOCABULARY:
        place = f"token {sample} of the flattened input_ids"
        if input_ids is not None and input_ids.dim() == 2:
            place = f"sample {sample // input_ids.shape[1]}, token {sample % input_ids.shape[1]}"
        return IndexError(
            f"input_ids: id {extra} ({place}) is outside the embedding table of {total_have} rows; if it marks an image, name it as a placeholder"
        )
    if code == TOO_MANY_INTERVALS:
        return ValueError(
            f"attend: row {sample} of the flattened rows (column {extra}) would need more than two intervals of keys: padding inside its document, a window, "
            f"an image, a prefix or a parent leave too many gaps. Remove the padding (layout='packed') or describe the mask by fewer parts"
        )
    if code in (BAD_GRID, NO_GRID, GRID_CUT, GRID_UNUSED, UNKNOWN_TYPE):
        return _explain_grids(record)
    raise AssertionError(f"unknown record {record}")


def _explain_grids(record: tuple[int, ...]) -> Exception:
    code, sample, kind, wanted, have, total, total_have, extra = record
    name, what = (("image_grid_thw", "image"), ("video_grid_thw", "video"))[kind]
    if code == BAD_GRID:
        return ValueError(
            f"{name}: row {extra} is ({wanted}, {have}, {total}); t, h and w are at least 1, and h and w multiples of spatial_merge_size ({total_have})"
        )
    if code == NO_GRID:
        return ValueError(
            f"{name}: sample {sample} has {wanted} {what} placeholders (mm_token_type_ids {kind + 1}), but the grids have {have} left for it; the batch has "
            f"{total} placeholders, and its {extra} grids need {total_have}. Give a grid for each {what}, in reading order, and check spatial_merge_size"
        )
    if code == GRID_CUT:
        return ValueError(
            f"{name}: in sample {sample} an image or frame of row {extra} has {wanted} placeholders, but its grid needs {have} beside each other; the batch has "
            f"{total} placeholders, and its grids need {total_have}. It ends early (truncation), crosses a document boundary or holds padding: keep it whole or drop it; "
            "or spatial_merge_size is another"
            + (", or the frames stand apart (Qwen3-VL, GLM-4V): give split_video_frames=True (frames_apart of a collator)" if kind else "")
        )
    if code == GRID_UNUSED:
        return ValueError(
            f"{name}: the grids need {have} placeholders, but the batch has {wanted} (mm_token_type_ids {kind + 1}); from row {extra} on none are left. "
            "Drop the grids without placeholders, or check truncation"
        )
    return ValueError(f"mm_token_type_ids: sample {sample} has type {extra} (token {wanted}); expected 0 for text, 1 for an image, 2 for a video")
