"""Tensors that the CUDA module has torch make: torch's own in every respect, whichever way torch is asked."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

import vlm_fuse
from vlm_fuse.kernels import cuda_module

pytestmark = pytest.mark.skipif(cuda_module.module is None, reason=f"no CUDA module: {cuda_module.reason}")

DEVICE = vlm_fuse.backends()["cuda"].devices[-1] if cuda_module.module is not None else "cpu"
NAMES = ("inputs_embeds", "source_index", "position_ids", "labels", "document_ids", "attention_mask", "cu_seqlens")

ids = torch.tensor([[1, 9, 9, 2, 3], [4, 9, 5, 6, 0]], device=DEVICE)


@pytest.fixture(params=["functions", "new_empty"])
def way(request):
    """How torch is asked."""
    cuda_module.attach_allocation(cuda_module.module, through_functions=request.param == "functions")
    yield request.param
    cuda_module.attach_allocation(cuda_module.module)


def merge(text, features):
    return vlm_fuse.merge(ids, text, features, image_token_id=9, labels=ids, backend="cuda", validate="async")


def rows(**options):
    return torch.randn(2, 5, 8, device=DEVICE, **options), torch.randn(3, 8, device=DEVICE, **options)


def test_the_functions_are_found_in_this_torch():
    from vlm_fuse.kernels.torch_library import address, constant

    assert address("libtorch_cpu", "aoti_torch_empty_strided") and address("libtorch_python", "_Z16THPVariable_WrapRKN2at10TensorBaseE")
    assert constant("dtype_int64") >= 0
    assert address("libtorch_cpu", "no_such_function") == 0 and constant("no_such_constant") == -1


def test_results_are_tensors_of_torchs_allocator(way):
    """Each with memory of its own that torch may resize, and a version of its own; kv_lo and kv_hi share theirs."""
    out = merge(*rows())
    assert out.kv_lo.untyped_storage().data_ptr() == out.kv_hi.untyped_storage().data_ptr() != out.source_index.untyped_storage().data_ptr()
    assert out.kv_lo.data_ptr() % 64 == out.kv_hi.data_ptr() % 64 == 0 and out.kv_lo.is_contiguous() and out.kv_hi.is_contiguous()
    made = [getattr(out, name) for name in NAMES]
    assert len({tensor.untyped_storage().data_ptr() for tensor in made}) == len(made)
    for name, tensor in zip(NAMES, made):
        assert tensor.untyped_storage().resizable() and tensor.is_contiguous(), name
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name
        assert tensor._version == 0 and tensor.device.type == DEVICE, name
    out.labels.fill_(-100)
    assert out.position_ids._version == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_and_gradients_have_the_dtype_asked_for(way, dtype):
    text, features = rows(dtype=dtype, requires_grad=True)
    out = merge(text, features).inputs_embeds
    assert out.dtype is dtype and out.shape == text.shape
    grad_text, grad_features = torch.autograd.grad(out, (text, features), torch.ones_like(out))
    assert grad_text.dtype is grad_features.dtype is dtype
    assert grad_text.untyped_storage().resizable()
    assert torch.equal(grad_text, (ids != 9)[..., None].to(dtype).expand_as(grad_text)) and torch.equal(grad_features, torch.ones_like(features))


def test_inference_mode_makes_inference_tensors(way):
    with torch.inference_mode():
        out = merge(*rows())
        assert out.inputs_embeds.is_inference() and out.position_ids.is_inference()
    assert not merge(*rows()).position_ids.is_inference()


def test_more_than_any_memory_is_torchs_own_error(way):
    """An expanded feature tensor makes its gradient that large."""
    features = torch.zeros(1, 8, device=DEVICE).expand(2**45, 8).requires_grad_()
    text = torch.zeros(2, 5, 8, device=DEVICE)
    out = vlm_fuse.merge(ids, text, features, image_token_id=9, backend="cuda", validate="async", unused_features="allow")
    with pytest.raises((RuntimeError, MemoryError), match="(?i)memory|storage size|overflow"):
        out.inputs_embeds.sum().backward()


def test_memory_is_given_back(way):
    """The handles of torch's C functions are released, and with them the memory."""
    text, features = torch.zeros(2, 5, 2**15, device=DEVICE), torch.ones(3, 2**15, device=DEVICE)

    def used() -> int:
        if DEVICE == "cuda":
            return torch.cuda.memory_allocated()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    merge(text, features)
    before, size = used(), text.numel() * 4
    for _ in range(40):
        merge(text, features)
    assert used() - before < 20 * size
