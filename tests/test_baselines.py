"""What the benchmarks compare with is right: every contestant against a loop over the tokens."""

import os

import pytest
import torch
import torch.nn.functional as F

from benchmarks import baselines

IMAGE = 7


def batch(share=0.5, dtype=torch.float32, image_token_id=IMAGE, hidden=6):
    """ids (3, 11), text (3, 11, D), features (N, D)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 40, (3, 11), generator=generator)
    ids[torch.rand(3, 11, generator=generator) < share] = image_token_id
    text = torch.randn(3, 11, hidden, generator=generator).to(dtype)
    features = torch.randn(int((ids == image_token_id).sum()), hidden, generator=generator).to(dtype)
    return ids, text, features


def by_loop(ids, text, features, image_token_id=IMAGE):
    rows, taken = [], 0
    for j, ident in enumerate(ids.flatten().tolist()):
        if ident == image_token_id:
            rows.append(features[taken])
            taken += 1
        else:
            rows.append(text.flatten(0, 1)[j])
    return torch.stack(rows).view_as(text)


CASES = {"half": 0.5, "none": 0.0, "all": 1.0}
FORMULATIONS = {**baselines.MERGES, "gather_where": baselines.gather_where}


@pytest.mark.parametrize("share", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMULATIONS)
def test_merge_equals_loop(name, dtype, share):
    ids, text, features = batch(share, dtype)
    kept = text.clone()
    assert torch.equal(FORMULATIONS[name](ids, text, features, IMAGE), by_loop(ids, text, features))
    assert torch.equal(text, kept)


@pytest.mark.parametrize("name", FORMULATIONS)
def test_gradients_equal_loop(name):
    ids, text, features = batch(dtype=torch.float64)
    text.requires_grad_(), features.requires_grad_()
    weight = torch.randn_like(text)
    expected = torch.autograd.grad(by_loop(ids, text, features), (text, features), weight)
    found = torch.autograd.grad(FORMULATIONS[name](ids, text, features, IMAGE), (text, features), weight)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("name", baselines.IN_PLACE)
def test_in_place_writes_into_the_text(name):
    ids, text, features = batch()
    expected = by_loop(ids, text, features)
    assert baselines.IN_PLACE[name](ids, text, features, IMAGE) is text
    assert torch.equal(text, expected)


def test_check_refuses_a_wrong_number():
    ids, text, features = batch()
    with pytest.raises(ValueError, match=f"features: {len(features) - 1}"):
        baselines.hf_checked(ids, text, features[:-1], IMAGE)


@pytest.mark.parametrize("image_token_id", [IMAGE, 50, -200])
def test_embedding_then_merge(image_token_id):
    ids, _, features = batch(image_token_id=image_token_id)
    weight = torch.randn(40, 6)
    inside = torch.where(ids == image_token_id, 0, ids)
    expected = by_loop(ids, F.embedding(inside, weight), features, image_token_id)
    found = baselines.embed_then(baselines.hf_masked_scatter, ids, weight, features, image_token_id)
    assert torch.equal(found, expected)


def test_remove_padding_keeps_rows_in_order():
    ids, text, features = batch()
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[0, :4], mask[2, 9:] = False, False
    rows, positions, cu_seqlens = baselines.remove_padding(baselines.nanovlm, ids, text, features, IMAGE, mask)
    assert torch.equal(rows[0], by_loop(ids, text, features)[mask])
    assert cu_seqlens.tolist() == [0, 7, 18, 27]
    assert positions[0].tolist() == [*range(7), *range(11), *range(9)]


def test_images_first_puts_the_image_in_front():
    _, text, _ = batch()
    image = torch.randn(3, 4, 6)
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[1, :5] = False
    rows, merged_mask = baselines.images_first_concat(text, image, mask)
    assert torch.equal(rows[:, :4], image) and torch.equal(rows[:, 4:], text)
    assert merged_mask.sum(1).tolist() == [15, 10, 15]


def test_real_tokens_number_the_placeholders():
    lookup = pytest.importorskip("benchmarks.fused_lookup", reason="triton is not installed", exc_type=ImportError)
    ids = torch.tensor([[1, IMAGE, IMAGE, 2], [IMAGE, 3, IMAGE, IMAGE]])
    real, first_ids, sizes, starts = lookup.real_tokens(ids, IMAGE, [2, 1, 2], 40)
    assert real.tolist() == [[1, 40, 41, 2], [42, 3, 43, 44]]
    assert first_ids.tolist() == [40, 42, 43] and starts.tolist() == [0, 2, 3] and sizes.tolist() == [2, 1, 2]


@pytest.mark.skipif(not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1")
def test_fused_lookup_equals_loop():
    lookup = pytest.importorskip("benchmarks.fused_lookup")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids, _, features = batch(image_token_id=50)
    weight = torch.randn(40, 6)
    expected = by_loop(ids, F.embedding(torch.where(ids == 50, 0, ids), weight), features, 50)
    first, rest = len(features) // 2, len(features) - len(features) // 2
    ids, weight, features = ids.to(device), weight.to(device), features.to(device)
    found = lookup.fused_lookup(*_interleave(lookup.real_tokens(ids, 50, [first, rest], 40), weight, features))
    assert torch.equal(found.cpu(), expected)


def _interleave(real, weight, features):
    ids, first_ids, sizes, starts = real
    return ids, weight, features, first_ids, sizes, starts
