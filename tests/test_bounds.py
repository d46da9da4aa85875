"""Nothing is read or written out of bounds: not with wrong plans, not with wrong ids, not on any backend."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vlm_fuse
from cases import BY_NAME
from checking import assert_bits, merge
from emulator import build

HERE = Path(__file__).parent
GUARD = 12345.0


@pytest.mark.own_process
def test_every_kernel_between_forbidden_pages(backend):
    """fenced.py in a process of its own: an access one byte beyond a tensor ends it."""
    if backend == "cuda" and build.missing():
        pytest.skip(build.missing())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, str(HERE / "fenced.py"), backend], capture_output=True, text=True, env=environment, timeout=300)
    last = run.stdout.strip().splitlines()[-1:] or [""]
    assert run.returncode == 0, f"at {last[0]!r}:\n{run.stderr[-3000:]}"
    assert last[0].startswith("done")


def test_the_fence_holds():
    """A test of the test: one byte beyond either side must end the process."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import ctypes, fenced, torch\n"
        "side = sys.argv[2]; inside = fenced.fenced_empty((3, 5), torch.float32, side)\n"
        "assert inside.isnan().all(); ctypes.string_at(inside.data_ptr(), 60); print('inside', flush=True)\n"
        "ctypes.string_at(inside.data_ptr() + (60 if side == 'end' else -1), 1); print('outside', flush=True)\n"
    )
    for side in ("end", "begin"):
        run = subprocess.run([sys.executable, "-c", code, str(HERE), side], capture_output=True, text=True)
        assert run.stdout.strip() == "inside" and run.returncode < 0, (side, run)


def guarded(rows: int, *shape, dtype=torch.float32, device="cpu"):
    """(buffer, the tensor inside it with guard rows around)."""
    buffer = torch.full((rows + 4, *shape), GUARD, dtype=dtype, device=device)
    return buffer, buffer[2 : rows + 2]


@pytest.mark.thinned(4)
@pytest.mark.parametrize("D", [1, 3, 8, 33])
@pytest.mark.parametrize("name", ["two_images_left_padded", "packed_layout", "expanded", "legacy_left_padding", "fused_embedding", "added"])
def test_guard_rows_around_out(name, D, backend, device):
    case = replace(BY_NAME[name], D=D)
    answer = case.answer()
    lines = len(answer.rows)
    buffer, out = guarded(lines, answer.width, D, device=device)
    merge(case.tensors(device=device), backend, out=out)
    for guard in (buffer[:2], buffer[-2:]):
        assert guard.eq(GUARD).all()
    assert not out.eq(GUARD).any()


def test_guard_rows_around_features(backend, device):
    """Rows beyond those of the tensor are never read, though they lie in the same memory."""
    ids = torch.tensor([[7, 7, 7, 7, 1]], device=device)
    buffer, features = guarded(2, 4, device=device)
    features.fill_(1)
    out = vlm_fuse.merge(ids, torch.zeros(1, 5, 4, device=device), features, image_token_id=7, validate="off", backend=backend).inputs_embeds[0]
    assert out[:2].eq(1).all() and out[2:].eq(0).all()
    listed = [features[:1], features[1:]]
    out = vlm_fuse.merge(ids, torch.zeros(1, 5, 4, device=device), listed, image_token_id=7, validate="off", backend=backend).inputs_embeds[0]
    assert out[:2].eq(1).all() and out[2:].eq(0).all()
    vlm_fuse.raise_errors()


INDICES = [0, 1, 2, 3, 1000, 2**20, 2**30, 2**31 - 1, -1, -2, -9, -10, -1000, -(2**20), -(2**30), -(2**31) + 1, -(2**31)]


@pytest.mark.parametrize("text", ["embeds", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_corrupted_source_index(text, dtype, backend, device):
    """Every index that names no row gives zeros, forward; backward it goes nowhere."""
    T = len(INDICES)
    ids = (torch.arange(T, device=device) % 9)[None]
    plan = vlm_fuse.plan(ids, image_token_id=77, backend=backend)
    plan.source_index.copy_(torch.tensor([INDICES], dtype=torch.int32))
    vlm_fuse.raise_errors()
    _, rows = guarded(T, 16, dtype=dtype, device=device)
    _, features = guarded(0, 16, dtype=dtype, device=device)
    table = rows.clone().uniform_(-1, 1)
    rows.copy_(table)
    rows.requires_grad_()
    features.requires_grad_()
    options = dict(inputs_embeds=rows[None]) if text == "embeds" else dict(inputs_embeds=None, weight=rows)
    out = vlm_fuse.merge(ids, image_embeds=features, plan=plan, backend=backend, **options).inputs_embeds[0]
    for r, k in enumerate(INDICES):
        if -T <= k < 0:
            j = -1 - k
            assert_bits(out[r], table[j if text == "embeds" else int(ids[0, j])], f"index {k}")
        else:
            assert out[r].eq(0).all(), f"index {k}"
    out.sum().backward()
    assert rows.grad.isfinite().all()
    read = sorted(-1 - k if text == "embeds" else int(ids[0, -1 - k]) for k in INDICES if -T <= k < 0)
    expected = torch.zeros(T, device=device)
    for j in read:
        expected[j] += 1
    assert torch.equal(rows.grad[:, 0].float(), expected)


@pytest.mark.parametrize("layout", ["keep", "packed"])
def test_tensors_smaller_than_the_plan_are_refused(layout, backend, device):
    """The host check that keeps a plan of another batch from being used at all."""
    ids = torch.tensor([[7, 7, 1, 2]], device=device)
    text, features = torch.zeros(1, 4, 8, device=device), torch.ones(2, 8, device=device)
    plan = vlm_fuse.plan(ids, image_token_id=7, layout=layout, backend=backend)
    with pytest.raises(ValueError):
        vlm_fuse.merge(ids, text, features[:1], plan=plan, validate="off", backend=backend)
    with pytest.raises(ValueError):
        vlm_fuse.merge(ids[:, :3], torch.zeros(1, 3, 8, device=device), features, plan=plan, validate="off", backend=backend)


@pytest.mark.parametrize("ids", [[2**62, -(2**62), 2**31, -(2**31)], [2**32, 2**32 + 1, -1, -(2**32)], [5, 6, 7, 8]], ids=["huge", "multiples_of_2_to_32", "just_outside"])
def test_ids_far_outside_the_table(ids, backend, device):
    _, weight = guarded(5, 8, device=device)
    weight.fill_(1).requires_grad_()
    ids = torch.tensor([ids], device=device)
    out = vlm_fuse.merge(ids, None, None, weight=weight, image_token_id=77, validate="off", backend=backend).inputs_embeds
    assert out.eq(0).all()
    out.sum().backward()
    assert weight.grad.eq(0).all()
    vlm_fuse.raise_errors()


def test_lengths_too_small_write_nothing_beyond(backend, device):
    for name in ("packed_layout", "left_to_right_padded", "right_to_left_padded", "expanded", "legacy_left_padding"):
        case = BY_NAME[name]
        width = case.answer().width
        for length in (0, 1, width - 1):
            given = replace(case.given, length=length)
            lines = 1 if given.layout == "packed" else len(given.tokens)
            buffer, out = guarded(lines, length, case.D, device=device)
            merged = merge(replace(case, given=given).tensors(device=device), backend, out=out, validate="off")
            for field in ("source_index", "text_index", "position_ids", "document_ids", "image_ids", "kind_ids", "attention_mask", "labels", "kv_lo", "kv_hi"):
                assert getattr(merged, field).shape == (lines, length), field
            for guard in (buffer[:2], buffer[-2:]):
                assert guard.eq(GUARD).all(), name
            assert not out.eq(GUARD).any()
    vlm_fuse.raise_errors()


@pytest.mark.parametrize("sizes, counts", [([1, 1], None), ([9, 9], None), (None, [0, 0]), (None, [9, 9]), (None, [0, 9])], ids=str)
def test_sizes_and_counts_that_lie(sizes, counts, backend, device):
    """Async: what they say about rows that are not there is never followed."""
    ids = torch.tensor([[7, 7, 1], [2, 7, 7]], device=device)
    buffer, features = guarded(4, 8, device=device)
    features.fill_(1)
    for scheme, layout in (("placeholders", "keep"), ("expand", "packed"), ("images_first", "padded")):
        if scheme == "expand" and sizes is None:
            continue
        try:
            merged = vlm_fuse.merge(
                ids, torch.zeros(2, 3, 8, device=device), features, image_token_id=7, image_sizes=sizes, feature_counts=counts, scheme=scheme, layout=layout,
                validate="async", backend=backend,
            )  # fmt: skip
        except ValueError:
            continue
        assert not merged.inputs_embeds.eq(GUARD).any()
        with pytest.raises(ValueError):
            vlm_fuse.raise_errors()
