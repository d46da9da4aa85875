"""A few calls of each backend's merge on a large batch, for ncu to watch.

ncu --csv --metrics dram__throughput.avg.pct_of_peak_sustained_elapsed,gpu__time_duration.sum python -m benchmarks.profiled
"""

from __future__ import annotations

import sys

import torch

import vlm_fuse
from benchmarks import batches


def calls(backend: str, samples: int) -> None:
    """Forward from token ids, by a ready plan, from the embedding table, and the backward; bf16, 2048 wide, half image rows."""
    batch = batches.runs("", samples, 4096, 2048, torch.bfloat16).to("cuda")
    text, features = batch.text.requires_grad_(), batch.features.requires_grad_()
    given = dict(image_token_id=batch.image_token_id, backend=backend)
    rows = vlm_fuse.merge(batch.input_ids, text, features, **given).inputs_embeds
    torch.autograd.grad(rows, (text, features), torch.ones_like(rows))
    with torch.no_grad():
        plan = vlm_fuse.plan(batch.input_ids, **given)
        vlm_fuse.merge(batch.input_ids, text, features, plan=plan, backend=backend)
        vlm_fuse.merge(batch.input_ids, weight=batch.weight(), image_embeds=features, **given)


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU that torch can use: nothing to profile")
        return 0
    for backend, info in vlm_fuse.backends().items():
        if info.available and "cuda" in info.devices:
            for samples in (1, 4, 32):  # 16, 64 and 512 MiB of output
                calls(backend, samples)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
