"""What one call costs a GPU: kernels launched, nothing else queued, nothing read back. Counted by the emulator."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import vlm_fuse
from emulator import build

pytestmark = pytest.mark.skipif("cpu" not in vlm_fuse.backends()["cuda"].devices, reason="CUDA kernels are not emulated here")

#: what costs no work on a device: memory and views.
FREE = {
    "aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::detach", "detach", "aten::view", "aten::resize_",
    "aten::lift_fresh", "aten::as_strided", "aten::contiguous", "aten::unbind", "aten::select", "aten::slice",
}  # fmt: skip

ids = torch.tensor([[1, 9, 9, 2, 3], [4, 9, 5, 6, 0]])
text, features, weight = torch.randn(2, 5, 8), torch.randn(3, 8), torch.randn(10, 8)
PACKED = dict(layout="packed", length=9, attention_mask=ids != 0)


def launches() -> int:
    library = ctypes.CDLL(str(build.module()))
    library.emulator_launches.restype = ctypes.c_ulong
    return library.emulator_launches()


def cost(call) -> tuple[int, set[str]]:
    """(kernels of ours, operations of torch that queue work) of one call after a first one."""
    call()
    before = launches()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=False) as found:
        call()
    ours = launches() - before
    names = {event.name for event in found.events() if event.name.startswith("aten::")}
    return ours, names - FREE


def facts(out):
    for name in ("source_index", "position_ids", "document_ids", "labels", "attention_mask", "cu_seqlens", "kv_lo", "kv_hi"):
        getattr(out, name)
    return out.inputs_embeds


def merge(**changes):
    given = dict(image_token_id=9, labels=ids, validate="async", backend="cuda") | changes
    rows = given.pop("inputs_embeds", None if "weight" in given else text)
    return vlm_fuse.merge(ids, rows, given.pop("image_embeds", features), **given)


@pytest.mark.no_poison
@pytest.mark.parametrize(
    "options",
    [{}, PACKED, dict(combine="add"), dict(PACKED, combine="add"), dict(weight=weight, embed_scale=2.0), dict(PACKED, weight=weight)],
    ids=["keep", "packed", "added", "packed_added", "fused", "packed_fused"],
)
def test_rows_and_facts_in_one_launch(options):
    assert cost(lambda: facts(merge(**options))) == (1, set())


@pytest.mark.no_poison
def test_in_place_in_one_launch():
    here = text.clone()
    assert cost(lambda: merge(inputs_embeds=here, out=here)) == (1, set())


@pytest.mark.no_poison
def test_rows_of_a_ready_plan_in_one_launch():
    plan = vlm_fuse.plan(ids, image_token_id=9, labels=ids, backend="cuda")
    assert cost(lambda: vlm_fuse.merge(ids, text, features, plan=plan, validate="async")) == (1, set())
    hidden = torch.randn(2, 5, 8)
    assert cost(lambda: vlm_fuse.add_features(hidden, features, plan)) == (1, set())


@pytest.mark.no_poison
@pytest.mark.parametrize("options", [{}, PACKED, dict(combine="add")], ids=["keep", "packed", "added"])
def test_backward_in_one_launch(options):
    leaves = text.clone().requires_grad_(), features.clone().requires_grad_()
    upstream = torch.ones_like(merge(**options).inputs_embeds)

    def step():
        torch.autograd.grad(merge(inputs_embeds=leaves[0], image_embeds=leaves[1], **options).inputs_embeds, leaves, upstream)

    assert cost(step) == (2, set())  # the forward's and the backward's


@pytest.mark.no_poison
def test_weight_gradient_is_a_sort_and_two_launches():
    leaf = weight.clone().requires_grad_()
    upstream = torch.ones(2, 5, 8)
    kernels, others = cost(lambda: torch.autograd.grad(merge(weight=leaf).inputs_embeds, leaf, upstream))
    assert kernels == 3 and "aten::sort" in others
    assert not others & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::zeros", "aten::fill_", "aten::zero_"}


def test_two_launches_without_clusters():
    """Before sm_90 the first launch counts. In a process of its own: the device is asked once."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; import test_cuda_launches as t\n"
        "assert t.cost(lambda: t.facts(t.merge(**t.PACKED)))[0] == 2\n"
    )
    here = Path(__file__).parent
    environment = os.environ | {"VLM_FUSE_EMULATED_CAPABILITY": "8"}
    setup = "import sys; sys.path[:0] = sys.argv[1:]; from emulator import build; build.install()\n"
    run = subprocess.run([sys.executable, "-c", setup + code, str(here), str(here.parent)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
