"""Patched models under DDP and FSDP2, patched before and after wrapping: two ranks under torchrun, with gloo."""

import json
import os
import sys

import pytest
import torch

pytest.importorskip("transformers", minversion="4.57")

from ranks import run_on_ranks  # noqa: E402
from tiny_llava import batch, llava, scatters, step  # noqa: E402
from vlm_fuse.integrations.transformers import patch, unpatch  # noqa: E402


def wrapped(model, how: str):
    if how == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)  # the tower runs to its last layer but one
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.model.language_model.embed_tokens, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run(model) -> tuple[float, list]:
    """Loss and gradients of one step on this rank's row, whole."""
    rank = torch.distributed.get_rank()
    given = batch()
    mine = {name: value[rank : rank + 1] for name, value in given.items()}  # one image each
    loss, _, *gradients = step(model, **mine)
    return float(loss), [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]


def work(folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    found = {}
    for how in ("ddp", "fsdp2"):
        expected = run(wrapped(llava(), how))
        for order in ("before", "after"):
            model = llava()
            if order == "before":
                patch(model)
            outer = wrapped(model, how)
            if order == "after":
                patch(outer)
            count = scatters(lambda outer=outer: run(outer))
            made = run(outer)
            unpatch(outer)
            left = scatters(lambda outer=outer: run(outer))
            equal = made[0] == expected[0] and all(map(torch.equal, made[1], expected[1])) and len(made[1]) == len(expected[1]) > 20
            found[f"{how} patched {order}"] = dict(equal=equal, scatters=count, unpatched=left)
    if torch.distributed.get_rank() == 0:
        with open(os.path.join(folder, "found.json"), "w") as file:
            json.dump(found, file)
    torch.distributed.destroy_process_group()


def test_two_ranks(tmp_path):
    run_on_ranks(__file__, tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 4
    for case, facts in found.items():
        assert facts == dict(equal=True, scatters=0, unpatched=1), case


if __name__ == "__main__":
    work(sys.argv[1])
