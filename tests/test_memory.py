"""Memory of what the C++ kernels make: reused, given back, owned as long as needed, never read before it is written."""

import mmap
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import vlm_fuse
from vlm_fuse import backend

native = backend.choose("cpu", "cpu") if vlm_fuse.backends()["cpu"].available else None
pytestmark = pytest.mark.skipif(native is None, reason="the C++ kernels are not compiled")


def _system_keeps() -> bool:
    """Linux, and a kernel that knows MADV_FREE: else blocks are given back at once."""
    try:
        with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
            page.madvise(mmap.MADV_FREE)
        return sys.platform.startswith("linux")
    except (AttributeError, OSError):
        return False


linux = pytest.mark.skipif(not _system_keeps(), reason="no MADV_FREE: blocks are not kept")

IMAGE = 7
MIB = 1 << 20


def batch(samples=1, length=2048, dim=512, seed=0):
    """4 MiB of float32 rows a sample, a quarter of them image."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, IMAGE, (samples, length), generator=rng)
    ids[:, : length // 4] = IMAGE
    return ids, torch.randn(samples, length, dim, generator=rng), torch.randn(int((ids == IMAGE).sum()), dim, generator=rng)


def merge(ids, text, rows, **options):
    return vlm_fuse.merge(ids, text, rows, image_token_id=IMAGE, backend="cpu", **options)


def expected(ids, text, rows):
    out = text.clone()
    out[ids == IMAGE] = rows
    return out


@linux
def test_a_large_output_is_kept_for_the_next_call():
    given = batch()
    made = merge(*given).inputs_embeds
    address, kept = made.data_ptr(), native.memory()[2]
    del made
    assert native.memory()[2] >= kept + 4 * MIB
    again = merge(*given).inputs_embeds
    assert again.data_ptr() == address
    assert torch.equal(again, expected(*given))


@linux
def test_a_block_serves_no_output_of_less_than_half_its_size():
    large, small = merge(*batch(samples=4)).inputs_embeds, batch()
    address, end = large.data_ptr(), large.data_ptr() + 16 * MIB
    del large
    made = merge(*small).inputs_embeds
    assert not address <= made.data_ptr() < end


@linux
def test_rows_of_a_kept_block_are_all_written():
    """A block full of NaN serves an output with padding rows, a text gradient and image gradients with rows that none ask for."""
    ids, text, rows = batch()
    poison = merge(ids, torch.full_like(text, torch.nan), torch.full_like(rows, torch.nan)).inputs_embeds
    assert poison.isnan().all()
    address = poison.data_ptr()
    del poison
    mask = torch.ones_like(ids)
    mask[:, -600:] = 0
    made = merge(ids, text, rows, attention_mask=mask, layout="packed", length=2048)
    assert made.inputs_embeds.data_ptr() == address
    assert torch.equal(made.inputs_embeds[0, :1448], expected(ids, text, rows)[0, :1448])
    assert not made.inputs_embeds[0, 1448:].any()

    more = torch.cat([rows, rows])
    leaves = [text.clone().requires_grad_(), more.clone().requires_grad_()]
    out = merge(ids, *leaves, unused_features="allow").inputs_embeds
    for _ in range(3):
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
        assert torch.equal(grads[0][..., 0], (ids != IMAGE).float())
        assert torch.equal(grads[1][:, 0], (torch.arange(len(more)) < len(rows)).float())
        for grad in grads:
            grad.fill_(torch.nan)
        del grad, grads


SETTING = """
import torch, vlm_fuse
from vlm_fuse.backend import choose
ids = torch.zeros(1, 4096, dtype=torch.long)
for size in (1024, 2048, 512, 4096):
    made = vlm_fuse.merge(ids, torch.zeros(1, 4096, size), image_token_id=7).inputs_embeds
    assert not made.any()
    del made
print(choose("cpu", "cpu").memory()[2] >> 20)
"""


@linux
@pytest.mark.parametrize("variables, kept", [({"VLM_FUSE_KEEP_MIB": "0"}, 0), ({"VLM_FUSE_KEEP_MIB": "90"}, 80), ({"VLM_FUSE_HUGE_PAGES": "0"}, 112)])
def test_settings(variables, kept):
    """Outputs of 16, 32, 8 (in the block of 16) and 64 MiB are given back in this order: where all is too much, 32 goes first."""
    run = subprocess.run([sys.executable, "-c", SETTING], env=os.environ | variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == kept


def test_nothing_is_held_after_the_results_are_gone():
    ids, text, rows = batch(length=64, dim=16)
    labels, before = ids.clone(), native.memory()[0]
    for _ in range(3):
        leaves = [text.clone().requires_grad_(), rows.clone().requires_grad_()]
        made = merge(ids, *leaves, labels=labels, layout="packed")
        made.inputs_embeds.sum().backward()
        with pytest.raises(ValueError, match="placeholders"):
            merge(ids, text, rows[1:], labels=labels)
        assert native.memory()[0] > before
        del made, leaves
    assert native.memory()[0] == before


def test_one_fact_keeps_the_memory_that_all_share():
    ids, text, rows = batch(length=64, dim=16)
    positions = merge(ids, text, rows, labels=ids).position_ids
    others = [merge(ids, text, rows, labels=ids * 0 - 1).labels for _ in range(20)]
    assert torch.equal(positions, torch.arange(64)[None])
    assert all((other[ids != IMAGE] == -1).all() for other in others)


def test_the_peak_counts_what_was_alive():
    given = batch()
    native.reset_peak()
    before = native.memory()[0]
    first = merge(*given).inputs_embeds
    del first
    second = merge(*given).inputs_embeds
    held, peak, _ = native.memory()
    assert 4 * MIB <= held - before < 5 * MIB
    assert held - before <= peak - before < 5 * MIB
    del second


def test_results_behave_as_other_tensors():
    ids, text, rows = batch()
    made = merge(ids, text, rows, labels=ids)
    for tensor in (made.inputs_embeds, made.position_ids, made.plan.source_index):
        copy = tensor.clone()
        assert torch.equal(pickle.loads(pickle.dumps(tensor)), copy)
        assert torch.equal(torch.from_numpy(tensor.numpy()), copy)
        assert torch.equal(tensor.detach().share_memory_(), copy)
        assert tensor.is_contiguous() and tensor.data_ptr() % 64 == 0
        tensor.add_(1)
        assert torch.equal(tensor, copy + 1)


def test_many_threads_share_the_blocks():
    """Outputs of four sizes live and die on eight threads, some of them on another than the one that made them."""
    batches = [batch(samples, seed=samples) for samples in (1, 2, 3, 4)]
    wanted = [expected(*given) for given in batches]
    handed, lock = [], threading.Lock()

    def work(worker):
        for step in range(6):
            which = (worker + step) % len(batches)
            made = merge(*batches[which]).inputs_embeds
            with lock:
                handed.append(made)
                other = handed.pop(0) if len(handed) > 4 else None
            assert torch.equal(made, wanted[which])
            del other
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert any(torch.equal(made, out) for made in handed for out in wanted)


def test_sizes_beyond_any_memory_are_refused():
    """Expanded tensors have sizes that nobody can hold."""
    ids = torch.zeros(1, 1 << 20, dtype=torch.long)
    with pytest.raises(MemoryError, match="no memory for a result of 1152921504606846976 bytes|larger than any memory"):
        merge(ids, torch.zeros(1).expand(1, 1 << 20, 1 << 38), None)
    with pytest.raises(MemoryError, match="no memory for a result of 1125899906842624 bytes"):
        merge(ids, torch.zeros(1).expand(1, 1 << 20, 1 << 28), None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_uses_blocks_of_its_own():
    code = """
import os, torch, vlm_fuse
torch.set_num_threads(1)
ids, text = torch.zeros(1, 4096, dtype=torch.long), torch.ones(1, 4096, 512)
kept = vlm_fuse.merge(ids, text, image_token_id=7).inputs_embeds
del kept
child = os.fork()
made = vlm_fuse.merge(ids, text * (2 if child else 3), image_token_id=7).inputs_embeds
assert (made == (2 if child else 3)).all()
if child:
    assert os.waitpid(child, 0)[1] == 0 and (made == 2).all()
    print("both")
else:
    os._exit(0)
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout == "both\n", run.stderr
