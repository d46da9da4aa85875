"""Copies between devices: those that the host may read at once have ended."""

from types import SimpleNamespace

import torch

import vlm_fuse
from vlm_fuse.transfer import sent


def test_only_copies_to_a_gpu_are_not_waited_for():
    asked = []
    tensor = SimpleNamespace(to=lambda device, non_blocking: asked.append((str(device), non_blocking)))
    for device in ("cpu", "cuda"):
        for non_blocking in (True, False):
            sent(tensor, torch.device(device), non_blocking)
    assert asked == [("cpu", False), ("cpu", False), ("cuda", True), ("cuda", False)]


def test_plans_and_masks_are_sent_so(monkeypatch):
    waits = []
    to = torch.Tensor.to

    def watched(tensor, *args, non_blocking=False, **options):
        waits.append(not non_blocking)
        return to(tensor, *args, non_blocking=non_blocking, **options)

    plan = vlm_fuse.plan(torch.tensor([[1, 2]]), image_token_id=9)
    mask = plan.mask()
    monkeypatch.setattr(torch.Tensor, "to", watched)
    plan.to("cpu")
    mask.to("cpu")
    assert waits and all(waits)
