"""A dummy image in the padding of a batch without images: the tower runs, and nothing else changes."""

import pytest
import torch

import vlm_fuse
from vlm_fuse.packing import PackingCollator, PaddingCollator

IMAGE = 9
TEXTS = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}]
PICTURE = {"input_ids": [6, IMAGE, IMAGE, 7], "labels": [-100, -100, -100, 7], "pixel_values": torch.ones(1, 3, 2, 2)}
SMALL = {"input_ids": [8, IMAGE, IMAGE], "pixel_values": torch.full((1, 3, 2, 2), 0.5)}
known = dict(image_token_id=IMAGE, rows_per_image=2, dummy_image=SMALL)


def test_it_stands_in_the_tail_of_the_emptiest_row_and_is_padding():
    batch = PackingCollator(length=6, max_documents=3, loss_weights=True, **known)([[TEXTS[0]], [TEXTS[1]]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0, 0], [4, 5, 8, IMAGE, IMAGE, 0]]
    assert batch["plan"].attention_mask.tolist() == [[True] * 3 + [False] * 3, [True] * 2 + [False] * 4]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]]
    assert batch["token_counts"].tolist() == [2, 1, 0]
    assert batch["plan"].cu_seqlens.tolist() == [0, 3, 5, 5]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, -100, -100], [-100, 5, -100, -100, -100, -100]]
    assert torch.equal(batch["pixel_values"], SMALL["pixel_values"])


@pytest.mark.parametrize("side, row", [("right", [4, 5, 8, IMAGE, IMAGE]), ("left", [8, IMAGE, IMAGE, 4, 5])])
def test_padded_it_stands_beside_the_shortest_sample_under_mask_0(side, row):
    batch = PaddingCollator(padding_side=side, **known)(TEXTS)
    assert batch["input_ids"][1].tolist() == row
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 2]
    assert (batch["labels"] != -100).sum() == 3


@pytest.mark.parametrize("collate", [PackingCollator(**known), PaddingCollator(**known)], ids=["packed", "padded"])
def test_batches_with_an_image_have_none(collate):
    batch = collate([TEXTS[0], PICTURE])
    assert torch.equal(batch["pixel_values"], PICTURE["pixel_values"]) and 8 not in batch["input_ids"]


def test_shapes_are_the_same_with_and_without_it():
    collate = PackingCollator(length=8, multiple_of=2, max_documents=2, **known)
    assert collate.capacity == 4  # 8, less 3, in whole documents of 2
    with_it, without = collate([TEXTS[0]]), collate([PICTURE])
    for key in ("input_ids", "position_ids", "labels", "token_counts", "cu_seqlens_padded", "pixel_values"):
        assert with_it[key].shape == without[key].shape, key
    assert with_it["plan"].cu_seqlens.shape == without["plan"].cu_seqlens.shape


def test_a_row_without_room_is_refused_with_the_remedy():
    full = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}
    for collate in (PackingCollator(length=6, **known), PaddingCollator(length=6, **known)):
        with pytest.raises(ValueError, match="emptiest row has 2 tokens free; the dummy image takes 3.*`capacity`, 3 of length=6"):
            collate([full])
    with pytest.raises(ValueError, match="leave none of length=3"):
        PackingCollator(length=3, **known)


@pytest.mark.parametrize("sample", [TEXTS[0], {"input_ids": [1], "pixel_values": torch.ones(0, 3, 2, 2)}])
def test_a_dummy_without_an_image_is_refused(sample):
    with pytest.raises(ValueError, match="dummy_image: the sample has no image"):
        PackingCollator(image_token_id=IMAGE, rows_per_image=2, dummy_image=sample)


def test_the_placeholders_of_the_dummy_are_checked():
    with pytest.raises(ValueError, match="dummy_image: 1 placeholders 9 of images, but 1 image becomes 2 rows"):
        PackingCollator(image_token_id=IMAGE, rows_per_image=2, dummy_image={**SMALL, "input_ids": [IMAGE]})


def test_samples_without_labels_stay_without():
    assert "labels" not in PackingCollator(**known)([{"input_ids": [1, 2]}])


@pytest.mark.parametrize("collate", [PackingCollator(**known), PaddingCollator(**known)], ids=["packed", "padded"])
def test_merge_by_the_plan_takes_its_rows(collate):
    batch = collate(TEXTS)
    features = torch.randn(2, 4, requires_grad=True)
    merged = vlm_fuse.merge(batch["input_ids"], weight=torch.randn(10, 4), image_embeds=features, plan=batch["plan"])
    merged.inputs_embeds[batch["plan"].attention_mask].sum().backward()
    assert torch.equal(features.grad, torch.zeros(2, 4))
    assert torch.equal(merged.inputs_embeds[batch["input_ids"] == IMAGE], features)
