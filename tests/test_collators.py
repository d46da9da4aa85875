"""Samples of every form as batches: what stands where, labels and their weights, vision inputs, workers, errors, cutting."""

import functools
from collections import UserDict

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, _utils

import vlm_fuse
from vlm_fuse import packing
from vlm_fuse.packing import CollatedBatch, PackedStream, PackingCollator, PaddingCollator, SampleFormat

IMAGE, VIDEO, PAD, ROWS = 9, 8, 3, 4
FORM = dict(image_token_id=IMAGE, rows_per_image=ROWS)
Pack = functools.partial(PackingCollator, **FORM)
Padded = functools.partial(PaddingCollator, **FORM)

both = pytest.mark.parametrize("collator", [Pack, Padded], ids=["packing", "padding"])


def pixels(images: int, value: float = 1.0) -> torch.Tensor:
    return torch.full((images, 3, 4, 4), value)


def random_samples(seed: int, shifted: bool = False) -> list[dict]:
    """Texts, images at both ends and side by side, samples of one token and of none; labels of most tokens, placeholders too."""
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(7):
        parts, images = [], 0
        for _ in range(int(rng.integers(0, 4))):
            if rng.random() < 0.5:
                parts += [IMAGE] * ROWS
                images += 1
            else:
                parts += rng.integers(10, 50, int(rng.integers(1, 5))).tolist()
        labels = [token if rng.random() < 0.8 else -100 for token in parts]
        if shifted:
            labels = [*labels[1:], -100][: len(parts)]
        samples.append({"input_ids": parts, "labels": labels, "id": number, **({"pixel_values": pixels(images, number)} if images else {})})
    return samples


def expected_row(members: list[dict], width: int, first_document: int, multiple_of: int, shifted: bool):
    """One packed row, by plain loops: tokens, documents, positions, labels."""
    ids, documents, positions, labels = [], [], [], []
    document = first_document
    for sample in members:
        tokens = sample["input_ids"]
        if not tokens:
            continue
        space = -(-len(tokens) // multiple_of) * multiple_of - len(tokens)
        ids += tokens + [PAD] * space
        documents += [document] * len(tokens) + [-1] * space
        positions += range(len(tokens) + space)
        for place in range(len(tokens)):
            target = place + shifted
            inside = 0 < target < len(tokens)
            labels.append(sample["labels"][place] if inside and tokens[target] != IMAGE else -100)
        labels += [-100] * space
        document += 1
    tail = width - len(ids)
    return ids + [PAD] * tail, documents + [-1] * tail, positions + list(range(tail)), labels + [-100] * tail, document


@pytest.mark.parametrize("multiple_of", [1, 4])
@pytest.mark.parametrize("shifted", [False, True], ids=["labels", "shifted_labels"])
@pytest.mark.parametrize("seed", range(6))
def test_packed_rows_are_those_of_plain_loops(seed, shifted, multiple_of):
    samples = random_samples(seed, shifted)
    rows = [samples[:4], samples[4:]]
    batch = Pack(shifted_labels=shifted, pad_token_id=PAD, multiple_of=multiple_of, loss_weights=True)(rows)
    width, document, made = batch["input_ids"].shape[1], 0, []
    for members in rows:
        *row, document = expected_row(members, width, document, multiple_of, shifted)
        made.append(row)
    ids, documents, positions, labels = (torch.tensor(part) for part in zip(*made))
    plan = batch["plan"]
    assert torch.equal(batch["input_ids"], ids) and torch.equal(batch["position_ids"], positions) and torch.equal(batch["labels"], labels)
    assert torch.equal(plan.document_ids.long(), documents) and torch.equal(plan.attention_mask, documents >= 0)
    assert (batch["input_ids"].dtype, batch["position_ids"].dtype, batch["labels"].dtype, plan.document_ids.dtype) == (*[torch.int64] * 3, torch.int32)
    assert batch["token_counts"].tolist() == [int((labels[documents == number] != -100).sum()) for number in range(document)]
    assert batch["id"] == list(range(7)) and batch["use_cache"] is False
    lengths = [len(sample["input_ids"]) for sample in samples if sample["input_ids"]]
    assert plan.cu_seqlens.diff().tolist() == lengths and plan.max_seqlen == max(lengths)
    if multiple_of > 1:
        # as TransformerEngine has it: document k stands at cu_seqlens_padded[k], and has cu_seqlens[k + 1] - cu_seqlens[k] tokens
        begins = batch["cu_seqlens_padded"]
        assert begins.dtype == torch.int32 and not bool((begins % multiple_of).any()) and int(begins[-1]) == documents.numel()
        for number, length in enumerate(lengths):
            begin = int(begins[number])
            assert bool((documents.flatten()[begin : begin + length] == number).all()) and begin + length <= int(begins[number + 1])


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("shifted", [False, True], ids=["labels", "shifted_labels"])
@pytest.mark.parametrize("seed", range(3))
def test_padded_rows_are_those_of_plain_loops(seed, shifted, padding_side):
    samples = random_samples(seed, shifted)
    batch = Padded(padding_side=padding_side, shifted_labels=shifted, pad_token_id=PAD, multiple_of=8)(samples)
    B, T = batch["input_ids"].shape
    assert B == 7 and T % 8 == 0
    for number, sample in enumerate(samples):
        length = len(sample["input_ids"])
        place = slice(T - length, T) if padding_side == "left" else slice(0, length)
        ids, _, positions, labels, _ = expected_row([sample], length, 0, 1, shifted)
        for key, values, fill in (("input_ids", ids, PAD), ("attention_mask", [1] * length, 0), ("position_ids", positions, 0), ("labels", labels, -100)):
            row = torch.full((T,), fill)
            row[place] = torch.tensor(values, dtype=torch.int64)
            assert torch.equal(batch[key][number], row), key
    assert batch["token_counts"].tolist() == [int((row != -100).sum()) for row in batch["labels"]]


@pytest.mark.parametrize("shifted", [False, True], ids=["labels", "shifted_labels"])
@pytest.mark.parametrize("collate", [Pack, functools.partial(Pack, multiple_of=4), functools.partial(Padded, padding_side="left"), Padded])
def test_weighted_loss_is_the_mean_over_samples(collate, shifted):
    """Whatever a sample's length; one without any label does not count. And the sum of all losses is that of the samples."""
    table = torch.randn(50, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def losses(input_ids, labels):
        each = table[input_ids]
        if not shifted:
            each, labels = each[:, :-1], labels[:, 1:]
        return torch.nn.functional.cross_entropy(each.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)

    samples = random_samples(1, shifted) + random_samples(2, shifted)
    sums, means = 0.0, []
    for sample in samples:
        labels = torch.tensor(sample["labels"] or [-100])
        if IMAGE in sample["input_ids"]:
            target = torch.tensor(sample["input_ids"][1:] + [0]) if shifted else torch.tensor(sample["input_ids"])
            labels = labels.masked_fill(target == IMAGE, -100)
        each = losses(torch.tensor([sample["input_ids"] or [0]]), labels[None])
        sums += float(each.sum())
        if bool(each.any()):
            means.append(float(each.sum() / (each != 0).sum()))
    batch = collate(shifted_labels=shifted, loss_weights=True)(samples)
    each = losses(batch["input_ids"], batch["labels"])
    weights = batch["loss_weights"] if shifted else batch["loss_weights"][:, 1:]
    assert float(each.sum()) == pytest.approx(sums, rel=1e-12)
    assert float((each * weights).sum()) == pytest.approx(sum(means) / len(means), rel=1e-6)
    assert float(each.sum() / batch["token_counts"].sum()) == pytest.approx(sums / int((batch["labels"] != -100).sum()), rel=1e-12)


# --- forms of a sample


PLAIN = {"input_ids": [7, *[IMAGE] * 4, 8, 5], "labels": [-100] * 6 + [5], "pixel_values": pixels(1)}
TEXT = {"input_ids": [6, 5, 4], "labels": [6, 5, 4]}


def read_only(values, dtype) -> np.ndarray:
    array = np.asarray(torch.as_tensor(values)).astype(dtype)
    array.setflags(write=False)
    return array


@both
@pytest.mark.parametrize(
    "form",
    [
        {"input_ids": torch.tensor([PLAIN["input_ids"]]), "labels": torch.tensor([PLAIN["labels"]])},
        {"input_ids": read_only(PLAIN["input_ids"], np.uint16), "labels": read_only(PLAIN["labels"], np.int32), "pixel_values": read_only(pixels(1), np.float32)},
        {"labels": None, "assistant_masks": np.array([False] * 6 + [True]), "pixel_values": [np.ones((3, 4, 4), np.float32)]},
        {"input_ids": [0, 0, *PLAIN["input_ids"], 0], "labels": [-100, -100, *PLAIN["labels"], -100], "attention_mask": [False, False, *[True] * 7, False]},
        UserDict({"position_ids": torch.arange(7)[None], "rope_deltas": torch.zeros(1, 1)}),
    ],
    ids=["batch_of_one", "read_only", "loss_mask", "padded", "positions_of_its_own"],
)
@pytest.mark.filterwarnings("error")
def test_every_form_of_a_sample_gives_the_same_batch(collator, form):
    expected = collator(loss_weights=True)([PLAIN, TEXT])
    found = collator(loss_weights=True)([None, UserDict({**PLAIN, **form}), TEXT])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name
    assert torch.equal(found["plan"].source_index, expected["plan"].source_index)


@both
def test_texts_may_come_without_token_types_and_with_empty_images(collator):
    sample = {**PLAIN, "mm_token_type_ids": [0, 1, 1, 1, 1, 0, 0]}
    empty = {**TEXT, "pixel_values": [], "image_grid_thw": [], "images": None}
    batch = collator()([TEXT, sample, empty])
    assert batch["pixel_values"].shape == (1, 3, 4, 4) and "image_grid_thw" not in batch
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == IMAGE)


@both
def test_ids_of_any_size_and_a_padding_id_that_words_have(collator):
    batch = collator(pad_token_id=5, length=8)([{"input_ids": [-5, 2**40, 5], "labels": [1, 2, 5]}])
    assert batch["input_ids"].tolist() == [[-5, 2**40, 5, 5, 5, 5, 5, 5]]
    assert batch["labels"].tolist() == [[-100, 2, 5, -100, -100, -100, -100, -100]]


def test_what_belongs_to_no_tower_stays_a_list():
    batch = Pack()([{**TEXT, "image_id": 5, "image_path": "a.png", "meta": {"a": 1}}, TEXT])
    assert (batch["image_id"], batch["image_path"], batch["meta"]) == ([5, None], ["a.png", None], [{"a": 1}, None])


@pytest.mark.parametrize(
    ("parts", "shape"),
    [
        ([pixels(2), np.ones((1, 3, 4, 4), np.float32)], (3, 3, 4, 4)),
        ([torch.ones(1, 3, 4, 8), torch.ones(2, 3, 6, 4)], (3, 3, 6, 8)),
        ([[np.ones((2, 3, 4, 4), np.float32)], torch.ones(1, 3, 3, 4, 4)], (2, 3, 3, 4, 4)),
        ([torch.ones(1, 3, 3, 4, 4), torch.ones(1, 2, 3, 4, 4)], (1, 5, 3, 4, 4)),
        ([[[np.ones((3, 4, 4), np.float32)] * 2], torch.ones(1, 2, 3, 4, 4)], (1, 4, 3, 4, 4)),
    ],
    ids=["images", "sizes_differ", "tiles", "a_batch_around", "lists_of_lists"],
)
def test_vision_inputs_are_joined_in_reading_order(parts, shape):
    more = {"image_sizes": [(4, 4)]} if len(shape) == 5 and shape[0] > 1 else {}
    sizes = [len(part[0]) if shape[0] == 1 else len(part) for part in parts]
    samples = [{"input_ids": [IMAGE] * size, "pixel_values": part, **more} for size, part in zip(sizes, parts)]
    batch = PackingCollator(image_token_id=IMAGE)([samples[0], {"input_ids": [1]}, samples[1]])
    assert batch["pixel_values"].shape == shape and batch["pixel_values"].dtype == torch.float32
    assert int(batch["pixel_values"].sum()) == sum(np.asarray(part).size for part in parts)


def test_names_of_many_processors_go_to_the_tower():
    more = {"batch_num_images": [1], "num_patches": [2], "spatial_shapes": np.array([[2, 2]]), "high_res_pixel_values": pixels(1), "num_tiles": torch.tensor([1])}
    batch = Pack()([{**PLAIN, **more}, {**PLAIN, **more}])
    assert all(len(batch[name]) == 2 and isinstance(batch[name], torch.Tensor) for name in more)


# --- nanoVLM


def nanovlm(seed: int, tiles: list[int], words: int) -> dict:
    """As its VQADataset makes them: labels shifted, no target at the end, the images a list of tiles."""
    rng = np.random.default_rng(seed)
    ids = [token for count in tiles for tile in range(count) for token in [40 + tile, *[IMAGE] * ROWS]]
    ids = torch.tensor(ids + rng.integers(10, 30, words).tolist())
    asked = torch.arange(len(ids)) < len(ids) - words // 2
    labels = ids.masked_fill(asked, -100).roll(-1)
    labels[-1] = -100
    return {"images": [torch.full((count, 3, 4, 4), float(seed)) for count in tiles], "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_samples_of_nanovlm():
    samples = [nanovlm(1, [], 5), None, nanovlm(2, [5, 1], 6), nanovlm(3, [1], 1)]
    for batch in (Pack(shifted_labels=True)(samples), Padded(shifted_labels=True, padding_side="left")(samples)):
        assert [tuple(image.shape) for image in batch["images"]] == [(5, 3, 4, 4), (1, 3, 4, 4), (1, 3, 4, 4)]
        assert batch["plan"].feature_starts == (0, 7 * ROWS)
        kept = batch["plan"].attention_mask
        assert torch.equal(batch["labels"][kept], torch.cat([sample["labels"] for sample in samples if sample]))
        assert batch["token_counts"].tolist() == [2, 3, 0]
    assert Pack()([nanovlm(1, [], 5)])["images"] == []
    form = SampleFormat(**FORM, shifted_labels=True)
    assert [form.size(sample) for sample in samples if sample] == [(5, 0, 0), (36, 2, 24), (6, 1, 4)]


def test_the_last_target_of_a_piece_is_not_the_first_token_of_the_next():
    sample = {"input_ids": [1, 2, 3, 4], "labels": [2, 3, 4, -100]}
    form = SampleFormat(shifted_labels=True)
    pieces = [form.cut(sample, 0, 2), form.cut(sample, 2, 4)]
    assert PackingCollator(shifted_labels=True)(pieces)["labels"].tolist() == [[2, -100, 4, -100]]
    assert PackingCollator()([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4], "labels": [3, 4]}])["labels"].tolist() == [[-100, 2, -100, 4]]


# --- M-RoPE


GRIDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, mrope=True)
VISUAL = [
    {"input_ids": [1, 2, 3]},
    {"input_ids": [IMAGE] * 5 + [4], "image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 2]]), "pixel_values": np.ones((20, 3), np.float32)},
    {"input_ids": []},
    {"input_ids": [5, VIDEO, VIDEO, 6, VIDEO, VIDEO, IMAGE], "video_grid_thw": [[2, 2, 4]], "image_grid_thw": [[1, 2, 2]],
     "pixel_values_videos": torch.ones(16, 3), "pixel_values": torch.ones(4, 3)},
]  # fmt: skip


@pytest.mark.parametrize("more", [dict(), dict(length=24), dict(length=32, multiple_of=8, max_documents=6)], ids=["plain", "tail", "static"])
def test_mrope_positions_of_a_row_are_those_of_each_sample(more):
    collate = PackingCollator(**GRIDS, frames_apart=True, **more)
    batch = collate(VISUAL)
    documents = batch["plan"].document_ids[0]
    alone = [sample for sample in VISUAL if sample["input_ids"]]
    for number, sample in enumerate(alone):
        own = PaddingCollator(**GRIDS, frames_apart=True)([sample])
        found = batch["position_ids"][:, 0, documents == number]
        assert torch.equal(found[1:], own["position_ids"][:, 0]) and torch.equal(found[0], torch.arange(len(sample["input_ids"])))
    tail = int((documents >= 0).nonzero().max()) + 1
    if more.get("multiple_of") is None:
        assert torch.equal(batch["position_ids"][:, 0, tail:], torch.arange(documents.numel() - tail).expand(4, -1))
    assert batch["plan"].image_ids[0, documents == 2].tolist() == [-1, 3, 3, -1, 4, 4, 2]


def test_a_broken_image_is_named_by_its_sample():
    broken = {**VISUAL[3], "input_ids": [VIDEO, 5, VIDEO, VIDEO, VIDEO, IMAGE, 6], "id": "film"}
    with pytest.raises(ValueError, match=r"sample 1 of the batch \(id 'film'\): video_grid_thw: .* has 1 placeholders, but its grid needs 2"):
        PackingCollator(**GRIDS, frames_apart=True)([VISUAL[1], broken])


# --- errors


@both
@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"input_ids": [IMAGE] * 3, "pixel_values": pixels(1)}, "3 placeholders 9 of images, but 1 image becomes 4 rows; was the text cut off"),
        ({"input_ids": [IMAGE] * 4, "pixel_values": pixels(2)}, r"4 placeholders 9 of images, but 2 images become 8 rows \(4, 4\)"),
        ({"input_ids": [1, 2], "pixel_values": pixels(1)}, "0 placeholders 9 of images, but 1 image becomes 4 rows"),
        ({"input_ids": [IMAGE] * 4}, "4 placeholders 9 of images, but no images; give them with the sample"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries, input_ids 2"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, r"input_ids has shape \(2, 3\); the collator takes one sample at a time"),
        ({"input_ids": [IMAGE, 1], "attention_mask": [0, 1]}, "image placeholders under attention_mask 0"),
        ({"input_ids": [IMAGE], "image_grid_thw": [[1, 2, 2]], "pixel_values": torch.ones(3, 5)}, "pixel_values has 3 patches, image_grid_thw 4"),
    ],
)
def test_a_sample_that_does_not_agree_is_named(collator, sample, message):
    with pytest.raises(ValueError, match=r"sample 2 of the batch \(id 'x7'\): " + message):
        collator()([None, {"input_ids": [1]}, {**sample, "id": "x7"}])


@both
@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        ([None, None], ValueError, "no samples, or every one is None"),
        ([{"input_ids": [1.5]}], TypeError, "sample 0 of the batch: input_ids is torch.float64, expected whole numbers"),
        ([{"input_ids": "words"}], TypeError, "sample 0 of the batch: input_ids is no list of whole numbers"),
        ([{"pixel_values": 1}], TypeError, "sample 0 of the batch: has no input_ids, only pixel_values"),
        ([TEXT, 5], TypeError, "sample 1 of the batch: expected a dict with input_ids, got int"),
        ([TEXT, {"input_ids": [1]}], ValueError, "labels: 1 of 2 samples have them"),
        ([{**PLAIN}, {**PLAIN, "pixel_values": torch.ones(1, 1, 3, 4, 4)}], ValueError, "pixel_values: the samples have it with 4 and 5 dimensions"),
        ([{"input_ids": [1], "pixel_values_videos": torch.ones(1, frames, 3, 4, 4)} for frames in (2, 3)], ValueError, "pixel_values_videos: .* in sizes"),
        ([{"input_ids": [1], "token_type_ids": [0]}, {"input_ids": [1]}], ValueError, "token_type_ids: some samples have it and some do not"),
    ],
)
def test_batches_that_are_refused(collator, samples, error, message):
    with pytest.raises(error, match=message):
        collator()(samples)


@both
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(length=0), "length: expected a number of tokens"), (dict(length=8.0), "length: expected a number of tokens"),
        (dict(length=8, multiple_of=3), "length: 8 is no multiple of multiple_of=3; take 9"), (dict(multiple_of=0), "multiple_of: expected at least 1"),
        (dict(pad_token_id=IMAGE), "pad_token_id: 9 is a placeholder"),
    ],
)  # fmt: skip
def test_settings_that_are_refused_before_any_batch(collator, settings, message):
    with pytest.raises(ValueError, match=message):
        collator(**settings)


def test_rows_and_documents_beyond_the_limits():
    with pytest.raises(ValueError, match="length: the samples of row 1 have 10 tokens, more than 8; raise length"):
        Pack(length=8)([[TEXT], [PLAIN, TEXT]])
    with pytest.raises(ValueError, match=r"length: sample 1 of the batch \(id 'long'\) has 7 tokens, more than 6"):
        Padded(length=6)([None, {**PLAIN, "id": "long"}])
    with pytest.raises(ValueError, match="max_documents: the batch has 2 documents, more than 1"):
        Pack(max_documents=1)([TEXT, TEXT])
    with pytest.raises(TypeError, match="mixes samples and rows of samples"):
        Pack()([[TEXT], TEXT])
    batch = Pack(length=12, multiple_of=4, max_documents=4, loss_weights=True)([TEXT, TEXT])
    assert batch["plan"].cu_seqlens.tolist() == [0, 3, 6, 6, 6] and batch["cu_seqlens_padded"].tolist() == [0, 4, 12, 12, 12]
    assert batch["token_counts"].tolist() == [2, 2, 0, 0] and float(batch["loss_weights"].sum()) == 1.0


# --- on its way


class Numbered:
    """A dataset that can be sent to a process of its own."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, number: int) -> dict:
        images = number % 3
        ids = [IMAGE] * (ROWS * images) + list(range(10, 12 + number % 7))
        return {"input_ids": ids, "labels": ids, "pixel_values": pixels(images, number), "pixel_attention_mask": torch.ones(images, 4, 4, dtype=torch.bool)}


FACTS = ("source_index", "text_index", "position_ids", "document_ids", "image_ids", "kind_ids", "attention_mask", "labels", "kv_lo", "kv_hi", "cu_seqlens")


def assert_same_batch(found: CollatedBatch, expected: CollatedBatch):
    assert type(found) is CollatedBatch and found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name
    for name in FACTS:
        assert torch.equal(getattr(found["plan"], name), getattr(expected["plan"], name)), name
    assert found["plan"].max_seqlen == expected["plan"].max_seqlen
    features, weight = torch.randn(expected["plan"].feature_starts[-1], 3), torch.randn(60, 3)
    merged = [vlm_fuse.merge(batch["input_ids"], weight=weight, image_embeds=features, plan=batch["plan"]).inputs_embeds for batch in (found, expected)]
    assert torch.equal(*merged)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_batches_from_workers_are_those_made_here(start):
    dataset, collate = Numbered(), Pack(loss_weights=True, length=64)
    expected = list(DataLoader(dataset, 4, collate_fn=collate))
    loader = DataLoader(dataset, 4, collate_fn=collate, num_workers=2 if start == "fork" else 1, multiprocessing_context=start, persistent_workers=True)
    for _ in range(2):
        held = list(loader)  # all of them alive at a time
        assert len(held) == 12
        for found, wanted in zip(held, expected):
            assert_same_batch(found, wanted)


def test_pinned_and_sent_as_loaders_and_accelerate_do(monkeypatch):
    batch = Pack(loss_weights=True)([PLAIN, TEXT])
    pinned, plan = [], batch["plan"]
    everything = [*batch.values(), *vars(plan).values(), plan.kv_lo, plan.kv_hi]

    def pin(tensor):
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    by_loader = _utils.pin_memory.pin_memory(batch)
    assert {id(tensor) for tensor in everything if isinstance(tensor, torch.Tensor)} == {id(tensor) for tensor in pinned}
    assert_same_batch(by_loader, batch)
    assert_same_batch(batch.pin_memory(), batch)
    # accelerate's send_to_device calls what has a `to`
    assert_same_batch(batch.to(torch.device("cpu"), non_blocking=True), batch)
    away = batch.to("meta")
    assert {value.device.type for value in [*away.values(), *vars(away["plan"]).values()] if isinstance(value, torch.Tensor)} == {"meta"}


def test_lists_of_images_are_pinned_and_sent(monkeypatch):
    batch = Pack(shifted_labels=True)([nanovlm(1, [2], 3)])
    assert batch.to("meta")["images"][0].device.type == "meta"
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    assert float(batch.pin_memory()["images"][0].max()) == 2.0


# --- pieces


def tiled(sample: dict) -> list[int]:
    """InternVL: three tiles, then one; the processor gives no more than the pixels of all."""
    return {4: [3 * ROWS, ROWS], 3: [3 * ROWS], 1: [ROWS], 0: []}[len(sample.get("pixel_values", ()))]


def cut_forms() -> dict:
    text, one = [1, 2], [IMAGE] * ROWS
    two = [*text, *one, 3, *one, 4]
    many = [*text, *one * 3, 3, *one, 4]
    return {
        "images": (FORM, dict(input_ids=two, pixel_values=torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 2, 2))),
        "list_of_arrays": (FORM, dict(input_ids=two, pixel_values=[np.zeros((3, 2, 2)), np.ones((3, 2, 2))])),
        "a_batch_around": (FORM, dict(input_ids=two, pixel_values=torch.arange(2.0).view(1, 2, 1, 1, 1).expand(1, 2, 3, 2, 2), pixel_attention_mask=torch.ones(1, 2, 2, 2))),
        "nanovlm": (FORM, dict(input_ids=many, images=[torch.zeros(3, 3, 2, 2), torch.ones(1, 3, 2, 2)])),
        "tiles": (dict(image_token_id=IMAGE, rows_per_image=tiled), dict(input_ids=many, pixel_values=torch.tensor([0.0, 0, 0, 1]).view(4, 1, 1, 1))),
        "rows": (dict(image_token_id=IMAGE, rows_per_image=lambda sample: [ROWS] * (len(sample.get("image_embeds", ())) // ROWS)),
                 dict(input_ids=two, image_embeds=torch.arange(2.0).repeat_interleave(ROWS)[:, None])),
        "grids": (dict(image_token_id=IMAGE, video_token_id=VIDEO),
                  dict(input_ids=two, image_grid_thw=[[1, 4, 4], [1, 4, 4]], pixel_values=torch.arange(2.0).repeat_interleave(16)[:, None])),
        "image_and_film": (dict(image_token_id=IMAGE, video_token_id=VIDEO, frames_apart=True),
                           dict(input_ids=[*text, VIDEO, VIDEO, 7, VIDEO, VIDEO, 3, *one, 4], video_grid_thw=torch.tensor([[2, 2, 4]]), second_per_grid_ts=[0.5],
                                pixel_values_videos=np.zeros((16, 1)), image_grid_thw=np.array([[1, 4, 4]]), pixel_values=np.ones((16, 1)))),
        "one_id_for_both": (dict(image_token_id=IMAGE, video_token_id=IMAGE, frames_apart=True),
                            dict(input_ids=[*text, *[IMAGE] * 2, 7, *[IMAGE] * 2, 3, *one, 4], mm_token_type_ids=[0, 0, 2, 2, 0, 2, 2, 0, *[1] * 4, 0],
                                 video_grid_thw=[[2, 2, 4]], pixel_values_videos=torch.zeros(16, 1), image_grid_thw=[[1, 4, 4]], pixel_values=torch.ones(16, 1))),
    }  # fmt: skip


CUT_FORMS = cut_forms()


def towers(piece: dict) -> list[float]:
    """The number of each image in what the tower takes."""
    found = [piece[name] for name in ("pixel_values_videos", "pixel_values", "images", "image_embeds") if name in piece]
    return [float(image) for value in found for part in (value if isinstance(value, list) else [value]) for image in np.unique(np.asarray(part))]


@pytest.mark.parametrize("name", CUT_FORMS)
def test_a_piece_has_the_images_that_stand_in_it(name):
    settings, sample = CUT_FORMS[name]
    form, collate = SampleFormat(**settings), PackingCollator(**settings)
    labels = [-100, *sample["input_ids"][1:]]
    sample = {**sample, "labels": labels, "image_path": "a.png"}
    (first, first_stop), (second, second_stop) = form.spans(sample)
    length = len(labels)
    for start, stop, images in ((0, second, [0.0]), (second, length, [1.0]), (0, length, [0.0, 1.0]), (0, first, []), (first_stop, second, []), (second_stop, length, [])):
        piece = form.cut(sample, start, stop)
        assert towers(piece) == images and piece["input_ids"].tolist() == sample["input_ids"][start:stop] and piece["labels"].tolist() == labels[start:stop]
        assert form.size(piece).images == len(images)
        again = form.cut(piece, 0, stop - start)
        assert towers(again) == images
        collate([piece, sample])
    for begin, end in ((first, first_stop), (second, second_stop)):
        for inside in range(begin + 1, end):
            for start, stop in ((0, inside), (inside, length)):
                with pytest.raises(ValueError, match="cut through (image|video) [01], tokens"):
                    form.cut(sample, start, stop)


@pytest.mark.parametrize("name", CUT_FORMS)
def test_a_stream_splits_what_is_longer_than_a_row(name):
    settings, sample = CUT_FORMS[name]
    form, collate = SampleFormat(**settings), PackingCollator(**settings)
    longest = max(stop - start for start, stop in form.spans(sample))
    rows = list(PackedStream([sample, None, {"input_ids": [5] * 3}], longest + 2, sample_format=form, overlong="split", seed=None))
    batch = collate(rows)
    assert int(batch["plan"].attention_mask.sum()) == len(sample["input_ids"]) + 3
    assert sorted(token for row in rows for piece in row for token in np.asarray(piece["input_ids"]).tolist()) == sorted([*sample["input_ids"], 5, 5, 5])
    assert sorted(number for row in rows for piece in row for number in towers(piece)) == [0.0, 1.0]


def test_cuts_that_nobody_could_make():
    with pytest.raises(ValueError, match="the sample: pixel_values has 3 parts for 2 images, so that nobody knows"):
        SampleFormat(IMAGE).cut({"input_ids": [IMAGE, 1, IMAGE, IMAGE], "pixel_values": pixels(3)}, 0, 1)
    with pytest.raises(ValueError, match="placeholders of an image and of a video stand within one another"):
        SampleFormat(IMAGE, VIDEO).spans({"input_ids": [IMAGE, VIDEO, IMAGE, IMAGE, IMAGE], "image_grid_thw": [[1, 4, 4]], "video_grid_thw": [[1, 2, 2]]})
    with pytest.raises(ValueError, match="give mm_token_type_ids to tell them apart"):
        SampleFormat(IMAGE, IMAGE).size({"input_ids": [IMAGE]})
    assert SampleFormat(IMAGE, IMAGE).size({"input_ids": [1, 2]}) == packing.SampleSize(2)
    # rows of unknown sizes count as many patches as there are placeholders
    assert SampleFormat(IMAGE).size({"input_ids": [IMAGE] * 5, "pixel_values": pixels(2)}) == (5, 2, 5)


def test_ids_from_numpy_are_taken():
    batch = PackingCollator(image_token_id=np.int64(IMAGE), rows_per_image=np.int64(2), spatial_merge_size=np.int32(2))([{"input_ids": [IMAGE, IMAGE, 5], "pixel_values": pixels(1)}])
    assert batch["plan"].feature_starts == (0, 2)
    with pytest.raises(TypeError):
        PackingCollator(image_token_id="<image>")
