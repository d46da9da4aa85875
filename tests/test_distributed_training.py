"""Steps shared out over ranks (examples/train_distributed.py): losses and gradients are those of one process."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # torchrun runs this file as a script

import vlm_fuse  # noqa: E402
from ranks import run_on_ranks  # noqa: E402

try:
    from examples import parallel_batches, parallel_vlm, train_distributed
except ImportError as missing:  # scikit-learn, for the digits
    pytest.skip(str(missing), allow_module_level=True)

WAYS = {2: ("ddp", "fsdp", "context", "context_contiguous", "tensor", "fused_lookup"), 4: ("ddp", "context", "tensor", "fsdp_context")}
STEPS = 2


class FusedLookup(parallel_vlm.ParallelVLM):
    """Reads its embedding's weight inside merge, where FSDP2 has gathered it with the rest of the root."""

    def forward(self, batch):
        text = lambda ids: vlm_fuse.merge(ids, weight=self.text.weight, plan=vlm_fuse.plan(ids)).inputs_embeds  # noqa: E731
        own, self.text.forward = self.text.forward, text
        try:
            return super().forward(batch)
        finally:
            self.text.forward = own


def fused_lookup() -> train_distributed.Parallel:
    def wrap(model):
        model.__class__ = FusedLookup
        for layer in model.layers:
            fully_shard(layer)
        return fully_shard(model)

    return train_distributed.parallel("fsdp")._replace(wrap=wrap)


def differences(found, expected) -> dict:
    losses, gradients = found
    return dict(
        loss=max(abs(one - other) for one, other in zip(losses, expected[0])),
        gradient=max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(gradients, expected[1])),
        parameters=len(gradients),
    )


def refused(call) -> str:
    try:
        call()
    except TypeError as error:
        return str(error)
    return "not refused"


def dtensors() -> dict:
    """What is said to tensors that are spread over ranks, by argument."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ids = torch.tensor([[1, 9, 9, 2]])
    text, rows, weight, heads = torch.randn(1, 4, 8), torch.randn(2, 8), torch.randn(12, 8), torch.randn(1, 4, 4, 8)
    plan = vlm_fuse.plan(ids, image_token_id=9)

    def spread(tensor, placement=None):
        return distribute_tensor(tensor, mesh, [placement or Replicate()])

    given = dict(image_token_id=9)
    return {
        "inputs_embeds": refused(lambda: vlm_fuse.merge(ids, spread(text, Shard(1)).requires_grad_(), rows, **given)),
        "inputs_embeds with a plan": refused(lambda: vlm_fuse.merge(ids, spread(text, Shard(1)), rows, plan=plan)),
        "image_embeds": refused(lambda: vlm_fuse.merge(ids, text, spread(rows).requires_grad_(), plan=plan)),
        "image_embeds of a list": refused(lambda: vlm_fuse.merge(ids, text, [spread(rows)], **given)),
        "weight": refused(lambda: vlm_fuse.merge(ids, weight=spread(weight, Shard(0)).requires_grad_(), image_embeds=rows, **given)),
        "input_ids": refused(lambda: vlm_fuse.plan(spread(ids), **given)),
        "input_ids of merge": refused(lambda: vlm_fuse.merge(spread(ids), text, rows, **given)),
        "attention_mask": refused(lambda: vlm_fuse.merge(ids, text, rows, attention_mask=spread(torch.ones_like(ids)), layout="packed", **given)),
        "labels": refused(lambda: vlm_fuse.merge(ids, text, rows, labels=spread(ids), **given)),
        "labels of a plan": refused(lambda: vlm_fuse.merge(ids, text, rows, labels=spread(ids), plan=plan)),
        "document_ids": refused(lambda: vlm_fuse.plan(ids, document_ids=spread(torch.zeros_like(ids)), **given)),
        "document_ids of a mask": refused(lambda: vlm_fuse.IntervalMask.from_document_ids(spread(torch.zeros_like(ids)))),
        "mm_token_type_ids": refused(lambda: vlm_fuse.mrope_position_ids(spread(torch.zeros_like(ids)))),
        "q": refused(lambda: vlm_fuse.attention(spread(heads, Shard(1)), heads, heads, plan.mask())),
        "hidden_states": refused(lambda: vlm_fuse.add_features(spread(text, Shard(1)), rows, plan)),
        "rows": refused(lambda: vlm_fuse.merge(ids, text, rows, **given).unpack(spread(text))),
    }


def rows_of_ranks() -> list[dict]:
    """What each rank of a group merges and sees of the pictures."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    batch = parallel_batches.collated(parallel_batches.make_rows(100)[: parallel_batches.ROWS_A_STEP])
    mine = parallel_batches.in_context(batch, mesh)
    facts = dict(merged=list(mine.plan.source_index.shape), whole=list(batch["plan"].source_index.shape), embedded=list(mine.embed_ids.shape), pictures=len(mine.patches))
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, facts | dict(all_pictures=len(batch["pixel_values"])))
    return found


def work(folder: str) -> None:
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    settings = dict(steps=STEPS, dtype=torch.float64)
    expected = train_distributed.train(train_distributed.parallel("alone"), **settings)
    found = {}
    for name in WAYS[ranks]:
        how = fused_lookup() if name == "fused_lookup" else train_distributed.parallel(name)
        found[name] = differences(train_distributed.train(how, **settings), expected)
    report = dict(ways=found, rows=rows_of_ranks(), dtensors=dtensors(), losses=expected[0], parameters=len(expected[1]))
    if dist.get_rank() == 0:
        with open(os.path.join(folder, "found.json"), "w") as file:
            json.dump(report, file)
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=WAYS, ids="{} ranks".format)
def found(request, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(__file__, folder, request.param)
    return json.loads((folder / "found.json").read_text()) | dict(ranks=request.param)


def test_losses_and_gradients_are_those_of_one_process(found):
    assert set(found["ways"]) == set(WAYS[found["ranks"]]) and found["losses"][0] != found["losses"][1] and found["parameters"] > 20
    for name, apart in found["ways"].items():
        assert apart["parameters"] == found["parameters"], name
        assert apart["loss"] < 1e-12 and apart["gradient"] < 1e-10, (name, apart)


def test_each_rank_merges_its_slice_alone(found):
    """Rows, embeddings and the pictures that the tower sees: a rank's own, together little more than the whole's."""
    ranks, rows = found["ranks"], found["rows"]
    for facts in rows:
        G, W = facts["whole"]
        assert facts["merged"] == facts["embedded"] == [G, W // ranks]
        assert facts["pictures"] < facts["all_pictures"]
    assert sum(facts["pictures"] for facts in rows) <= rows[0]["all_pictures"] + 2 * ranks * rows[0]["whole"][0]


def test_dtensors_are_refused(found):
    assert len(found["dtensors"]) == 16
    for name, words in found["dtensors"].items():
        argument = name.split()[0]
        assert words.startswith(f"{argument}: is a DTensor over {found['ranks']} ranks"), (name, words)
        assert "plan.shard" in words and ("embedding(input_ids)" if name == "weight" else ".to_local()") in words


def test_one_rank_alone_is_the_whole():
    """What every way is held against, in this process: without torch.distributed."""
    losses, gradients = train_distributed.train(train_distributed.parallel("alone"), 2)
    assert losses[1] < losses[0] and all(torch.isfinite(gradient).all() for gradient in gradients)


if __name__ == "__main__":
    work(sys.argv[1])
