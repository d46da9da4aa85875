"""More than 2**31 elements: addresses are 64 bits wide everywhere."""

import pytest
import torch

import vlm_fuse

#: rows of this hidden size pass 2**31 elements at 2**31 / D rows
D = 2**17
ROWS = 2**14 + 40

pytestmark = [pytest.mark.no_poison, pytest.mark.large]


def memory_gib() -> float:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


@pytest.fixture
def enough_memory(backend, device):
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter copies row by row; test_triton_compile.py asserts 64-bit addresses")
    if backend == "reference":
        pytest.skip("plain PyTorch; its temporaries would not fit")
    if device == "cpu" and memory_gib() < 14:
        pytest.skip("needs 14 GiB")


def pattern(rows: int, device) -> torch.Tensor:
    """(rows, D) that takes the memory of one column block: stride 0 along the row's blocks."""
    return torch.arange(rows, device=device).remainder(509).to(torch.bfloat16)[:, None].expand(rows, D)


def test_an_output_of_more_than_2_31_elements(backend, device, enough_memory):
    ids = torch.full((1, ROWS), 7, device=device)
    ids[0, ::3] = 1
    images = int(ids.eq(7).sum())
    out = torch.empty(1, ROWS, D, dtype=torch.bfloat16, device=device)
    assert out.numel() > 2**31
    merged = vlm_fuse.merge(ids, pattern(ROWS, device)[None], pattern(images, device), image_token_id=7, out=out, backend=backend)
    assert merged.inputs_embeds is out
    source = merged.source_index[0].long()
    expected = torch.where(source >= 0, source, -1 - source).remainder(509).to(torch.bfloat16)
    for column in (0, 1, D // 2, D - 1):
        assert torch.equal(out[0, :, column], expected), f"column {column}"
    assert torch.equal(out[0, -1], expected[-1].expand(D))
    assert torch.equal(out[0, 2**14], expected[2**14].expand(D))


def test_features_and_text_of_more_than_2_31_elements(backend, device, enough_memory):
    """A few rows read from far behind in large tables: the rows of the last 64 KiB."""
    large = torch.empty(2**31 // 512 + 64, 512, dtype=torch.bfloat16, device=device)
    assert large.numel() > 2**31
    last = len(large) - 1
    large[-8:] = torch.arange(8, device=device)[:, None]
    ids = torch.tensor([[last, 5, last - 3, last - 7]], device=device)
    out = vlm_fuse.merge(ids, None, torch.ones(1, 512, device=device), weight=large, image_token_id=5, backend=backend).inputs_embeds
    assert out[0, :, 0].tolist() == [7, 1, 4, 0] and out[0, :, -1].tolist() == [7, 1, 4, 0]
    plan = vlm_fuse.plan(torch.tensor([[9, 9, 9]], device=device), image_token_id=9, image_sizes=[3], backend=backend)
    plan.source_index.copy_(torch.tensor([[0, 1, 2]]))
    text = torch.zeros(1, 3, 512, dtype=torch.bfloat16, device=device)
    spread = large[:: last // 2][:3]
    assert spread.stride(0) * 2 > 2**31 - 2**20
    out = vlm_fuse.merge(torch.tensor([[9, 9, 9]], device=device), text, spread, image_token_id=9, plan=plan, backend=backend).inputs_embeds
    assert torch.equal(out[0, 2], spread[2]) and torch.equal(out[0, 0], spread[0])


def test_gradients_of_more_than_2_31_elements(backend, device, enough_memory):
    """grad is expanded and takes no memory; the gradient of the features does."""
    ids = torch.full((1, ROWS), 7, device=device)
    ids[0, 0] = 1
    features = torch.zeros(1, dtype=torch.bfloat16, device=device).expand(ROWS - 1, D).requires_grad_()
    text = torch.zeros(1, dtype=torch.bfloat16, device=device).expand(1, ROWS, D)
    plan = vlm_fuse.plan(ids, image_token_id=7, backend=backend)
    from vlm_fuse.backend import choose

    made = torch.empty(ROWS - 1, D, dtype=torch.bfloat16, device=device)
    grad = pattern(ROWS, device)[None]
    choose(backend, text.device.type).rows_backward(grad, plan.source_index, None, None, None, [0], False, None, None, [made])
    assert made.numel() > 2**31
    for column in (0, D - 1):
        assert torch.equal(made[:, column], grad[0, 1:, column]), f"column {column}"
    assert torch.equal(made[-1], grad[0, -1])
    assert features.requires_grad
