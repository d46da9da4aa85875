"""Every backend against the others, and against the two formulations that merge replaces, to the last bit."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import vlm_fuse
from benchmarks import baselines

from .chat_batch import ChatBatch, embed

DTYPES = (torch.bfloat16, torch.float32)
LAYOUTS = ("keep", "padded", "packed")
CROP = 24  # hidden size and tokens a chat of what the interpreter is given


def places() -> list[tuple[str, str]]:
    """(backend, device) of every pair that runs at full speed here."""
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    found = vlm_fuse.backends().items()
    return [
        (name, device)
        for device in devices
        for name, backend in found
        if backend.available and (not backend.devices or device in backend.devices) and not interpreted(name, device)
    ]


def interpreted(name: str, device: str) -> bool:
    """Triton's kernels on CPU tensors run on its interpreter."""
    return name == "triton" and device == "cpu"


def given(batch: ChatBatch, device: str = "cpu") -> dict:
    """The arguments of merge that a batch brings."""
    return dict(
        input_ids=batch.input_ids.to(device),
        image_token_id=batch.image_token_id,
        attention_mask=batch.attention_mask.to(device),
        labels=batch.labels.to(device),
    )


def check_all(batch: ChatBatch, hidden: int, *, progress=iter) -> list[str]:
    """A line for everything that holds; raises where something does not."""
    checks = [(check_layouts, batch, hidden, dtype) for dtype in DTYPES]
    checks += [(check_fused, batch, hidden), (check_unpack, batch, hidden), (check_gradients, batch, hidden)]
    if vlm_fuse.backends()["triton"].available and not torch.cuda.is_available():
        checks.append((check_interpreter, crop(batch)))
    checks.append((check_refusal, batch, hidden))
    return [check(*arguments) for check, *arguments in progress(checks)]


def check_layouts(batch: ChatBatch, hidden: int, dtype: torch.dtype) -> str:
    weight, features = embed(batch, hidden, dtype)
    text = F.embedding(batch.input_ids, weight)
    expected = by_hand(batch, text, torch.cat(features))
    for backend, device in places():
        arguments = given(batch, device)
        on_device = dict(inputs_embeds=text.to(device), image_embeds=[rows.to(device) for rows in features])
        for layout in LAYOUTS:
            merged = vlm_fuse.merge(**arguments, **on_device, layout=layout, backend=backend)
            same(merged.inputs_embeds.cpu(), expected[layout], f"{layout} on {backend}, {device}")
    names = " = ".join(backend if device == "cpu" else f"{backend} on {device}" for backend, device in places())
    return f"{short(dtype)}: {names} = masked_scatter (Hugging Face) = boolean index (nanoVLM); keep, padded, packed"


def by_hand(batch: ChatBatch, text: Tensor, features: Tensor) -> dict[str, Tensor]:
    """The three layouts in plain PyTorch, `keep` in both of the formulations that merge replaces."""
    arguments = (batch.input_ids, text, features, batch.image_token_id)
    merged = baselines.hf_masked_scatter(*arguments)
    same(baselines.nanovlm(*arguments), merged, "masked_scatter and boolean index")
    kept = batch.attention_mask.bool()
    lengths = kept.sum(1)
    padded = merged.new_zeros(len(merged), int(lengths.max()), merged.shape[2])
    for rows, sample, mask in zip(padded, merged, kept):
        rows[: mask.sum()] = sample[mask]
    return {"keep": merged, "padded": padded, "packed": merged[kept][None]}


def check_fused(batch: ChatBatch, hidden: int) -> str:
    weight, features = embed(batch, hidden, torch.bfloat16)
    text = F.embedding(batch.input_ids, weight)
    for backend, device in places():
        arguments = dict(**given(batch, device), image_embeds=[rows.to(device) for rows in features], backend=backend, layout="packed")
        fused = vlm_fuse.merge(**arguments, weight=weight.to(device))
        same(fused.inputs_embeds, vlm_fuse.merge(**arguments, inputs_embeds=text.to(device)).inputs_embeds, f"fused lookup on {backend}")
    return "the lookup fused into the merge (weight=) gives what looking up first gives"


def check_unpack(batch: ChatBatch, hidden: int) -> str:
    weight, features = embed(batch, hidden, torch.bfloat16)
    text = F.embedding(batch.input_ids, weight)
    kept = batch.attention_mask.bool()[..., None]
    expected = baselines.hf_masked_scatter(batch.input_ids, text, torch.cat(features), batch.image_token_id) * kept
    merged = vlm_fuse.merge(**given(batch), inputs_embeds=text, image_embeds=features, layout="packed")
    same(merged.unpack(merged.inputs_embeds), expected, "unpack")
    return "packed.unpack(rows) puts every row back at its token"


def check_gradients(batch: ChatBatch, hidden: int) -> str:
    weight, features = embed(batch, hidden, torch.float32)
    text, rows = F.embedding(batch.input_ids, weight), torch.cat(features)
    towards = torch.randn(text.shape, generator=torch.Generator().manual_seed(1))
    leaves = [text.requires_grad_(), rows.requires_grad_()]
    theirs = baselines.hf_masked_scatter(batch.input_ids, text, rows, batch.image_token_id)
    expected = torch.autograd.grad(theirs, leaves, towards)
    for backend in [name for name, device in places() if device == "cpu"]:
        ours = vlm_fuse.merge(**given(batch), inputs_embeds=text, image_embeds=rows, backend=backend).inputs_embeds
        for gradient, theirs, name in zip(torch.autograd.grad(ours, leaves, towards), expected, ("text", "images")):
            same(gradient, theirs, f"gradient of the {name} on {backend}")
    return "gradients of text and images equal those of masked_scatter"


def crop(batch: ChatBatch) -> ChatBatch:
    """CROP tokens of every chat, from just before its first one on, and the patches of the placeholders among them."""
    last = batch.input_ids.shape[1] - CROP
    starts = [min(max(int(mask.argmax()) - 4, 0), last) for mask in batch.attention_mask]
    input_ids, attention_mask, labels = (
        torch.stack([row[start : start + CROP] for row, start in zip(rows, starts)])
        for rows in (batch.input_ids, batch.attention_mask, batch.labels)
    )
    of_chat = (batch.input_ids == batch.image_token_id).sum(1).tolist()
    in_crop = (input_ids == batch.image_token_id).sum(1).tolist()
    patches = [rows[:n] for rows, n in zip(torch.cat(batch.patches).split(of_chat), in_crop)]
    return replace(batch, input_ids=input_ids, attention_mask=attention_mask, labels=labels, patches=patches)


def check_interpreter(batch: ChatBatch) -> str:
    weight, features = embed(batch, CROP, torch.bfloat16)
    arguments = dict(**given(batch), weight=weight, image_embeds=torch.cat(features))
    for layout in LAYOUTS:
        ours = vlm_fuse.merge(**arguments, layout=layout, backend="triton").inputs_embeds
        same(ours, vlm_fuse.merge(**arguments, layout=layout, backend="reference").inputs_embeds, f"{layout} on triton")
    samples, length = batch.input_ids.shape
    return f"triton on its interpreter (no GPU here; a crop of {samples} x {length} x {CROP}, not timed) = reference"


def check_refusal(batch: ChatBatch, hidden: int) -> str:
    weight, features = embed(batch, hidden, torch.bfloat16)
    try:
        vlm_fuse.merge(**given(batch), weight=weight, image_embeds=features[:3] + features[4:])
    except ValueError as error:
        return f"a picture too few is refused before anything is written:\n      ValueError: {error}"
    raise AssertionError("a batch with a picture too few was merged")


def same(ours: Tensor, theirs: Tensor, what: str) -> None:
    if not torch.equal(ours, theirs):
        raise AssertionError(f"{what}: differs")


def short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
