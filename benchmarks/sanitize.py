"""Every kernel once or more on small batches, for compute-sanitizer to watch; results are compared with the reference.

compute-sanitizer --tool memcheck python -m benchmarks.sanitize
"""

from __future__ import annotations

import sys

import torch

import vlm_fuse

IMAGE = 99


def batch(hidden: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """3 samples of 40 tokens, runs of placeholders, padding: ids, mask, labels, text, features, weight (64 rows)."""
    rng = torch.Generator().manual_seed(hidden)
    ids = torch.randint(0, 64, (3, 40), generator=rng)
    ids[0, 3:12], ids[1, 20:40], ids[2, 0] = IMAGE, IMAGE, IMAGE
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, 30:] = False
    rows = int((ids == IMAGE).sum())
    made = (ids, mask, ids.clone(), *(torch.randn(*shape, hidden, generator=rng).to(dtype) for shape in ((3, 40), (rows,), (64,))))
    return tuple(tensor.to(device) for tensor in made)


def outputs(tensors: tuple[torch.Tensor, ...], backend: str) -> list[torch.Tensor]:
    """Everything one batch can give: three layouts, both sources of text, replace and add, backward, facts, masks."""
    ids, mask, labels, text, features, weight = tensors
    found: list[torch.Tensor] = []
    for layout in ("keep", "padded", "packed"):
        for combine in ("replace", "add"):
            text, features = text.detach().requires_grad_(), features.detach().requires_grad_()
            merged = vlm_fuse.merge(
                ids,
                text,
                features,
                image_token_id=IMAGE,
                attention_mask=mask,
                labels=labels,
                layout=layout,
                combine=combine,
                attend=vlm_fuse.Attend(window=8, images="bidirectional_windowed"),
                backend=backend,
            )
            rows = merged.inputs_embeds
            found += [rows.detach(), *torch.autograd.grad(rows, (text, features), torch.ones_like(rows))]
        found += [
            merged.position_ids,
            merged.document_ids,
            merged.image_ids,
            merged.kind_ids,
            merged.attention_mask,
            merged.labels,
            merged.cu_seqlens,
            merged.kv_lo,
            merged.kv_hi,
            merged.mask.dense(),
            merged.mask.bits(),
            merged.mask.block_mask(BLOCK_SIZE=16).kv_indices,
        ]
        weight, features = weight.detach().requires_grad_(), features.detach().requires_grad_()
        rows = vlm_fuse.merge(
            ids, None, features, image_token_id=IMAGE, weight=weight, embed_scale=1.5, attention_mask=mask, layout=layout, backend=backend
        ).inputs_embeds
        found += [rows.detach(), *torch.autograd.grad(rows, (weight, features), torch.ones_like(rows))]
        there = torch.ones_like(weight)
        rows = vlm_fuse.merge(
            ids, None, features, image_token_id=IMAGE, weight=weight, weight_grad=there, attention_mask=mask, layout=layout, backend=backend
        ).inputs_embeds
        rows.sum().backward()
        found.append(there.detach())
    written = text.detach().clone()
    vlm_fuse.merge(ids, written, features.detach(), image_token_id=IMAGE, out=written, backend=backend)
    return [*found, written]


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backends = [
        name for name, info in vlm_fuse.backends().items() if info.available and name != "reference" and (not info.devices or device in info.devices)
    ]
    wrong = 0
    for hidden, dtype in ((64, torch.bfloat16), (33, torch.float32), (8, torch.float16)):
        tensors = batch(hidden, dtype, device)
        expected = outputs(tensors, "reference")
        for backend in backends:
            found = outputs(tensors, backend)
            same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            wrong += not same
            print(f"{backend} on {device}, D = {hidden}, {dtype}: {'equal to the reference' if same else 'DIFFERENT'}")
    if device == "cuda":
        vlm_fuse.raise_errors()
    print(f"{len(backends)} backends, {wrong} different")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
