"""Two ranks under torchrun, with gloo and workers: the same number of rows, no sample lost or repeated, resumed on both."""

import json
import os
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from packing_sources import CAPACITY, ByIndex, numbers, size_of
from ranks import run_on_ranks
from vlm_fuse.packing import PackedDataset, PackedStream, RankSampler, pack_lengths


def train(folder: str) -> None:
    """What each rank runs: an epoch by row numbers and one from a stream, each stopped once and resumed."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    torch.distributed.init_process_group("gloo")
    rank, samples = torch.distributed.get_rank(), ByIndex(200)
    rows = pack_lengths([size.tokens for size in samples.sizes], CAPACITY, patch_counts=[size.patches for size in samples.sizes], rows_multiple_of=2, seed=0)

    def by_rows():
        return StatefulDataLoader(PackedDataset(samples, rows), sampler=RankSampler(rows), batch_size=1, num_workers=1, collate_fn=only)

    def by_stream():
        stream = PackedStream(samples, CAPACITY, sample_format=size_of, buffer_size=16)
        return StatefulDataLoader(stream, batch_size=None, num_workers=2)

    found = {}
    for name, make in (("rows", by_rows), ("stream", by_stream)):
        loader = make()
        running = iter(loader)
        seen = numbers(next(running) for _ in range(7))
        state = loader.state_dict()
        del running
        resumed = make()
        resumed.load_state_dict(state)
        seen += numbers(resumed)
        everyone = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, seen)
        found[name] = everyone
    found["work"] = [[sum(samples.sizes[i].patches for i in row) for row in own] for own in found["rows"]]
    if rank == 0:
        with open(os.path.join(folder, "found.json"), "w") as file:
            json.dump(found, file)
    torch.distributed.destroy_process_group()


def only(batch):
    return batch[0]


def test_two_ranks_share_every_sample(tmp_path):
    pytest.importorskip("torchdata")
    run_on_ranks(__file__, tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    for name in ("rows", "stream"):
        assert sorted(number for own in found[name] for row in own for number in row) == list(range(200))
    first, second = found["rows"]
    assert len(first) == len(second)
    # one process that takes both ranks' rows sees the same
    samples = ByIndex(200)
    rows = pack_lengths([size.tokens for size in samples.sizes], CAPACITY, patch_counts=[size.patches for size in samples.sizes], rows_multiple_of=2, seed=0)
    for rank, own in enumerate(found["rows"]):
        loader = DataLoader(PackedDataset(samples, rows), sampler=RankSampler(rows, rank=rank, world_size=2), batch_size=1, collate_fn=only)
        assert own == numbers(loader)
    # ranks wait for each other at every step: what they wait is little beside what they do
    waited = sum(abs(one - other) for one, other in zip(*found["work"]))
    assert waited < 0.1 * sum(map(sum, found["work"]))


if __name__ == "__main__":
    train(sys.argv[1])
