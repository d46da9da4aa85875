"""Which samples share a row: budgets, order, over-long samples, statistics."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlm_fuse
from benchmarks import generator
from checking import serving
from vlm_fuse import packing
from vlm_fuse.packing import splitting
from vlm_fuse.packing.best_fit import best_fit, by_hand

needs_kernel = pytest.mark.skipif(not vlm_fuse.backends()["cpu"].available, reason="no compiled module")


def numbers(high: int):
    return st.integers(0, high)


@st.composite
def problems(draw):
    """(needs, order, budgets) of up to four budgets, many samples alike."""
    budgets = draw(st.lists(st.integers(0, 30), min_size=1, max_size=4))
    rows = draw(st.lists(st.tuples(*(numbers(budget) for budget in budgets)), max_size=60))
    needs = np.asarray(rows, dtype=np.int64).reshape(-1, len(budgets))
    order = np.asarray(draw(st.permutations(range(len(rows)))), dtype=np.int64)
    return needs, order, tuple(budgets)


@pytest.mark.parametrize("asked", ["reference", "auto"])
@settings(max_examples=300)
@given(problems())
def test_best_fit_takes_the_row_with_the_fewest_tokens_left(asked, problem):
    needs, order, budgets = problem
    with serving(asked):
        rows = best_fit(needs, order, budgets)
    free: list[np.ndarray] = []
    for sample in order.tolist():
        fitting = [(left[0], row) for row, left in enumerate(free) if (left >= needs[sample]).all()]
        if not fitting:
            free.append(np.asarray(budgets))
        expected = min(fitting)[1] if fitting else len(free) - 1
        assert rows[sample] == expected
        free[expected] = free[expected] - needs[sample]


def test_kernel_agrees_with_the_definition_on_many_rows():
    rng = np.random.default_rng(0)
    needs = np.stack([rng.integers(0, 500, 4000), rng.integers(0, 3, 4000), rng.integers(0, 900, 4000), np.ones(4000, dtype=np.int64)], axis=1)
    order, budgets = rng.permutation(4000), (1000, 3, 1000, 7)
    assert np.array_equal(best_fit(needs, order, budgets), by_hand(needs, order, budgets))


@needs_kernel
@pytest.mark.parametrize("order", [[0, 0], [0, 2], [0, -1]])
def test_kernel_refuses_an_order_that_is_none(order):
    with pytest.raises(ValueError, match="not every sample once"), serving("cpu"):
        best_fit(np.ones((2, 1), dtype=np.int64), np.asarray(order, dtype=np.int64), (5,))


@needs_kernel
def test_kernel_refuses_a_sample_that_needs_more_than_a_row_has():
    with pytest.raises(ValueError, match="needs more"), serving("cpu"):
        best_fit(np.asarray([[6]], dtype=np.int64), np.zeros(1, dtype=np.int64), (5,))


@st.composite
def samples(draw):
    size = draw(st.integers(0, 40))
    column = lambda high: draw(st.lists(st.integers(0, high), min_size=size, max_size=size))  # noqa: E731
    limits = dict(max_images=draw(st.none() | st.integers(4, 9)), max_patches=draw(st.none() | st.integers(50, 99)), max_documents=draw(st.none() | st.integers(1, 5)))
    multiple = draw(st.sampled_from([1, 4]))
    arguments = dict(image_counts=column(4), patch_counts=column(50), multiple_of=multiple, rows_multiple_of=draw(st.integers(1, 4)), seed=draw(st.none() | st.integers(0, 3)))
    return column(100), {**arguments, **limits}


@settings(max_examples=200)
@given(samples())
def test_every_sample_stands_in_one_row_within_its_budgets(problem):
    lengths, given_ = problem
    rows = packing.pack_lengths(lengths, 100, **given_)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    multiple = given_["multiple_of"]
    for number, row in enumerate(rows):
        taken = [sum(-(-lengths[i] // multiple) * multiple for i in row), sum(given_["image_counts"][i] for i in row), sum(given_["patch_counts"][i] for i in row)]
        assert taken == [rows.tokens[number], rows.images[number], rows.patches[number]]
        limits = 100, given_["max_images"], given_["max_patches"], given_["max_documents"]
        assert all(limit is None or need <= limit for need, limit in zip([*taken, len(row)], limits))
    if len(lengths) >= given_["rows_multiple_of"] * -(-len(rows) // given_["rows_multiple_of"]):
        assert len(rows) % given_["rows_multiple_of"] == 0
    assert rows == packing.pack_lengths(np.asarray(lengths, dtype=np.int32), 100, **given_)
    again = pickle.loads(pickle.dumps(rows))
    assert again == rows and np.array_equal(again.patches, rows.patches) and again.statistics == rows.statistics


def joint(half: int) -> tuple[np.ndarray, dict]:
    """Half of the samples leave rows without images or without patches, the others need a little of both."""
    alternate, small = np.arange(half) % 2, np.ones(half, dtype=np.int64)
    lengths = np.concatenate([4100 + np.arange(half) % 1900, 10 * small])
    images, patches = (np.concatenate([first, small]) for first in (10 * alternate, 100 - 100 * alternate))
    return lengths, dict(image_counts=images, max_images=10, patch_counts=patches, max_patches=100)


@needs_kernel
@pytest.mark.parametrize("budgets", ["images and patches", "documents", "rows_multiple_of"])
def test_many_samples_under_budgets_that_bind(budgets):
    """Where looking at every open row would take the square of the samples; benchmarks/bench_packing.py has the speeds."""
    lengths, options = joint(50_000)
    if budgets == "documents":
        options = dict(max_documents=1)
    if budgets == "rows_multiple_of":
        lengths, options = lengths // 100, dict(rows_multiple_of=50_000)
    with serving("cpu"):
        rows = packing.pack_lengths(lengths, 8192, **options)
    assert sum(map(len, rows)) == 100_000 and rows.tokens.max() <= 8192
    assert rows.images.max() <= 10 and rows.patches.max() <= 100
    assert len(rows) == 100_000 if budgets == "documents" else len(rows) % 50_000 == 0 or budgets == "images and patches"


def test_a_seed_shuffles_rows_and_ties_and_is_the_same_again():
    lengths = np.random.default_rng(1).integers(1, 300, 500)
    plain, first, again, other = (packing.pack_lengths(lengths, 1000, seed=seed) for seed in (None, 1, 1, 2))
    assert first == again and first != other and first != plain
    assert abs(len(first) - len(plain)) <= 1
    longest = [max(lengths[i] for i in row) for row in plain]
    assert longest[:5] == sorted(longest, reverse=True)[:5] and [max(lengths[i] for i in row) for row in first][:5] != longest[:5]


def test_no_worse_than_first_fit_decreasing_on_training_data():
    drawn = generator.draw("finevision_native", 5000, seed=0)
    lengths = [sample.tokens for sample in drawn]
    rows = packing.pack_lengths(torch.tensor(lengths), 8192)
    assert len(rows) <= len(generator.first_fit_decreasing(lengths, 8192))
    assert rows.statistics.fill > 0.98


def test_statistics_count_what_a_padded_batch_would_have():
    rows = packing.pack_lengths([6, 4, 10, 3], 10)
    assert list(rows) == [[2], [0, 1], [3]]
    found = rows.statistics
    assert found == packing.PackStatistics(4, 3, 23, 23 / 30, 25, 1 - 23 / 25, 4 / 3, 2, 0)


def test_empty_and_zero_lengths():
    assert packing.pack_lengths([], 5) == [] and packing.pack_lengths([], 5).statistics.fill == 1.0
    assert sorted(i for row in packing.pack_lengths([0, 5, 0], 5) for i in row) == [0, 1, 2]


# --- over-long samples


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(lengths=[3, 11, 12]), r"sample 1 has 11 tokens, more than the 10 of a row \(2 samples in all do\); raise the budget"),
        (dict(lengths=[3, 4], image_counts=[0, 5], max_images=4), "sample 1 has 5 images, more than the 4 of a row; raise the budget, or choose overlong='skip'$"),
        (dict(lengths=[3, 4], patch_counts=[0, 5], max_patches=4), "sample 1 has 5 patches, more than the 4 of a row"),
        (dict(lengths=[3], max_documents=0), "max_documents: 0"),
    ],
)
def test_a_sample_that_fits_into_no_row_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        packing.pack_lengths(capacity=10, **arguments)


def test_a_document_padded_beyond_the_row_is_refused():
    assert packing.pack_lengths([5], 8, multiple_of=8) == [[0]]
    with pytest.raises(ValueError, match="sample 0 has 9 tokens"):
        packing.pack_lengths([9], 8, multiple_of=8)


def test_skipped_samples_are_reported():
    with pytest.warns(UserWarning, match="2 of 4 samples fit into no row and are left out, the first is 1"):
        rows = packing.pack_lengths([3, 11, 4, 12], 10, overlong="skip")
    assert rows == [[0, 2]] and rows.skipped == (1, 3) and rows.statistics.skipped == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packing.pack_lengths([3], 10, overlong="skip")


@settings(max_examples=200)
@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=8), st.integers(0, 60))
def test_a_split_never_cuts_an_image(capacity, parts, tail):
    """`parts`: text before an image, and the image."""
    spans, length = [], 0
    for text, image in parts:
        spans.append((length + text, length + text + image))
        length = spans[-1][1]
    length += tail
    if any(stop - start > capacity for start, stop in spans):
        with pytest.raises(ValueError, match=r"image \d+ alone has \d+ tokens, more than the"):
            splitting.split(length, spans, capacity)
        return
    pieces = splitting.split(length, spans, capacity)
    assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])] and pieces[-1][1] == length
    assert all(stop - start <= capacity for start, stop in pieces)
    assert all(not start < cut < stop for _, cut in pieces for start, stop in spans)


def test_pieces_of_split_samples_stand_in_rows():
    rows = packing.pack_lengths([4, 25, 3], 10, image_counts=[0, 2, 0], max_images=1, patch_counts=[0, 60, 0], max_patches=40, overlong="split", image_spans=[[], [(2, 8), (9, 12)], []])
    pieces = sorted(item for row in rows for item in row if isinstance(item, packing.Piece))
    assert pieces == [(1, 0, 9), (1, 9, 19), (1, 19, 25)]
    assert sorted(item for row in rows for item in row if isinstance(item, int)) == [0, 2]
    assert sorted(rows.patches.tolist(), reverse=True)[:2] == [40, 20] and rows.images.sum() == 2


def test_a_piece_beyond_another_budget_is_named():
    with pytest.raises(ValueError, match="tokens 0 to 9 of sample 0 has 2 images, more than the 1"):
        packing.pack_lengths([15], 10, image_counts=[2], max_images=1, overlong="split", image_spans=[[(0, 2), (3, 5), (9, 11)]])


def test_split_needs_to_know_where_images_stand():
    with pytest.raises(ValueError, match="image_spans: overlong='split' needs to know"):
        packing.pack_lengths([15], 10, overlong="split")
    with pytest.raises(ValueError, match="image_spans: 1 entries for 2 lengths"):
        packing.pack_lengths([15, 2], 10, overlong="split", image_spans=[[]])
    with pytest.raises(ValueError, match="sample 0, image 1 is tokens 1 to 3; spans are in order"):
        packing.pack_lengths([15], 10, overlong="split", image_spans=[[(0, 2), (1, 3)]])


def test_image_spans_with_marks_sizes_and_neighbours():
    assert packing.image_spans([], 9) == []
    assert packing.image_spans(torch.tensor([9, 9, 9, 9]), 9, image_sizes=[1, 0, 3]) == [(0, 1), (1, 4)]
    # end mark 8 then start mark 7 between two images
    assert packing.image_spans([7, 9, 8, 7, 9, 8, 1], 9, marks=(7, 8)) == [(0, 3), (3, 6)]
    # an image in two runs with a tag between stays one
    assert packing.image_spans([1, 7, 9, 7, 9, 2], 9, image_sizes=[2], marks=(7,)) == [(1, 5)]
    assert packing.image_spans([9, 6, 5], (9, 6)) == [(0, 2)]
    with pytest.raises(ValueError, match="1 images of 2 placeholders, but input_ids has 1"):
        packing.image_spans([9, 1], 9, image_sizes=[2])


# --- arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(lengths=[1.5]), TypeError, "lengths: expected whole numbers, got float64"),
        (dict(lengths=[True]), TypeError, "got bool"),
        (dict(lengths=[3, -1]), ValueError, "sample 1 has -1, below 0"),
        (dict(lengths=[[3]]), ValueError, "expected one number for each sample"),
        (dict(lengths=[3], image_counts=[1, 2]), ValueError, "image_counts: 2 numbers for 1 lengths"),
        (dict(lengths=[3], max_images=2), ValueError, "max_images: a budget of what nobody has counted; give image_counts"),
        (dict(lengths=[3], max_patches=2), ValueError, "max_patches: .* give patch_counts"),
        (dict(lengths=[3], capacity=0), ValueError, "capacity: expected a whole number of at least 1"),
        (dict(lengths=[3], capacity=2.5), ValueError, "capacity: expected a whole number"),
        (dict(lengths=[3], multiple_of=4), ValueError, "capacity: 10 is no multiple of multiple_of=4; take 8"),
        (dict(lengths=[3], overlong="cut"), ValueError, "overlong: unknown 'cut'; choose one of error, skip, split"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        packing.pack_lengths(**{"capacity": 10, **arguments})


def test_a_gpu_backend_does_not_count_for_lengths(monkeypatch):
    monkeypatch.setenv("VLM_FUSE_BACKEND", "cuda")
    assert packing.pack_lengths([3, 4], 10) == [[0, 1]]
