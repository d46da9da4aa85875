"""Batches of what real processors give: tiny models make of them what they make of each sample alone."""

import functools

import pytest
import torch

import vlm_fuse
from vlm_fuse import IntervalMask
from vlm_fuse.packing import PackingCollator, PaddingCollator, SampleFormat

pytest.importorskip("transformers", minversion="5.23")
pytest.importorskip("PIL")

import processors  # noqa: E402

#: linear attention goes on over restarting positions, and transformers' own fall-backs take no boundaries
ISOLATED = [name for name in processors.FAMILIES if name != "qwen3_5"]

every_family = pytest.mark.parametrize("name", processors.FAMILIES)


@functools.cache
def ready(name: str) -> processors.Ready:
    return processors.made_ready(name)


def run(made: processors.Ready, batch: dict, **settings):
    """Logits of all tokens, one sample after another, and the sum of their losses, as a loss in transformers takes it."""
    with torch.no_grad():
        out = made.family.model(**batch, **settings, num_items_in_batch=1)  # the whole batch, as transformers' Trainer does
    return out.logits[batch["plan"].attention_mask], out.loss


def assert_as_alone(made: processors.Ready, batch: dict, **settings):
    logits, loss = run(made, batch, **settings)
    torch.testing.assert_close(logits, made.logits, atol=3e-5, rtol=3e-5)
    torch.testing.assert_close(float(loss), sum(made.losses), atol=2e-4, rtol=1e-5)
    assert batch["token_counts"].tolist() == made.counts
    kept = batch["plan"].attention_mask
    targets, weights = (torch.nn.functional.pad(batch[key][:, 1:], (0, 1), value=fill)[kept] for key, fill in (("labels", -100), ("loss_weights", 0)))
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    means = [loss / count for loss, count in zip(made.losses, made.counts) if count]
    torch.testing.assert_close(float((each * weights).sum()), sum(means) / len(means), atol=1e-5, rtol=1e-5)


def assert_merged(made: processors.Ready, batch: dict):
    """The rows that merge puts in, from the plan alone, are those that the model puts in, to the bit."""
    table = made.family.model.get_input_embeddings()
    with torch.no_grad():
        rows = processors.tower_rows(made.family, batch)
        expected = table(batch["input_ids"])
        for token, own in rows.items():
            expected = expected.masked_scatter((batch["input_ids"] == token)[..., None], own)
        scale = getattr(table, "scalar_embed_scale", None)
        merged = vlm_fuse.merge(batch["input_ids"], weight=table.weight, image_embeds=rows, plan=batch["plan"], embed_scale=scale)
    assert torch.equal(merged.inputs_embeds, expected)


@every_family
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padded_batch_is_each_sample_alone(name, padding_side):
    made = ready(name)
    batch = PaddingCollator(padding_side=padding_side, multiple_of=8, loss_weights=True, **made.family.settings)(made.samples)
    assert_as_alone(made, batch)
    assert_merged(made, batch)


@pytest.mark.parametrize("name", ISOLATED)
def test_packed_rows_are_each_sample_alone(name):
    made = ready(name)
    # two rows, of which one has a tail of padding
    batch = PackingCollator(loss_weights=True, **made.family.settings)([made.samples[:2], made.samples[2:]])
    plan, masks = batch["plan"], {}
    if made.family.attends:
        masks["attention_mask"] = {layer_type: plan.mask(attend).dense() for layer_type, attend in made.family.attends.items()}
    if made.family.suffix:
        prompts = [int((batch["token_type_ids"][plan.document_ids == number] == 0).sum()) for number in range(len(made.samples))]
        masks["attention_mask"] = IntervalMask.from_document_ids(plan.document_ids, prefix_lengths=prompts).dense()
    assert_as_alone(made, batch, **masks)
    assert_merged(made, batch)


@pytest.mark.parametrize("name", [name for name in processors.FAMILIES if name != "llava_onevision"])
def test_pieces_of_a_sample_are_samples(name):
    """Cut before, between and behind its images; a piece has the images that stand in it, and all pieces have all."""
    made = ready(name)
    form = SampleFormat(**{key: value for key, value in made.family.settings.items() if key in SampleFormat.__dataclass_fields__})
    collate = PackingCollator(**made.family.settings)
    for sample in made.samples:
        spans = form.spans(sample)
        cuts = sorted({0, *(start for start, _ in spans), form.size(sample).tokens})
        pieces = [form.cut(sample, start, stop) for start, stop in zip(cuts, cuts[1:])]
        assert sum(form.size(piece).images for piece in pieces) == form.size(sample).images
        whole, apart = collate([sample]), collate(pieces)
        for key in whole:
            if key.startswith(("pixel", "image", "video", "input_ids", "second")):
                torch.testing.assert_close(apart[key], whole[key], rtol=0, atol=0)
        assert_merged(made, apart)
        for start, stop in spans:
            if stop - start > 1:
                with pytest.raises(ValueError, match="cut through (image|video) 0"):
                    form.cut(sample, 0, spans[0][0] + 1)


def test_tiles_that_nobody_can_tell_apart_are_not_cut():
    """Images of one size each where there are several in a sample: batch_num_images of a piece would mean something else."""
    made = ready("llava_onevision")
    several = made.samples[2]
    with pytest.raises(ValueError, match="the sample: .* parts for 2 images"):
        SampleFormat(made.family.settings["image_token_id"]).cut(several, 0, 1)
