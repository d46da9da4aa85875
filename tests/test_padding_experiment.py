"""The padding experiment: its schemes hold the same samples, differ as they say, and what is written is what was measured."""

import json
import statistics
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from examples import padding_experiment  # noqa: E402
from examples.digit_questions import LONGEST, NUMBERS, ROWS, VOCABULARY, draw, guessing, load_digits  # noqa: E402
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
    asked = torch.zeros(batch.kinds.numel(), dtype=torch.bool)
    asked[batch.asks] = True
    for number in range(len(samples)):
        own = batch.samples == number
        kinds = batch.kinds[own]
        assert kinds[:ROWS].eq(1).all() and kinds[ROWS:].eq(0).all()
        # from the row before the answer, the last: from the answer's own row it could be read off
        assert asked.view_as(own)[own].nonzero().flatten().tolist() == [len(kinds) - 2]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_positions_run_on_where_they_say_so(scheme, samples, model):
    """Over padding in the legacy scheme, over neighbours without isolation; else every sample counts from 0."""
    batch = batch_of(scheme, model, doubled(samples))
    places = torch.arange(batch.kinds.shape[1]).expand_as(batch.kinds)
    real = batch.kinds >= 0
    if scheme in ("left", "left_seen", "not_isolated"):
        assert torch.equal(batch.position_ids[real], places[real])
    else:
        for number in range(len(samples)):
            own = batch.position_ids[batch.samples == number]
            assert own.tolist() == list(range(len(own)))
    # the table of learned positions is as long as the longest row, or scheme e would read past it
    assert int(batch.position_ids.max()) < CAPACITY


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


def test_guessing_goes_by_the_words_of_the_question_alone():
    """A question's usual answer, whatever the filler; one that was never seen is not guessed."""
    learnt = draw(4000, 1)
    assert guessing(learnt, draw(1000, 2, held_out=True)) == guessing(learnt, [sample._replace(image=None) for sample in draw(1000, 2, held_out=True)])
    assert 0.3 < guessing(learnt, draw(1000, 2, held_out=True)) < 0.55
    digits = [sample for sample in learnt if VOCABULARY[sample.text[-1]] in NUMBERS]
    others = [sample for sample in learnt if VOCABULARY[sample.text[-1]] not in NUMBERS]
    assert guessing(digits, others) == 0 and guessing(digits[:1], digits[:1]) == 1


def test_what_is_summed_up_is_what_the_seeds_gave():
    measured = padding_experiment.MEASURED
    runs = [
        dict(scheme="left", positions=positions, seed=seed, useful=0.5, **{name: (seed + number) / 16 for number, name in enumerate(measured)})
        for seed in (3, 1, 2) for positions in POSITIONS
    ]  # fmt: skip
    speed = [dict(scheme="left", positions=positions, tokens_per_second=1000.0, ratio=[0.9, 0.8, 1.0], seconds=[1.0]) for positions in POSITIONS]
    lines = padding_experiment.summary(runs, speed)
    assert [line["positions"] for line in lines] == list(POSITIONS)
    for line in lines:
        assert line["seeds"] == 3
        assert all(line[name] == [(2 + number) / 16, (1 + number) / 16, (3 + number) / 16] for number, name in enumerate(measured))
    # halfway, as_trained, alone, loss: 2, 3, 4, 5 sixteenths; the table begins with as_trained
    shown = "| 18.8 (12.5 to 25.0) | 25.0 (18.8 to 31.2) | 12.5 (6.2 to 18.8) | 0.312 (0.250 to 0.375) | 50 % | 1,000 | 0.90 (0.80 to 1.00) |"
    assert padding_experiment.table(lines).count(shown) == len(POSITIONS)


def test_the_files_hold_what_was_measured(tmp_path, capsys):
    padding_experiment.main(["--quick", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())
    written = (tmp_path / "results.md").read_text()
    assert len(found["runs"]) == len(SCHEMES) * len(POSITIONS) == len(found["summary"]) == len(found["speed"])
    rows = [line for line in written.splitlines() if line.startswith(tuple(f"| {positions} |" for positions in POSITIONS))]
    for line, timed, row in zip(found["summary"], found["speed"], rows, strict=True):
        (run,) = [run for run in found["runs"] if run["scheme"] == line["scheme"] and run["positions"] == line["positions"]]
        assert all(line[name] == [run[name]] * 3 for name in padding_experiment.MEASURED)
        cells = row.strip("| ").split(" | ")
        assert cells[:2] == [line["positions"], SCHEMES[line["scheme"]]]
        shown = [float(cell.split(" (")[0]) for cell in cells[2:6]]
        assert shown == pytest.approx([100 * run["as_trained"], 100 * run["alone"], 100 * run["halfway"], run["loss"]], abs=0.051)
        # the speed of each line is its own, and that of what it is compared with is 1
        assert cells[7] == f"{timed['tokens_per_second']:,.0f}" and (line["ratio"] == [1, 1, 1]) == (line["scheme"] == padding_experiment.BASE)
    tokens = sum(sample.tokens for sample in draw(padding_experiment.SAMPLES, 0))
    assert all(timed["tokens_per_second"] == pytest.approx(tokens / statistics.median(timed["seconds"])) for timed in found["speed"])
    assert f"commit: {found['environment']['commit']}" in written
    useful = {line["scheme"]: line["useful"] for line in found["summary"]}
    assert useful["packed"] == useful["not_isolated"] > useful["right"] == useful["placeholders"] > useful["left"]
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert SCHEMES["packed"] in capsys.readouterr().out


def test_the_page_shows_the_results_that_are_kept():
    """To the last digit: the table of the page is that of results.md, which is what results.json gives."""
    root = Path(__file__).parent.parent
    kept = root / "benchmarks" / "results" / "cpu-2026-11-27" / "padding_experiment"
    made = padding_experiment.table(json.loads((kept / "results.json").read_text())["summary"])
    assert made in (kept / "results.md").read_text()
    assert made.split("\n\n")[0] in (root / "docs" / "padding_experiment.md").read_text()


def test_a_run_is_the_same_again():
    assert padding_experiment.train("packed", "rope", 3, 4, 64) == padding_experiment.train("packed", "rope", 3, 4, 64)
