"""The generator of the benchmarks gives the lengths it promises, and batches that hold together."""

import numpy as np
import pytest

from benchmarks import generator
from benchmarks.presets import LOADS, PRESETS

# mean, p50, p90, p99 of the tokens of a sample, share of image rows, padding of a random batch in percent,
# fill of packed rows in percent, samples in a packed row. The stream of random numbers behind these figures is not
# known, hence the tolerances; the median of m4 lies in a gap (half its samples have at most two images).
CHECKS = {
    "cauldron_64": (247, 190, 479, 884, 0.29, 55, 98.6, 4.1),
    "cauldron_tiles": (1102, 979, 1603, 3246, 0.81, 43, 96.5, 3.6),
    "finevision_tiles": (1033, 956, 1962, 3547, 0.57, 54, 99.6, 3.9),
    "finevision_native": (777, 545, 1640, 4335, 0.36, 52, 99.3, 10.5),
    "finevision_gemma": (690, 469, 1384, 4014, 0.27, 65, 98.7, 11.7),
    "finevision_internvl": (1905, 1575, 3892, 8006, 0.73, 50, 99.2, 8.5),
    "llava_665k": (792, 742, 1099, 1687, 0.68, 43, 91.6, 2.4),
    "m4": (1493, 923, 4196, 4448, 0.90, 50, 98.6, 10.8),
    "molmo2_video": (4018, 2202, 9712, 11861, 0.81, 31, 99.3, 4.0),
}
MEDIAN_TOLERANCE = {"m4": 0.20}


@pytest.mark.parametrize("name", CHECKS)
def test_distribution_has_published_figures(name):
    mean, p50, p90, p99, share, padding, fill, per_row = CHECKS[name]
    distribution = generator.DISTRIBUTIONS[name]
    samples = generator.draw(name, 8192, seed=0)
    lengths = np.asarray([sample.tokens for sample in samples])
    assert lengths.max() <= distribution.row
    assert lengths.mean() == pytest.approx(mean, rel=0.06)
    assert np.percentile(lengths, 50) == pytest.approx(p50, rel=MEDIAN_TOLERANCE.get(name, 0.08))
    assert np.percentile(lengths, 90) == pytest.approx(p90, rel=0.06)
    assert np.percentile(lengths, 99) == pytest.approx(p99, rel=0.06)
    assert sum(sample.rows for sample in samples) / lengths.sum() == pytest.approx(share, abs=0.015)
    batches = lengths[: len(lengths) // distribution.batch * distribution.batch].reshape(-1, distribution.batch)
    wasted = 1 - batches.sum() / (batches.max(axis=1).sum() * distribution.batch)
    assert 100 * wasted == pytest.approx(padding, abs=2)
    rows = generator.first_fit_decreasing(lengths.tolist(), distribution.row)
    assert 100 * lengths.sum() / (len(rows) * distribution.row) == pytest.approx(fill, abs=1.5)
    assert len(lengths) / len(rows) == pytest.approx(per_row, rel=0.06)


def test_same_seed_same_samples():
    assert generator.draw("m4", 50, seed=3) == generator.draw("m4", 50, seed=3)
    assert generator.draw("m4", 50, seed=3) != generator.draw("m4", 50, seed=4)


def test_text_only_batches_occur():
    """At 35 % samples without images, one batch of two in eight."""
    samples = generator.draw("finevision_native", 8192, seed=0)
    text_only = [not sample.images for sample in samples]
    pairs = [a and b for a, b in zip(text_only[::2], text_only[1::2])]
    assert sum(pairs) / len(pairs) == pytest.approx(1 / 8, abs=0.02)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_holds_every_sample(side):
    preset = PRESETS["qwen2.5-vl-7b"]
    samples = generator.draw("finevision_native", 16, seed=1, longest=4096)
    batch = generator.padded(samples, preset, length=4096, seed=1, side=side)
    lengths = [sample.tokens for sample in samples]
    assert batch.attention_mask.sum(axis=1).tolist() == lengths
    edge = batch.attention_mask[:, 0 if side == "right" else -1]
    assert edge.all()
    placeholders = batch.input_ids == preset.image_token_id
    assert placeholders.sum(axis=1).tolist() == batch.feature_counts.tolist()
    assert placeholders.sum() == batch.image_sizes.sum() == batch.rows
    assert not (placeholders & ~batch.attention_mask).any()
    assert ((batch.labels == -100) | (batch.labels == batch.input_ids)).all()
    assert (batch.labels[placeholders] == -100).all()
    assert sum(batch.shares.values()) == pytest.approx(1)


def test_qwen_runs_stand_between_their_marks():
    preset = PRESETS["qwen2.5-vl-7b"]
    (start,), (end,) = preset.marks
    samples = [s for s in generator.draw("finevision_native", 64, seed=2) if s.images]
    batch = generator.padded(samples, preset, length=None, seed=2)
    ids = batch.input_ids
    placeholder = ids == preset.image_token_id
    first = placeholder & ~np.pad(placeholder, ((0, 0), (1, 0)))[:, :-1]
    last = placeholder & ~np.pad(placeholder, ((0, 0), (0, 1)))[:, 1:]
    assert first.sum() == last.sum() == len(batch.image_sizes)
    assert (np.roll(ids, 1, axis=1)[first] == start).all()
    assert (np.roll(ids, -1, axis=1)[last] == end).all()


def test_tiles_stand_behind_their_tags():
    preset = PRESETS["nanovlm-450m"]
    sample = generator.Sample(10, (generator.Image((64,) * 5, 1, 0),))
    ids, labels = generator.tokens(sample, preset, np.random.default_rng(0))
    assert len(ids) == len(labels) == sample.tokens == 10 + 5 * 65
    tags = np.flatnonzero(ids == preset.marks[0][0])
    assert len(tags) == 5
    for tag in tags:
        assert (ids[tag + 1 : tag + 65] == preset.image_token_id).all()


def test_packed_rows_number_their_documents():
    preset = PRESETS["gemma3-4b"]
    samples = generator.draw("finevision_gemma", 64, seed=0, longest=4096)
    index = generator.first_fit_decreasing([s.tokens for s in samples], 4096)
    rows = [[samples[i] for i in row] for row in index]
    batch = generator.packed(rows, preset, length=4096, seed=0)
    for row, documents in zip(rows, batch.document_ids):
        lengths = np.bincount(documents[documents >= 0])
        assert lengths.tolist() == [sample.tokens for sample in row]
        assert (documents[lengths.sum() :] == -1).all()
    assert (batch.attention_mask == (batch.document_ids >= 0)).all()


def test_first_fit_decreasing_by_hand():
    assert generator.first_fit_decreasing([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]
    assert generator.first_fit_decreasing([], 10) == []
    assert generator.first_fit_decreasing([3], 10) == [[0]]
    with pytest.raises(ValueError, match="11"):
        generator.first_fit_decreasing([11], 10)


@pytest.mark.parametrize("load", [load for group in LOADS.values() for load in group.values()], ids=str)
def test_every_load_is_made_of_known_parts(load):
    assert load.preset in PRESETS
    assert load.distribution in generator.DISTRIBUTIONS
    preset = PRESETS[load.preset]
    rng = np.random.default_rng(0)
    for sample in generator.draw(load.distribution, 20, seed=0, longest=load.length):
        ids, _ = generator.tokens(sample, preset, rng)
        count = 0 if preset.image_token_id is None else sample.rows
        assert (ids == preset.image_token_id).sum() == count
        assert ids.min() >= 0


def test_text_never_contains_a_placeholder():
    for name, preset in PRESETS.items():
        ids, _ = generator.tokens(generator.Sample(20000, ()), preset, np.random.default_rng(0))
        assert ids.min() >= 0 and ids.max() < preset.vocab_size, name
        assert not np.isin(ids, [i for i in (preset.image_token_id, preset.video_token_id) if i is not None]).any(), name
