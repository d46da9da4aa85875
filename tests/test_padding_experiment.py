"""The padding experiment: its schemes hold the same samples, differ as they say, and what is written is what was measured."""

import json
import statistics

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from examples import padding_experiment  # noqa: E402
from examples.digit_questions import LONGEST, NUMBERS, ROWS, VOCABULARY, draw, load_digits  # noqa: E402
from examples.padding_schemes import CAPACITY, SCHEMES, batch_of  # noqa: E402
from examples.small_vlm import POSITIONS, SmallVLM  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def samples():
    return draw(24, 0)


@pytest.fixture(params=POSITIONS)
def model(request):
    torch.manual_seed(0)
    return SmallVLM(request.param, CAPACITY).double()


def doubled(samples):
    return [sample._replace(image=sample.image.double()) for sample in samples]


def test_samples_are_what_they_say(samples):
    assert len({sample.tokens for sample in samples}) > 8 and max(len(sample.text) for sample in draw(4000, 1)) <= LONGEST
    words = [[VOCABULARY[token] for token in sample.text] for sample in samples]
    for sample, text in zip(samples, words):
        assert sample.image.shape == (ROWS, 16) and text[-2] == "<answer>" and text[-3] == "?"
    pixels, labels = load_digits(False)
    other, _ = load_digits(True)
    assert len(pixels) == 1400 and len(other) == 397
    digit = {image.reshape(2, 4, 2, 4).transpose(0, 2, 1, 3).tobytes(): label for image, label in zip(pixels, labels)}
    for sample, text in zip(samples, words):
        label = digit[sample.image.numpy().tobytes()]
        if "even" in text:
            assert text[-1] == ("yes" if label % 2 == 0 else "no")
        elif "than" in text:
            assert text[-1] == ("yes" if label > NUMBERS.index(text[text.index("than") + 1]) else "no")
        else:
            assert text[-1] == NUMBERS[label]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_batch_holds_every_sample_once_and_in_order(scheme, samples, model):
    batch = batch_of(scheme, model, doubled(samples))
    assert batch.useful == sum(sample.tokens for sample in samples) == int((batch.kinds >= 0).sum())
    assert int((batch.kinds == 1).sum()) == ROWS * len(samples)
    owner = batch.samples.flatten()[batch.asks]
    assert sorted(owner.tolist()) == list(range(len(samples)))
    # packed rows have the samples in another order, and the answers with them
    assert sorted(batch.answers.tolist()) == sorted(sample.text[-1] for sample in samples)
    for number in range(len(samples)):
        kinds = batch.kinds[batch.samples == number]
        assert kinds[:ROWS].eq(1).all() and kinds[ROWS:].eq(0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_padding_stands_between_image_and_text_in_the_legacy_scheme_alone(scheme, samples, model):
    batch = batch_of(scheme, model, doubled(samples))
    between = 0
    for kinds, number in zip(batch.kinds, batch.samples):
        for own in number.unique().tolist():
            if own < 0:
                continue
            places = (number == own).nonzero()[:, 0]
            between += int((kinds[places[0] : places[-1]] < 0).sum())
    assert (between > 0) == scheme.startswith("left")


@torch.no_grad()
def test_each_scheme_computes_what_it_says(samples, model):
    """Alone, right padded, placeholders and packed are the same numbers; what comes between, or leaks, is not."""
    samples = doubled(samples)
    alone = torch.cat([padding_experiment.logits_of(model, batch_of("placeholders", model, [sample])) for sample in samples])

    def apart(scheme):
        batch = batch_of(scheme, model, samples)
        found = padding_experiment.logits_of(model, batch)
        if scheme in ("packed", "not_isolated"):
            order = torch.empty(len(samples), dtype=torch.int64)
            order[list(packed_order(samples))] = torch.arange(len(samples))
            found = found[order]
        return float((found - alone).abs().max())

    assert max(apart(scheme) for scheme in ("right", "placeholders", "packed")) < 1e-5  # rope's angles are float32
    assert min(apart(scheme) for scheme in ("left", "left_seen", "not_isolated")) > 1e-2


def packed_order(samples):
    from vlm_fuse.packing import pack_lengths

    return (number for row in pack_lengths([sample.tokens for sample in samples], CAPACITY) for number in row)


def test_the_files_hold_what_was_measured(tmp_path, capsys):
    padding_experiment.main(["--quick", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found["runs"]) == len(SCHEMES) * len(POSITIONS) == len(found["summary"])
    for line in found["summary"]:
        own = [run for run in found["runs"] if run["scheme"] == line["scheme"] and run["positions"] == line["positions"]]
        assert line["alone"] == [statistics.mean([run["alone"] for run in own]), min(run["alone"] for run in own), max(run["alone"] for run in own)]
        assert f"{100 * line['alone'][0]:.1f} (" in (tmp_path / "results.md").read_text()
    useful = {line["scheme"]: line["useful"] for line in found["summary"]}
    assert useful["packed"] == useful["not_isolated"] > useful["right"] == useful["placeholders"] > useful["left"]
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert SCHEMES["packed"] in capsys.readouterr().out


def test_a_run_is_the_same_again():
    assert padding_experiment.train("packed", "rope", 3, 4, 64) == padding_experiment.train("packed", "rope", 3, 4, 64)
