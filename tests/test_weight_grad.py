"""weight_grad: the backward adds the embedding weight's gradient to a tensor that is there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vlm_fuse
from cases import BY_NAME
from checking import assert_bits, merge

NAMES = ("fused_embedding", "fused_embedding_scaled", "added", "packed_layout", "two_images_left_padded")


def whole_numbers(case, device):
    """Rows and gradients that fp32 and bf16 add up without rounding."""
    tensors = replace(case, text="weight", scale=None if case.scale is None else 2.0).tensors(device=device)
    with torch.no_grad():
        for leaf in tensors.leaves:
            leaf.copy_(leaf.mul(2).round().clamp(-4, 4))
    return tensors.require_grad()


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=["own", "fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in NAMES if name in BY_NAME])
def test_adds_what_the_gradient_would_be(name, dtype, backend, device):
    tensors = whole_numbers(BY_NAME[name], device)
    weight = tensors.weight
    out = merge(tensors, backend).inputs_embeds
    upstream = torch.arange(out.numel(), device=device).view(out.shape).remainder(3).to(out.dtype) - 1
    wanted, *others = torch.autograd.grad(out, tensors.leaves, upstream, allow_unused=True)
    there = torch.arange(weight.numel(), device=device).view(weight.shape).remainder(5).to(dtype or weight.dtype)
    before, version = there.clone(), there._version
    for twice in (1, 2):
        out = merge(tensors, backend, weight_grad=there).inputs_embeds
        none, *got = torch.autograd.grad(out, tensors.leaves, upstream, allow_unused=True)
        assert none is None and there._version > version
        assert_bits(there, before + twice * wanted.to(there.dtype), name)
        for a, b in zip(got, others):
            assert_bits(a, b, name)


def test_rows_of_ids_that_do_not_occur_are_not_touched(backend, device):
    weight = torch.ones(9, 4, device=device, requires_grad=True)
    there = torch.full((9, 4), float("nan"), device=device)
    there[[2, 5]] = 1
    out = vlm_fuse.merge(torch.tensor([[2, 5, 2, 7]], device=device), None, torch.zeros(1, 4, device=device), image_token_id=7, weight=weight, weight_grad=there, backend=backend)
    out.inputs_embeds.sum().backward()
    assert weight.grad is None
    assert there[2].eq(3).all() and there[5].eq(2).all()
    assert there[[0, 1, 3, 4, 6, 7, 8]].isnan().all()


def test_rounds_once(backend, device):
    """Many small numbers beside a large one: added in fp32 before bf16 sees them."""
    weight = torch.zeros(3, 8, dtype=torch.bfloat16, device=device, requires_grad=True)
    there = torch.full((3, 8), 256.0, dtype=torch.bfloat16, device=device)
    out = vlm_fuse.merge(torch.ones(1, 64, dtype=torch.long, device=device), weight=weight, weight_grad=there, backend=backend)
    out.inputs_embeds.backward(torch.full((1, 64, 8), 0.5, dtype=torch.bfloat16, device=device))
    assert there[1].eq(288).all() and there[0].eq(256).all()


def test_refusals(backend, device):
    ids = torch.ones(1, 4, dtype=torch.long, device=device)
    weight = torch.zeros(3, 8, device=device, requires_grad=True)

    def refused(message, kind=ValueError, **changes):
        with pytest.raises(kind, match=message):
            vlm_fuse.merge(ids, **{"weight": weight, "weight_grad": torch.zeros(3, 8, device=device), "backend": backend} | changes)

    refused("no weight", weight=None, inputs_embeds=torch.zeros(1, 4, 8, device=device))
    refused(r"expected \(3, 8\)", weight_grad=torch.zeros(2, 8, device=device))
    refused("weight_grad", TypeError, weight_grad=torch.zeros(3, 8, dtype=torch.int32, device=device))
    refused("contiguous", weight_grad=torch.zeros(8, 3, device=device).t())
    refused("requires no gradient", weight=weight.detach())
    refused("shares memory", weight_grad=weight.detach())
    out = vlm_fuse.merge(ids, weight=weight, weight_grad=torch.zeros(3, 8, device=device), backend=backend).inputs_embeds
    with pytest.raises(RuntimeError, match="weight_grad: the backward adds"):
        torch.autograd.grad(out.sum(), weight, create_graph=True)


def test_refused_under_compile(backend, device):
    ids, weight = torch.ones(1, 4, dtype=torch.long, device=device), torch.zeros(3, 8, device=device, requires_grad=True)

    @torch.compile(backend="eager", fullgraph=True)
    def step(weight, there):
        return vlm_fuse.merge(ids, weight=weight, weight_grad=there, backend=backend).inputs_embeds

    with pytest.raises(Exception, match="weight_grad: refused"):
        step(weight, torch.zeros(3, 8, device=device))
