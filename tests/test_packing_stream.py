"""Rows from a stream with a buffer: the same under a seed, nothing lost or repeated, wherever it is stopped."""

import copy
import io
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks import generator
from packing_sources import CAPACITY, SOURCES, ByIndex, Resumable, Sticky, Stream, numbers, size_of
from vlm_fuse.packing import PackedStream, PackingCollator, SampleFormat, SampleSize


def stream_of(source, **options) -> PackedStream:
    return PackedStream(source, CAPACITY, **{"sample_format": size_of, "buffer_size": 40, "rank": 0, "world_size": 1, **options})


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("options", [{}, dict(max_images=4, max_patches=90, max_documents=3, multiple_of=8), dict(seed=None), dict(buffer_size=1)], ids=str)
def test_every_sample_comes_once_within_its_budgets(source, options):
    rows = list(stream_of(SOURCES[source](), **options))
    assert sorted(number for row in numbers(rows) for number in row) == list(range(300))
    multiple = options.get("multiple_of", 1)
    for row in rows:
        table = np.asarray([sample["size"] for sample in row])
        assert (-(-table[:, 0] // multiple) * multiple).sum() <= CAPACITY
        assert table[:, 1].sum() <= options.get("max_images", 999) and table[:, 2].sum() <= options.get("max_patches", 9999) and len(row) <= options.get("max_documents", 99)
    assert numbers(stream_of(SOURCES[source](), **options)) == numbers(rows)
    if options == {}:
        assert numbers(stream_of(SOURCES[source](), seed=1)) != numbers(rows)


def test_a_buffer_fills_rows_nearly_as_well_as_all_lengths_at_once():
    samples = generator.draw("finevision_native", 8000, seed=0)
    stream = PackedStream(samples, 8192, sample_format=lambda sample: SampleSize(sample.tokens), buffer_size=1024)
    rows = list(stream)
    assert sum(sample.tokens for sample in samples) / (len(rows) * 8192) > 0.98


def test_no_sample_waits_forever():
    """One that goes with no other leaves at the next packing but as many as there are older ones."""

    class Odd(ByIndex):
        def __init__(self):
            super().__init__(400)
            self.sizes = [SampleSize(33 if index == 0 else 32) for index in range(400)]

    rows = numbers(stream_of(Odd(), seed=None))
    assert [0] in rows[:25]


def test_with_sizes_given_a_sample_is_fetched_when_its_row_goes_out():
    source = ByIndex()
    rows = iter(stream_of(source, sizes=source.sizes))
    first = next(rows)
    assert sum(source.fetched.values()) == len(first)
    list(rows)
    assert set(source.fetched.values()) == {1}


def test_transform_is_applied_to_what_goes_out():
    rows = list(stream_of(ByIndex(), transform=lambda sample: sample["number"]))
    assert sorted(number for row in rows for number in row) == list(range(300))


def test_shuffle_reads_in_another_order_in_each_epoch():
    stream = stream_of(ByIndex(), shuffle=True)
    first = numbers(stream)
    stream.set_epoch(1)
    second = numbers(stream)
    assert first != second and numbers(stream_of(ByIndex())) not in (first, second)
    assert sorted(n for row in first for n in row) == sorted(n for row in second for n in row)


@pytest.mark.parametrize("source", SOURCES)
def test_repeat_begins_anew(source):
    rows = iter(stream_of(SOURCES[source](30), repeat=True, shuffle=source == "by_index"))
    counts = Counter(number for row in numbers(islice(rows, 200)) for number in row)
    # each came as often as there were epochs, but for those that wait in the buffer
    assert set(counts) == set(range(30)) and max(counts.values()) - min(counts.values()) < counts.total() / 30 / 4


@pytest.mark.parametrize("source", [[], [None], ByIndex(1), Stream(1)], ids=["empty", "filtered out", "another rank's", "another rank's, no index"])
def test_nothing_for_this_rank_ends_even_where_it_repeats(source):
    assert list(stream_of(source, repeat=True, rank=1, world_size=2)) == []


def test_only_over_long_samples_end_even_where_they_repeat():
    rows = iter(stream_of(ByIndex(20), repeat=True, overlong="skip", max_patches=0, sample_format=lambda sample: SampleSize(1, 0, 1)))
    assert list(rows) == [] and rows.skipped == 20


def test_an_iterable_with_a_length_is_no_source_by_index():
    class Sized(Stream):
        def __len__(self):
            return len(self.samples)

    assert numbers(stream_of(Sized())) == numbers(stream_of(Stream()))


def test_sizes_may_be_tokens_alone():
    tokens = np.asarray([size.tokens for size in ByIndex().sizes])
    rows = iter(stream_of(ByIndex(), sizes=tokens))
    assert numbers(rows) == numbers(stream_of(ByIndex(), sample_format=lambda sample: SampleSize(sample["size"].tokens)))
    next(rows := iter(stream_of(ByIndex(), sizes=tokens)))
    torch.save(rows.state_dict(), file := io.BytesIO())
    file.seek(0)
    assert torch.load(file, weights_only=True) == rows.state_dict()


def test_ranks_and_workers_share_the_samples():
    parts = [numbers(stream_of(ByIndex(), rank=rank, world_size=3)) for rank in range(3)]
    assert sorted(n for part in parts for row in part for n in row) == list(range(300))
    assert all(number % 3 == rank for rank, part in enumerate(parts) for row in part for number in row)


@pytest.mark.parametrize("source", SOURCES)
def test_workers_of_a_data_loader_lose_and_repeat_nothing(source):
    loaders = [DataLoader(stream_of(SOURCES[source]()), batch_size=None, num_workers=2, collate_fn=None) for _ in range(2)]
    first, second = (numbers(loader) for loader in loaders)
    assert first == second and sorted(n for row in first for n in row) == list(range(300))


def test_rows_reach_the_collator_in_batches():
    loader = DataLoader(stream_of(ByIndex(60), sample_format=SampleFormat()), batch_size=3, collate_fn=PackingCollator(length=CAPACITY))
    found = Counter(token for batch in loader for token in batch["input_ids"][batch["plan"].attention_mask].tolist())
    assert found == Counter({index: size.tokens for index, size in enumerate(ByIndex(60).sizes)})


# --- over-long samples


def test_over_long_samples():
    source = ByIndex(50)
    source.sizes[7] = SampleSize(65)
    with pytest.raises(ValueError, match="sample 7 of the source has 65 tokens, more than the 64 of a row"):
        list(stream_of(source))
    rows = iter(stream_of(source, overlong="skip"))
    with pytest.warns(UserWarning, match="sample 7 of the source fits into no row"):
        assert sorted(n for row in numbers(rows) for n in row) == [n for n in range(50) if n != 7] and rows.skipped == 1
    pieces = list(stream_of(source, sample_format=SampleFormat(), overlong="split"))
    lengths = [len(sample["input_ids"]) for row in pieces for sample in row if sample["number"] == 7]
    assert sorted(lengths) == [1, 64]
    with pytest.raises(ValueError, match="overlong: 'split' needs a SampleFormat"):
        stream_of(source, overlong="split")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(overlong="cut"), "overlong: unknown"), (dict(buffer_size=0), "buffer_size"), (dict(shuffle=True, seed=None), "seed: None and shuffle"),
        (dict(sizes=[]), "sizes: 0 for 300 samples"), (dict(max_images=-1), "max_images"), (dict(multiple_of=7), "capacity: 64 is no multiple"),
    ],
)  # fmt: skip
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        stream_of(ByIndex(), **options)
    with pytest.raises(ValueError, match="need a source by index"):
        stream_of(Stream(), shuffle=True)


# --- resuming


@pytest.mark.parametrize("options", [{}, dict(repeat=True, shuffle=True), dict(world_size=2, rank=1), dict(seed=None, buffer_size=7)], ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_resumed_rows_are_those_that_would_have_come(source, options):
    options = {name: value for name, value in options.items() if name != "shuffle" or source == "by_index"}

    def make():
        return stream_of(SOURCES[source](100), **options)

    rows = iter(make())
    whole = numbers(islice(rows, 90))
    for stop in (0, 1, 13, 30, 52, len(whole)):
        running = iter(make())
        head = numbers(islice(running, stop))
        state = pickle.loads(pickle.dumps(running.state_dict()))
        list(islice(running, 3))  # goes on after the state was taken
        resumed = iter(make())
        resumed.load_state_dict(state)
        # the state is one that can be saved and restored again at once
        assert resumed.state_dict() == state
        tail = numbers(islice(resumed, 90 - stop))
        assert head + tail == whole


def test_a_resumable_source_is_not_read_again():
    source = Resumable()
    rows = iter(stream_of(source))
    for _ in range(10):
        next(rows)
    state = rows.state_dict()
    again = Resumable()
    resumed = iter(stream_of(again))
    resumed.load_state_dict(state)
    list(resumed)
    assert again.opened_at == state["read"] > 40 and again.samples.fetched[0] == 0


@pytest.mark.parametrize("options", [dict(repeat=True), {}], ids=["repeated", "the next epoch"])
def test_a_resumed_source_begins_anew_at_its_beginning(options):
    stream = stream_of(Sticky(50), **options)
    whole = [*islice(stream, 60)]
    running = iter(stream)
    head = list(islice(running, 8))
    resumed = stream_of(Sticky(50), **options)
    rows = iter(resumed)
    rows.load_state_dict(running.state_dict())
    assert numbers(head) + numbers(islice(rows, 60 - 8)) == numbers(whole)
    assert numbers(islice(resumed, 60)) == numbers(whole)


def test_split_samples_are_resumed():
    def make():
        source = ByIndex(50)
        source.sizes[7], source.sizes[9] = SampleSize(150), SampleSize(90)
        return stream_of(source, sample_format=SampleFormat(), overlong="split", buffer_size=6)

    def lengths(rows):
        return [[(sample["number"], len(sample["input_ids"])) for sample in row] for row in rows]

    whole = lengths(make())
    for stop in range(len(whole)):
        running = iter(make())
        head = lengths(islice(running, stop))
        resumed = iter(make())
        resumed.load_state_dict(running.state_dict())
        assert head + lengths(resumed) == whole


def test_a_state_of_another_part_is_refused():
    state = iter(stream_of(ByIndex())).state_dict()
    with pytest.raises(ValueError, match="the state is of part 0 of 1 of the source, this is part 1 of 2; resume with as many ranks and workers"):
        iter(stream_of(ByIndex(), rank=1, world_size=2)).load_state_dict(state)
    for other in (stream_of(ByIndex(200)), stream_of(ByIndex(), shuffle=True), stream_of(Stream())):
        with pytest.raises(ValueError, match="the state is of a source of 300 samples, shuffled with seed None, this one has"):
            iter(other).load_state_dict(state)


# --- torchdata's loader


def loader_of(source: str, workers: int):
    StatefulDataLoader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    if source == "rows":
        from vlm_fuse.packing import PackedDataset, RankSampler, pack_lengths

        samples = ByIndex(100)
        rows = pack_lengths([size.tokens for size in samples.sizes], CAPACITY, seed=0)
        return StatefulDataLoader(
            PackedDataset(samples, rows), sampler=RankSampler(rows, rank=0, world_size=1), batch_size=1, num_workers=workers, collate_fn=first_of
        )
    return StatefulDataLoader(stream_of(SOURCES[source](100)), batch_size=None, num_workers=workers, collate_fn=None)


def first_of(batch):
    return batch[0]


@pytest.mark.parametrize(("source", "workers"), [("rows", 0), ("rows", 2), ("by_index", 0), ("by_index", 2), ("stream", 2), ("resumable", 2)])
def test_stateful_data_loader_loses_and_repeats_nothing(source, workers):
    whole = numbers(loader_of(source, workers))
    assert sorted(n for row in whole for n in row) == list(range(100))
    for stop in (1, 17):
        loader = loader_of(source, workers)
        running = iter(loader)
        head = numbers(islice(running, stop))
        state = copy.deepcopy(loader.state_dict())
        del running
        resumed = loader_of(source, workers)
        resumed.load_state_dict(state)
        assert head + numbers(resumed) == whole


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
from packing_sources import numbers
from test_packing_stream import loader_of
loader, done = loader_of("by_index", {workers}), []
if os.path.exists({path!r}):
    saved = torch.load({path!r}, weights_only=False)
    loader.load_state_dict(saved["loader"])
    done = saved["done"]
for row in loader:
    done.append(numbers([row])[0])
    if len(done) % 5 == 0:
        torch.save(dict(loader=loader.state_dict(), done=done), {path!r} + ".new")
        os.replace({path!r} + ".new", {path!r})
    if len(done) == {stop}:  # rows later than the last state that was saved, in the middle of the next
        os.kill(os.getpid(), signal.SIGKILL)
torch.save(dict(loader=None, done=done), {path!r})
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_program_goes_on_from_the_last_saved_state(tmp_path, workers):
    expected = numbers(loader_of("by_index", workers))
    path, tests = str(tmp_path / "state"), os.path.dirname(__file__)

    def run(stop):
        return subprocess.run([sys.executable, "-c", KILLED.format(tests=tests, path=path, stop=stop, workers=workers)], capture_output=True, text=True, timeout=120)

    assert run(13).returncode == -signal.SIGKILL
    assert len(torch.load(path, weights_only=False)["done"]) == 10
    found = run(-1)
    assert found.returncode == 0, found.stderr
    assert torch.load(path, weights_only=False)["done"] == expected
