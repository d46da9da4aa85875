"""Rows for ranks, their datasets and samplers; a state saved and restored."""

import copy
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from vlm_fuse import packing
from vlm_fuse.packing.ranks import deal


def packed(samples: int = 200, seed: int = 0, **options):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 400, samples)
    patches = rng.integers(0, 2000, samples)
    return packing.pack_lengths(lengths, 1000, patch_counts=patches, seed=seed, **options)


def samplers(rows, world_size: int, **options):
    return [packing.RankSampler(rows, rank=rank, world_size=world_size, **options) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_rank_has_as_many_rows_and_none_is_lost_or_repeated(world_size):
    rows = packed(rows_multiple_of=world_size)
    own = [list(sampler) for sampler in samplers(rows, world_size)]
    assert {len(numbers) for numbers in own} == {len(rows) // world_size} == {len(sampler) for sampler in samplers(rows, world_size)}
    assert sorted(number for numbers in own for number in numbers) == list(range(len(rows)))


@settings(max_examples=100)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.integers(1, 6))
def test_a_step_holds_rows_of_like_work_and_totals_are_level(work, world_size):
    dealt = deal(np.asarray(work), world_size, seed=3)
    steps = np.asarray(work)[dealt]  # [ranks, steps]
    spread = (steps.max(axis=0) - steps.min(axis=0)).sum()
    # neighbours of a sorted list: all the steps together spread no more than the list does (the repeated rows once more)
    assert spread <= 2 * (max(work) - min(work))
    totals = steps.sum(axis=1)
    assert totals.max() - totals.min() <= max(work) - min(work)


def test_left_over_rows_are_repeated_or_dropped():
    work = np.asarray([5, 1, 4])
    assert deal(work, 2, seed=None).tolist() == [[0, 1], [2, 1]]
    assert deal(work, 2, seed=None, drop_last=True).tolist() == [[0], [2]]
    assert deal(np.asarray([5]), 4, seed=None).tolist() == [[0], [0], [0], [0]]
    rows = packing.pack_lengths([9, 8, 7], 10)
    assert [len(sampler) for sampler in samplers(rows, 2)] == [2, 2] == [len(list(sampler)) for sampler in samplers(rows, 2)]
    assert [len(sampler) for sampler in samplers(rows, 2, drop_last=True)] == [1, 1] == [len(list(s)) for s in samplers(rows, 2, drop_last=True)]


def test_epochs_differ_and_ranks_agree():
    rows = packed()
    first, second = samplers(rows, 2), samplers(rows, 2)
    for sampler in second:
        sampler.set_epoch(1)
    one, two = [list(sampler) for sampler in first], [list(sampler) for sampler in second]
    assert one != two and sorted(one[0] + one[1]) == sorted(two[0] + two[1])
    # the same steps, in another order
    assert sorted(zip(*one)) == sorted(zip(*two))


def test_rank_comes_from_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    sampler = packing.RankSampler(packed())
    assert (sampler.rank, sampler.world_size) == (1, 3)
    stream = packing.PackedStream(["a"], 5, sample_format=lambda word: packing.SampleSize(1))
    assert (stream.rank, stream.world_size) == (1, 3)


@pytest.mark.parametrize(("rank", "world_size", "message"), [(0, None, "give both"), (2, 2, "expected 0 to 1 of world_size=2, got 2"), (-1, 2, "got -1")])
def test_wrong_ranks(rank, world_size, message):
    with pytest.raises(ValueError, match=message):
        packing.RankSampler(packed(), rank=rank, world_size=world_size)


def test_state_goes_on_at_the_next_row():
    rows = packed()
    whole = list(packing.RankSampler(rows, rank=0, world_size=2))
    for stop in (0, 1, 5, len(whole)):
        sampler = packing.RankSampler(rows, rank=0, world_size=2)
        running = iter(sampler)
        head = [next(running) for _ in range(stop)]
        resumed = packing.RankSampler(rows, rank=0, world_size=2)
        resumed.load_state_dict(sampler.state_dict())
        assert resumed.state_dict() == sampler.state_dict()
        assert head + list(resumed) == whole
        assert list(resumed) == whole  # the epoch after


@pytest.mark.parametrize("changed", [dict(world_size=3), dict(samples=100), dict(packed_with=1), dict(seed=1), dict(drop_last=True)], ids=str)
def test_a_state_of_something_else_is_refused(changed):
    sampler = packing.RankSampler(packed(), rank=0, world_size=2)
    rows = packed(changed.pop("samples", 200), changed.pop("packed_with", 0))
    other = packing.RankSampler(rows, **{"rank": 0, "world_size": 2, **changed})
    with pytest.raises(ValueError, match="load_state_dict: the state is of"):
        other.load_state_dict(sampler.state_dict())


@pytest.mark.parametrize("told", [False, True], ids=["never", "set_epoch"])
@pytest.mark.parametrize(("workers", "drop_last", "persistent"), [(0, False, False), (2, True, False), (2, False, True)])
def test_a_state_of_the_start_or_the_end_of_an_epoch(workers, drop_last, persistent, told):
    """No epoch is empty, repeated or in the order of another, wherever torchdata's loader was asked."""
    StatefulDataLoader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    rows = packed(40)  # 8 rows: 4 for each rank, in batches of 3 and 1

    def epochs(loader, first):
        for epoch in range(first, 3):
            if told:
                loader.sampler.set_epoch(epoch)
            yield epoch, iter(loader)

    def make():
        sampler = packing.RankSampler(rows, rank=0, world_size=2)
        return StatefulDataLoader(
            range(len(rows)), sampler=sampler, batch_size=3, drop_last=drop_last, num_workers=workers, collate_fn=list, persistent_workers=persistent
        )

    whole = {epoch: list(batches) for epoch, batches in epochs(make(), 0)}
    assert [len(batches) for batches in whole.values()] == [2 - drop_last] * 3 and (whole[1] != whole[0]) == told
    for stop in (0, 1, 2 - drop_last, 9):
        loader = make()
        for epoch, batches in epochs(loader, 0):
            head = list(islice(batches, stop if epoch else None))
            if epoch:
                break
        state = copy.deepcopy(loader.state_dict())
        resumed = make()
        resumed.load_state_dict(state)
        found = {epoch: list(batches) for epoch, batches in epochs(resumed, 1 if stop < 9 else 2)}
        assert stop == 9 or head + found.pop(1) == whole[1]
        assert found == {2: whole[2]}


def test_rows_that_nobody_packed_are_refused():
    with pytest.raises(TypeError, match="rows: expected what pack_lengths gave"):
        packing.RankSampler([[0], [1]], rank=0, world_size=1)


# --- datasets of rows


class Words:
    def __init__(self, lengths):
        self.lengths, self.fetched = lengths, []

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        self.fetched.append(index)
        return {"input_ids": [index + 1] * int(self.lengths[index])}


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_through_a_data_loader_are_the_same_with_any_number_of_workers(workers):
    lengths = np.random.default_rng(0).integers(1, 50, 60)
    rows = packing.pack_lengths(lengths, 100, seed=0)
    dataset = packing.PackedDataset(Words(lengths), rows)
    loader = DataLoader(dataset, sampler=packing.RankSampler(rows, rank=0, world_size=1), batch_size=2, num_workers=workers, collate_fn=packing.PackingCollator(length=100))
    order, batches = list(packing.RankSampler(rows, rank=0, world_size=1)), list(loader)
    assert len(batches) == -(-len(rows) // 2)
    for number, batch in enumerate(batches):
        for row, tokens in zip(order[2 * number : 2 * number + 2], batch["input_ids"].tolist()):
            expected = [index + 1 for index in rows[row] for _ in range(lengths[index])]
            assert tokens == expected + [0] * (100 - len(expected))


def test_only_the_samples_of_a_row_are_fetched():
    words = Words([3, 5, 2])
    dataset = packing.PackedDataset(words, packing.pack_lengths(words.lengths, 5))
    assert len(dataset[1]) == 2 and words.fetched == [0, 2]


def test_pieces_are_cut_and_need_a_function_for_it():
    words = Words([4, 9])
    rows = packing.pack_lengths(words.lengths, 5, overlong="split", image_spans=[[], []])
    with pytest.raises(ValueError, match="cut: the rows have pieces of split samples"):
        packing.PackedDataset(words, rows)
    dataset = packing.PackedDataset(words, rows, packing.SampleFormat().cut)
    found = sorted(len(sample["input_ids"]) for number in range(len(dataset)) for sample in dataset[number])
    assert found == [4, 4, 5]
