"""Kernels launched and host reads made by one call on a GPU, counted by torch.profiler.

python -m benchmarks.launches
"""

from __future__ import annotations

import sys
from typing import Callable

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import vlm_fuse
from benchmarks import baselines, batches

#: the call itself, in the profile.
CALL = "the call that is counted"
#: how a wait of the host shows there.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def count(call: Callable) -> tuple[int, int, int]:
    """(kernels, copies and fills, waits of the host) of one call, after a first one that may compile."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        with record_function(CALL):
            call()
    return counted(found.profiler.kineto_results.events())


def counted(events) -> tuple[int, int, int]:
    """The same of a profile's events. Its end waits for the device as well, which is none of the call's waits."""
    on_gpu = [e.name() for e in events if e.device_type() == torch.autograd.DeviceType.CUDA and e.name() != CALL]
    moves = sum(name.startswith(("Memcpy", "Memset")) for name in on_gpu)
    on_host = [e for e in events if e.device_type() == torch.autograd.DeviceType.CPU]
    end = max(e.start_ns() + e.duration_ns() for e in on_host if e.name() == CALL)
    waits = sum(e.name() in WAITS and e.start_ns() < end for e in on_host)
    return len(on_gpu) - moves, moves, waits


def calls() -> dict[str, Callable]:
    """What is counted: forward, and forward with backward, ours and others'."""
    batch = batches.runs("", 2, 1024, 960, torch.bfloat16).to("cuda")
    text, features = batch.text.requires_grad_(), batch.features.requires_grad_()
    weight, grad, ids = batch.weight().requires_grad_(), torch.ones_like(batch.text), batch.input_ids
    token = batch.image_token_id
    plan = vlm_fuse.plan(ids, image_token_id=token)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, -100:] = False
    ours = {
        "merge": lambda: vlm_fuse.merge(ids, text, features, image_token_id=token).inputs_embeds,
        "merge, ready plan": lambda: vlm_fuse.merge(ids, text, features, plan=plan).inputs_embeds,
        "merge, fused embedding": lambda: vlm_fuse.merge(ids, None, features, image_token_id=token, weight=weight).inputs_embeds,
    }
    packed = dict(image_token_id=token, attention_mask=mask, layout="packed", labels=ids)
    made = {
        "merge, packed, width known, all facts read": lambda: _read(vlm_fuse.merge(ids, text, features, length=ids.numel(), **packed)),
        "merge, packed": lambda: _read(vlm_fuse.merge(ids, text, features, **packed)),
    }
    for name, call in {**ours, **{name: lambda merge=merge: merge(ids, text, features, token) for name, merge in baselines.MERGES.items()}}.items():
        inputs = (weight, features) if "fused" in name else (text, features)
        made[name] = call
        made[f"{name}, with backward"] = lambda call=call, inputs=inputs: torch.autograd.grad(call(), inputs, grad)
    return made


def _read(merged):
    for name in ("position_ids", "document_ids", "labels", "attention_mask", "cu_seqlens", "kv_lo"):
        getattr(merged, name)
    return merged.inputs_embeds


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU that torch can use: nothing to count")
        return 0
    print("| call | kernels | copies and fills | waits of the host |\n| --- | --- | --- | --- |")
    for name, call in calls().items():
        kernels, moves, waits = count(call)
        print(f"| {name} | {kernels} | {moves} | {waits} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
