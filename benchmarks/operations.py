"""The operations that are measured: for each, a plain copy of the same bytes, vlm_fuse, and what others do.

An operation states what its base copies, so that a ratio says how far the contestant is from the memory's own speed.
Every contestant's result is compared with an expected one, to the bit, before anything is timed.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import vlm_fuse
from benchmarks import baselines
from benchmarks.batches import Batch, random_rows
from benchmarks.timing import Contestant
from vlm_fuse import backend as vlm_backend

OURS = "vlm_fuse"
PLANNED = "vlm_fuse, ready plan"
COMPILED = "torch.compile"


class Operation(NamedTuple):
    """One thing to measure on one batch."""

    name: str
    base: str  # name of the contestant that only copies
    base_bytes: int  # bytes the base reads and writes
    contestants: list[Contestant]
    expected: Callable[[], tuple[Tensor, ...]]  # what every contestant but the plain copies must return
    plain: tuple[str, ...]  # contestants that do less than the operation: copies, and the bare lookup
    loose: tuple[str, ...] = ()  # contestants that sum in another order or precision: compared to a part in a hundred
    tensors: Callable[[Any], tuple[Tensor, ...]] | None = None  # of a result that is neither a tensor nor a tuple of them


def described(operation: Operation, batch: Batch) -> dict[str, Any]:
    """What a result says of the operation and the batch it was measured on."""
    return {
        "operation": operation.name,
        "batch": batch.name,
        "tokens": batch.tokens,
        "shares": batch.shares,
        "base": operation.base,
        "base_bytes": operation.base_bytes,
    }


class WrongResult(Exception):
    """A contestant does not compute what the others do: nothing of its operation is reported."""


def verify(operation: Operation) -> None:
    """Run every contestant once and compare. Raises WrongResult."""
    expected = operation.expected()
    for contestant in operation.contestants:
        if contestant.name in operation.plain:
            continue
        if contestant.prepare is not None:
            contestant.prepare()
        found = contestant.run()
        if operation.tensors is not None:
            found = operation.tensors(found)
        found = found if isinstance(found, tuple) else (found,)
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            same = a.dtype == b.dtype and a.shape == b.shape
            if contestant.name in operation.loose:
                same = same and bool((a - b).abs().max() <= 0.01 * b.abs().max())
            elif not (same and torch.equal(a, b)):
                same = False
            if not same:
                raise WrongResult(
                    f"{operation.name}: {contestant.name} returns another result {index}: "
                    f"{a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}"
                )


def _merge(batch: Batch, text: Tensor | None = None, features: Tensor | None = None, **options) -> Tensor:
    text = batch.text if text is None else text
    features = batch.features if features is None else features
    return vlm_fuse.merge(batch.input_ids, text, features, image_token_id=batch.image_token_id, **options).inputs_embeds


def _plan(batch: Batch, **options):
    return vlm_fuse.plan(batch.input_ids, image_token_id=batch.image_token_id, image_sizes=list(batch.image_sizes) or None, **options)


def _merged(batch: Batch, text: Tensor | None = None, features: Tensor | None = None) -> Tensor:
    """The expected rows, by boolean index."""
    return baselines.nanovlm(
        batch.input_ids, batch.text if text is None else text, batch.features if features is None else features, batch.image_token_id
    )


def _others(batch: Batch, names: tuple[str, ...]) -> dict[str, Callable]:
    """Merges of other projects: name -> function(text, features)."""
    chosen = {name: baselines.compiled() if name == COMPILED else baselines.MERGES[name] for name in names}
    return {name: lambda text, features, merge=merge: merge(batch.input_ids, text, features, batch.image_token_id) for name, merge in chosen.items()}


ALL = tuple(name for name in baselines.MERGES if name != "hf expanded")


def forward_into(batch: Batch) -> Operation:
    """Output preallocated. Others cannot write there: only the copy beside us."""
    out = torch.empty_like(batch.text)
    plan = _plan(batch)
    poison = lambda: out.view(-1)[:1].fill_(float("nan"))
    return Operation(
        "forward, out given",
        "copy_",
        2 * batch.out_bytes,
        [
            Contestant("copy_", lambda: out.copy_(batch.text)),
            Contestant(OURS, lambda: _merge(batch, out=out), poison),
            Contestant(PLANNED, lambda: _merge(batch, out=out, plan=plan), poison),
        ],
        lambda: (_merged(batch),),
        ("copy_",),
    )


def forward(batch: Batch, names: tuple[str, ...] = ALL) -> Operation:
    """Output allocated by the call."""
    plan = _plan(batch)
    contestants = [
        Contestant("clone", batch.text.clone),
        Contestant(OURS, lambda: _merge(batch)),
        Contestant(PLANNED, lambda: _merge(batch, plan=plan)),
    ]
    for name, merge in _others(batch, names).items():
        contestants.append(Contestant(name, lambda merge=merge: merge(batch.text, batch.features)))
    return Operation("forward", "clone", 2 * batch.out_bytes, contestants, lambda: (_merged(batch),), ("clone",))


def _gradients_expected(batch: Batch, grad: Tensor) -> tuple[Tensor, Tensor]:
    image = batch.input_ids == batch.image_token_id
    return grad.masked_fill(image.unsqueeze(-1), 0), grad[image]


def backward_into(batch: Batch, text_frozen: bool = False) -> Operation:
    """Gradients written into given memory: the row op's backward alone."""
    grad = random_rows(*batch.text.shape, dtype=batch.text.dtype, device=batch.text.device, seed=2)
    copied, grad_text, grad_features = torch.empty_like(grad), torch.empty_like(grad), torch.empty_like(batch.features)
    source_index = _plan(batch).source_index
    kernels = vlm_backend.choose(vlm_backend.name_from("auto"), batch.text.device.type)
    given = (grad, source_index, None, None, None, [0], False)

    def ours():
        kernels.rows_backward(*given, None if text_frozen else grad_text, None, [grad_features])
        return (grad_features,) if text_frozen else (grad_text, grad_features)

    expected = lambda: _gradients_expected(batch, grad)[1 if text_frozen else 0 :]
    name = "backward, text frozen, gradients given" if text_frozen else "backward, gradients given"
    return Operation(
        name, "copy_", 2 * batch.out_bytes, [Contestant("copy_", lambda: copied.copy_(grad)), Contestant(OURS, ours)], expected, ("copy_",)
    )


def backward(batch: Batch, names: tuple[str, ...] = ALL) -> Operation:
    """autograd.grad through a graph that is kept; gradients allocated by the call."""
    grad = random_rows(*batch.text.shape, dtype=batch.text.dtype, device=batch.text.device, seed=2)
    text, features = batch.text.detach().requires_grad_(), batch.features.detach().requires_grad_()
    merges = {OURS: lambda text, features: _merge(batch, text, features), **_others(batch, names)}
    contestants = [Contestant("clone", grad.clone)]
    for name, merge in merges.items():
        out = merge(text, features)
        contestants.append(Contestant(name, lambda out=out: torch.autograd.grad(out, (text, features), grad, retain_graph=True)))
    return Operation("backward", "clone", 2 * batch.out_bytes, contestants, lambda: _gradients_expected(batch, grad), ("clone",))


def forward_backward(batch: Batch, names: tuple[str, ...] = ALL) -> Operation:
    """Forward and gradients of text and features; the base is two clones."""
    grad = random_rows(*batch.text.shape, dtype=batch.text.dtype, device=batch.text.device, seed=2)
    text, features = batch.text.detach().requires_grad_(), batch.features.detach().requires_grad_()
    plan = _plan(batch)
    merges = {
        OURS: lambda text, features: _merge(batch, text, features),
        PLANNED: lambda text, features: _merge(batch, text, features, plan=plan),
        **_others(batch, names),
    }

    def both(merge):
        out = merge(text, features)
        return (out.detach(), *torch.autograd.grad(out, (text, features), grad))

    contestants = [Contestant("two clones", lambda: (batch.text.clone(), grad.clone()))]
    contestants += [Contestant(name, lambda merge=merge: both(merge)) for name, merge in merges.items()]
    return Operation(
        "forward + backward",
        "two clones",
        4 * batch.out_bytes,
        contestants,
        lambda: (_merged(batch), *_gradients_expected(batch, grad)),
        ("two clones",),
    )


def in_place(batch: Batch) -> Operation:
    """Written into the embeddings: the base copies the image rows' bytes."""
    copied = torch.empty_like(batch.features)
    plan = _plan(batch)
    texts = {name: batch.text.clone() for name in (OURS, PLANNED, *baselines.IN_PLACE)}
    contestants = [
        Contestant("copy_ of image rows", lambda: copied.copy_(batch.features)),
        Contestant(OURS, lambda: _merge(batch, texts[OURS], out=texts[OURS])),
        Contestant(PLANNED, lambda: _merge(batch, texts[PLANNED], out=texts[PLANNED], plan=plan)),
    ]
    for name, merge in baselines.IN_PLACE.items():
        contestants.append(Contestant(name, lambda name=name, merge=merge: merge(batch.input_ids, texts[name], batch.features, batch.image_token_id)))
    return Operation(
        "in place",
        "copy_ of image rows",
        2 * batch.features.numel() * batch.features.element_size(),
        contestants,
        lambda: (_merged(batch),),
        ("copy_ of image rows",),
    )


def _embedded(batch: Batch, weight: Tensor) -> Tensor:
    return F.embedding(baselines.text_ids(batch.input_ids, batch.image_token_id, weight.shape[0]), weight)


def fused_into(batch: Batch) -> Operation:
    """Text looked up in the table by the merge itself, output preallocated."""
    weight = batch.weight()
    out = torch.empty_like(batch.text)
    plan = _plan(batch)
    poison = lambda: out.view(-1)[:1].fill_(float("nan"))
    call = lambda **more: (
        vlm_fuse.merge(batch.input_ids, None, batch.features, image_token_id=batch.image_token_id, weight=weight, out=out, **more).inputs_embeds
    )
    return Operation(
        "fused embedding, out given",
        "copy_",
        2 * batch.out_bytes,
        [Contestant("copy_", lambda: out.copy_(batch.text)), Contestant(OURS, call, poison), Contestant(PLANNED, lambda: call(plan=plan), poison)],
        lambda: (_merged(batch, _embedded(batch, weight)),),
        ("copy_",),
    )


def fused(batch: Batch, names: tuple[str, ...] = ("hf", "hf checked", "nanovlm")) -> Operation:
    """Lookup and merge: ours in one pass, the others after F.embedding."""
    weight = batch.weight()
    ours = lambda **more: (
        vlm_fuse.merge(batch.input_ids, None, batch.features, image_token_id=batch.image_token_id, weight=weight, **more).inputs_embeds
    )
    plan = _plan(batch)
    contestants = [
        Contestant("clone", batch.text.clone),
        Contestant("F.embedding alone", lambda: _embedded(batch, weight)),
        Contestant(OURS, ours),
        Contestant(PLANNED, lambda: ours(plan=plan)),
    ]
    for name in names:
        merge = baselines.MERGES[name]
        contestants.append(
            Contestant(
                f"F.embedding, {name}", lambda merge=merge: baselines.embed_then(merge, batch.input_ids, weight, batch.features, batch.image_token_id)
            )
        )
    contestants += _fused_lookup(batch, weight)
    return Operation(
        "fused embedding",
        "clone",
        2 * batch.out_bytes,
        contestants,
        lambda: (_merged(batch, _embedded(batch, weight)),),
        ("clone", "F.embedding alone"),
    )


def _fused_lookup(batch: Batch, weight: Tensor) -> list[Contestant]:
    """A LightLLM-like kernel, on a GPU with Triton."""
    if not batch.text.is_cuda:
        return []
    from benchmarks import fused_lookup

    ids, *tables = fused_lookup.real_tokens(batch.input_ids, batch.image_token_id, list(batch.image_sizes), weight.shape[0])
    return [Contestant("LightLLM-like", lambda: fused_lookup.fused_lookup(ids, weight, batch.features, *tables))]


def fused_gradient(batch: Batch, names: tuple[str, ...] = ("hf", "nanovlm")) -> Operation:
    """Gradients of the table (dense) and of the features through a graph that is kept; the base copies the output's
    gradient and fills one table with zeros."""
    grad = random_rows(*batch.text.shape, dtype=batch.text.dtype, device=batch.text.device, seed=2)
    weight, features = batch.weight().requires_grad_(), batch.features.detach().requires_grad_()
    ours = vlm_fuse.merge(batch.input_ids, None, features, image_token_id=batch.image_token_id, weight=weight).inputs_embeds
    outs = {OURS: ours}
    for name in names:
        outs[f"F.embedding, {name}"] = baselines.embed_then(baselines.MERGES[name], batch.input_ids, weight, features, batch.image_token_id)
    contestants = [
        Contestant("clone and zeros", lambda: (grad.clone(), torch.zeros_like(weight, requires_grad=False))),
        Contestant(
            "F.embedding backward alone",
            lambda: torch.ops.aten.embedding_dense_backward(grad, batch.input_ids.clamp(max=weight.shape[0] - 1), weight.shape[0], -1, False),
        ),
    ]
    contestants += [
        Contestant(name, lambda out=out: torch.autograd.grad(out, (weight, features), grad, retain_graph=True)) for name, out in outs.items()
    ]
    return Operation(
        "fused embedding, backward",
        "clone and zeros",
        2 * batch.out_bytes + weight.numel() * weight.element_size(),
        contestants,
        lambda: _table_gradients(batch, grad, weight),
        ("clone and zeros", "F.embedding backward alone"),
        tuple(name for name in outs if name != OURS),
    )


def _table_gradients(batch: Batch, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The table's gradient summed in row order in fp32, rounded once. On the CPU: on a GPU the order is left to chance."""
    image = batch.input_ids == batch.image_token_id
    total = torch.zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
    total.index_add_(0, batch.input_ids[~image].cpu(), grad[~image].cpu().to(total.dtype))
    return total.to(weight.dtype).to(weight.device), grad[image]


def packed(batch: Batch, names: tuple[str, ...] = ("hf checked", "nanovlm")) -> Operation:
    """Padding removed: rows, position_ids and cu_seqlens; the base clones the rows that stay."""
    assert batch.attention_mask is not None and batch.document_ids is None
    mask = batch.attention_mask
    kept = batch.text[mask]
    plan = _plan(batch, attention_mask=mask, layout="packed")

    def ours(**more):
        merged = vlm_fuse.merge(
            batch.input_ids, batch.text, batch.features, image_token_id=batch.image_token_id, **(more or dict(attention_mask=mask, layout="packed"))
        )
        return merged.inputs_embeds, merged.position_ids, merged.cu_seqlens

    contestants = [
        Contestant("clone of kept rows", kept.clone),
        Contestant(OURS, ours),
        Contestant(PLANNED, lambda: ours(plan=plan)),
    ]
    for name in names:
        merge = baselines.MERGES[name]
        contestants.append(
            Contestant(
                f"{name}, boolean index",
                lambda merge=merge: baselines.remove_padding(merge, batch.input_ids, batch.text, batch.features, batch.image_token_id, mask),
            )
        )
    expected = lambda: baselines.remove_padding(baselines.nanovlm, batch.input_ids, batch.text, batch.features, batch.image_token_id, mask)
    return Operation("packed", "clone of kept rows", 2 * kept.numel() * kept.element_size(), contestants, expected, ("clone of kept rows",))


def facts(batch: Batch) -> Operation:
    """What reading the plan's fields adds to the rows: positions, boundaries, labels and the mask's intervals."""
    ids, given = batch.document_ids, dict(document_ids=batch.document_ids, labels=batch.labels)

    def ours():
        merged = vlm_fuse.merge(batch.input_ids, batch.text, batch.features, image_token_id=batch.image_token_id, **given)
        return merged.inputs_embeds, merged.position_ids, merged.document_ids, merged.labels, merged.cu_seqlens, merged.kv_lo, merged.kv_hi

    def expected():
        starts = torch.cat([ids.new_ones(1, dtype=torch.bool), ids[0, 1:] != ids[0, :-1]])
        first = torch.nonzero(starts).squeeze(1)
        lengths = torch.diff(first, append=first.new_tensor([ids.numel()]))
        lo = first.repeat_interleave(lengths)
        index = torch.arange(ids.numel(), device=ids.device)
        labels = batch.labels.clone()
        labels[0, first] = -100
        bounds = torch.cat([first, first.new_tensor([ids.numel()])]).int()
        return (_merged(batch), (index - lo).unsqueeze(0), ids, labels, bounds, lo.int().unsqueeze(0), (index + 1).int().unsqueeze(0))

    return Operation(
        "rows and facts",
        "clone",
        2 * batch.out_bytes,
        [
            Contestant("clone", batch.text.clone),
            Contestant("vlm_fuse, rows alone", lambda: _merge(batch, **given)),
            Contestant(OURS, ours),
        ],
        expected,
        ("clone", "vlm_fuse, rows alone"),
    )


def converted(batch: Batch, text_dtype: torch.dtype, features_dtype: torch.dtype, out_dtype: torch.dtype) -> Operation:
    """dtypes changed on the way, output preallocated; the base copies bytes of the output's dtype."""
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    text, features = batch.text.to(text_dtype), batch.features.to(features_dtype)
    plain, out = batch.text.to(out_dtype), torch.empty(batch.text.shape, dtype=out_dtype, device=batch.text.device)
    poison = lambda: out.view(-1)[:1].fill_(float("nan"))
    return Operation(
        f"text {short[text_dtype]}, image {short[features_dtype]} to {short[out_dtype]}, out given",
        "copy_",
        2 * out.numel() * out.element_size(),
        [Contestant("copy_", lambda: out.copy_(plain)), Contestant(OURS, lambda: _merge(batch, text, features, out=out), poison)],
        lambda: (_merged(batch, text.to(out_dtype), features.to(out_dtype)),),
        ("copy_",),
    )


def images_first(batch: Batch) -> Operation:
    """Legacy concatenation. torch.cat leaves the padding between image and text; ours moves it to the left edge."""
    count = batch.input_ids.shape[0]
    images = batch.features.view(count, -1, batch.features.shape[-1])

    def ours():
        merged = vlm_fuse.merge(
            batch.input_ids,
            batch.text,
            images,
            scheme="images_first",
            layout="padded",
            attention_mask=batch.attention_mask,
            padding_side="left",
            length=batch.input_ids.shape[1] + images.shape[1],
        )
        return merged.inputs_embeds, merged.attention_mask

    concat = lambda: baselines.images_first_concat(batch.text, images, batch.attention_mask)
    rows = concat()[0]
    return Operation(
        "images first",
        "clone",
        2 * rows.numel() * rows.element_size(),
        [Contestant("clone", rows.clone), Contestant("torch.cat, padding between", concat), Contestant(OURS, ours)],
        lambda: _images_first_by_sample(batch, images),
        ("clone", "torch.cat, padding between"),
    )


def _images_first_by_sample(batch: Batch, images: Tensor) -> tuple[Tensor, Tensor]:
    width = batch.input_ids.shape[1] + images.shape[1]
    rows = batch.text.new_zeros(len(images), width, batch.text.shape[-1])
    mask = torch.zeros(len(images), width, dtype=torch.bool, device=batch.text.device)
    for b, image in enumerate(images):
        sample = torch.cat([image, batch.text[b][batch.attention_mask[b]]])
        rows[b, width - len(sample) :], mask[b, width - len(sample) :] = sample, True
    return rows, mask


def contestant_of(operation: Operation, name: str) -> Any:
    """What a contestant runs, for measuring its memory."""
    return next(c.run for c in operation.contestants if c.name == name)
