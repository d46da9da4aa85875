"""A plan made in the worker: nothing about the tokens is worked out again where the rows are merged."""

import os
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

import vlm_fuse
from vlm_fuse import mask_ops, ops
from vlm_fuse.packing import CollatedBatch, PackingCollator, PaddingCollator

IMAGE = 9
SAMPLES = [
    {"input_ids": [1, IMAGE, IMAGE, 5, 6], "labels": [-100, -100, -100, 5, 6], "pixel_values": torch.ones(1, 3, 2, 2)},
    {"input_ids": [1, 7, 2], "labels": [-100, 7, 2]},
    {"input_ids": [IMAGE, IMAGE, IMAGE, IMAGE], "labels": [-100] * 4, "pixel_values": torch.ones(2, 3, 2, 2)},
]
COLLATORS = {
    "packed": PackingCollator(image_token_id=IMAGE, rows_per_image=2, length=16, max_documents=4),
    "chunks_and_windows": PackingCollator(image_token_id=IMAGE, rows_per_image=2, attend={"full": vlm_fuse.Attend(), "sliding": vlm_fuse.Attend(window=2)}),
    "images": PackingCollator(image_token_id=IMAGE, rows_per_image=2, attend=vlm_fuse.Attend(images="bidirectional")),
    "left": PaddingCollator(image_token_id=IMAGE, rows_per_image=2, padding_side="left"),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", COLLATORS)
def test_merge_and_the_model_need_no_further_look_at_the_tokens(name, workers, monkeypatch):
    (batch,) = DataLoader(SAMPLES, batch_size=3, num_workers=workers, collate_fn=COLLATORS[name])
    weight, features = torch.randn(10, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    expected = vlm_fuse.merge(
        batch["input_ids"], weight=weight, image_embeds=features, image_token_id=IMAGE, attend=batch["plan"].attend, labels=batch["labels"],
        **(dict(attention_mask=batch["attention_mask"]) if name == "left" else dict(document_ids=batch["plan"].document_ids)),
    )  # fmt: skip
    wanted = {name: getattr(expected, name) for name in ("position_ids", "document_ids", "labels", "attention_mask", "kind_ids", "max_seqlen")}

    def refuse(*args, **kwargs):
        raise AssertionError("worked out again")

    for module, function in ((ops, "facts"), (ops, "plan"), (ops, "count"), (mask_ops, "intervals")):
        monkeypatch.setattr(module, function, refuse)
    merged = vlm_fuse.merge(batch["input_ids"], weight=weight, image_embeds=features, plan=batch["plan"])
    for fact, value in wanted.items():
        found = getattr(merged, fact)
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, fact
    assert torch.equal(merged.inputs_embeds, expected.inputs_embeds)
    merged.model_kwargs("sdpa")
    merged.inputs_embeds.sum().backward()
    assert weight.grad is not None and features.grad is not None


def test_masks_are_those_of_the_plan():
    batch = COLLATORS["images"](SAMPLES)
    dense = batch["plan"].mask().dense()[0, 0]
    assert dense[1, 2] and not dense[5, 4] and dense[8, 9] and not dense[0, 1]
    # two images side by side stay apart
    assert not dense[9, 10] and dense[10, 11]


def test_a_dummy_image_for_a_batch_without_images():
    """What FSDP and ZeRO-3 users run, so that no rank waits: its rows get a zero gradient, never None."""
    collate = PackingCollator(image_token_id=IMAGE, rows_per_image=2, unused_features="allow")
    batch = collate([SAMPLES[1]])
    features = torch.randn(2, 4, requires_grad=True)
    merged = vlm_fuse.merge(batch["input_ids"], weight=torch.randn(10, 4), image_embeds=features, plan=batch["plan"])
    merged.inputs_embeds.sum().backward()
    assert torch.equal(features.grad, torch.zeros(2, 4))


def test_static_shapes():
    shapes = set()
    for members in (SAMPLES, SAMPLES[:1], SAMPLES[1:]):
        batch = COLLATORS["packed"](members)
        plan = batch["plan"]
        shapes.add((batch["input_ids"].shape, plan.cu_seqlens.shape, batch["token_counts"].shape, plan.source_index.shape))
        assert plan.cu_seqlens[-1] == plan.attention_mask.sum()
    assert shapes == {((1, 16), (5,), (4,), (1, 16))}
    with pytest.raises(ValueError, match="max_documents: the batch has 5 documents, more than 4"):
        COLLATORS["packed"]([SAMPLES[1]] * 5)


def test_a_batch_survives_pickling():
    batch = pickle.loads(pickle.dumps(COLLATORS["packed"](SAMPLES)))
    assert torch.equal(batch["plan"].source_index, COLLATORS["packed"](SAMPLES)["plan"].source_index)
    assert type(batch.to("cpu")["plan"]) is vlm_fuse.TokenPlan


@pytest.mark.gpu
def test_pinned_and_sent_without_a_wait():
    loader = DataLoader(SAMPLES, batch_size=3, num_workers=1, pin_memory=True, collate_fn=COLLATORS["packed"])
    (batch,) = loader
    assert batch["input_ids"].is_pinned() and batch["plan"].source_index.is_pinned() and batch["pixel_values"].is_pinned()
    weight, features = torch.randn(10, 4, device="cuda"), torch.randn(6, 4, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sent = batch.to("cuda")
        merged = vlm_fuse.merge(sent["input_ids"], weight=weight, image_embeds=features, plan=sent["plan"])
        merged.model_kwargs("sdpa")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = vlm_fuse.merge(batch["input_ids"], weight=weight.cpu(), image_embeds=features.cpu(), plan=batch["plan"])
    assert torch.equal(merged.inputs_embeds.cpu(), expected.inputs_embeds)


class Mixed(dict):
    """A collator whose batch has tensors of every sort: views, empty ones, the same one twice, large, strided, with a gradient."""

    def __call__(self, samples):
        large, small = torch.arange(400_000, dtype=torch.int64), torch.arange(5, dtype=torch.int16)
        return CollatedBatch(
            large=large, small=small, again=[small, small], empty=torch.empty(0, 3), odd=torch.tensor([True, False, True]), number=torch.tensor(2.5, dtype=torch.float64),
            strided=torch.arange(12).view(3, 4).T, half=torch.ones(3, dtype=torch.bfloat16), grad=torch.ones(2, requires_grad=True).detach() * 2,
            parameter=torch.nn.Parameter(torch.ones(2)), text="a", parts={"deep": [torch.arange(3)]},
        )  # fmt: skip


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_worker_hands_over_every_sort_of_tensor(context):
    expected = Mixed()([])
    for batch in DataLoader([0, 1], batch_size=1, num_workers=1, collate_fn=Mixed(), multiprocessing_context=context):
        assert type(batch) is CollatedBatch and list(batch) == list(expected)
        for name in ("large", "small", "empty", "odd", "number", "strided", "half", "grad", "parameter"):
            assert torch.equal(batch[name], expected[name]) and batch[name].dtype == expected[name].dtype, name
        assert batch["again"][0] is batch["again"][1] is batch["small"] and batch["text"] == "a"
        assert torch.equal(batch["parts"]["deep"][0], torch.arange(3))
        before = batch["odd"]._version
        batch["small"].add_(1)
        assert batch["odd"]._version == before and batch["odd"].tolist() == [True, False, True]


def test_a_batch_takes_few_file_descriptors():
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    count = lambda: len(os.listdir("/proc/self/fd"))  # noqa: E731
    loader = iter(DataLoader(SAMPLES * 8, batch_size=3, num_workers=1, collate_fn=COLLATORS["packed"]))
    kept = [next(loader)]
    before = count()
    kept += [next(loader) for _ in range(4)]
    assert count() - before <= 4 * 3  # one for the small tensors, one for the pixels, and what comes with the queue
    assert all(torch.equal(batch["plan"].source_index, kept[0]["plan"].source_index) for batch in kept)
