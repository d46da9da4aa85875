"""Two runs give the same bits: forward, backward, with any number of threads, from several threads at once."""

import threading
from dataclasses import replace

import pytest
import torch

import vlm_fuse
from cases import BY_NAME
from checking import assert_bits, merge

NAMES = ["three_kinds_mixed_forms", "packed_layout", "one_token_many_times", "fused_embedding_scaled", "added_expanded_weight_padded", "legacy_counts"]


def run(case, backend, device, seed=0):
    tensors = case.tensors(seed, device).require_grad()
    merged = merge(tensors, backend)
    out = merged.inputs_embeds
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype).to(device)
    out.backward(grad)
    return [out.detach(), merged.position_ids, merged.kv_lo, merged.kv_hi, *(leaf.grad for leaf in tensors.leaves)]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_two_runs(name, dtype, backend, device):
    case = replace(BY_NAME[name], dtype=dtype)
    for a, b in zip(run(case, backend, device), run(case, backend, device)):
        assert_bits(a, b, name)


def large_batch(device, vocabulary=50, samples=8, tokens=512, D=128):
    """Most rows share few ids, and there are enough of them to be spread over threads and blocks."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(0, vocabulary, (samples, tokens), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.6] = 3
    ids[torch.rand(ids.shape, generator=generator) < 0.3] = 77
    weight = torch.randn(vocabulary, D, generator=generator)
    features = torch.randn(int(ids.eq(77).sum()), D, generator=generator)
    grad = torch.randn(samples, tokens, D, generator=generator)
    return [tensor.to(device) for tensor in (ids, weight, features, grad)]


def weight_gradient(backend, ids, weight, features, grad):
    weight = weight.clone().requires_grad_()
    out = vlm_fuse.merge(ids, None, features, weight=weight, image_token_id=77, backend=backend).inputs_embeds
    out.backward(grad)
    return out.detach(), weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_gradient_of_repeated_ids(dtype, backend, device):
    """Thousands of rows are added for one id: in one order, whatever runs beside."""
    size = dict(samples=2, tokens=24, D=16) if backend == "triton" and device == "cpu" else {}
    ids, weight, features, grad = large_batch(device, **size)
    weight, features, grad = weight.to(dtype), features.to(dtype), grad.to(dtype)
    out, first = weight_gradient(backend, ids, weight, features, grad)
    for _ in range(3):
        again, second = weight_gradient(backend, ids, weight, features, grad)
        assert_bits(second, first, "weight gradient")
        assert_bits(again, out, "rows")
    wide = torch.zeros(weight.shape, dtype=torch.float64, device=device)
    text = ids.ne(77)
    wide.index_add_(0, ids[text], grad[text].double())
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    assert (first.double() - wide).abs().max() <= tolerance * wide.abs().max()
    # added in fp32 in ascending order of the rows, rounded once
    order = torch.zeros(weight.shape, device=device)
    for row in ids.view(-1).eq(3).nonzero()[:, 0].tolist():
        order[3] += grad.view(-1, grad.shape[-1])[row].float()
    assert_bits(first[3], order[3].to(dtype), "the row of the most frequent id")


def test_any_number_of_threads(backend, device):
    if device != "cpu" or backend == "triton":
        pytest.skip("threads of the host")
    given = large_batch(device)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(weight_gradient(backend, *given))
    finally:
        torch.set_num_threads(before)
    for out, gradient in found[1:]:
        assert_bits(out, found[0][0], "rows")
        assert_bits(gradient, found[0][1], "weight gradient")


def test_calls_from_several_threads(backend, device):
    """The GIL is released inside kernels: calls must share nothing."""
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter keeps one state for the process")
    problems = []

    def work(seed):
        try:
            for round in range(12):
                case = replace(BY_NAME[NAMES[(seed + round) % len(NAMES)]], D=64 if round % 2 else 7)
                for a, b in zip(run(case, backend, device, seed + round), expected[seed, round]):
                    assert_bits(a, b, case.name)
        except BaseException as problem:  # noqa: BLE001
            problems.append(problem)

    expected = {}
    for seed in range(4):
        for round in range(12):
            case = replace(BY_NAME[NAMES[(seed + round) % len(NAMES)]], D=64 if round % 2 else 7)
            expected[seed, round] = run(case, backend, device, seed + round)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]


def test_backward_on_another_thread(backend, device):
    tensors = BY_NAME["packed_layout"].tensors(device=device).require_grad()
    out = merge(tensors, backend).inputs_embeds
    thread = threading.Thread(target=lambda: out.sum().backward())
    thread.start()
    thread.join()
    expected = BY_NAME["packed_layout"].tensors(device=device).require_grad()
    merge(expected, backend).inputs_embeds.sum().backward()
    for a, b in zip(tensors.leaves, expected.leaves):
        assert torch.equal(a.grad, b.grad)


def test_a_large_batch_equals_the_reference(backend, device):
    """Sizes at which kernels split the work, stream past the cache and merge runs of rows."""
    size = dict(samples=2, tokens=64, D=64) if backend == "triton" and device == "cpu" else dict(samples=8, tokens=1024, D=640)
    ids, weight, features, grad = large_batch(device, **size)
    for layout in ("keep", "packed"):
        mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)).gt(0.1).to(device)
        found = []
        for name in (backend, "reference"):
            leaves = [weight[ids.remainder(50)].clone().requires_grad_(), features.clone().requires_grad_()]
            out = vlm_fuse.merge(ids, *leaves, image_token_id=77, attention_mask=mask, layout=layout, backend=name).inputs_embeds
            out.backward(grad.reshape(-1, grad.shape[-1])[: out.shape[0] * out.shape[1]].view(out.shape))
            found.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for a, b in zip(*found):
            assert_bits(a, b, layout)
