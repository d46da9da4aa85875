"""Packed rows of digit questions, and what each rank of a group computes on: its own rows, its part of every row, or all of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import vlm_fuse
from vlm_fuse import packing
from vlm_fuse.sharding import PlanShard

from .digit_questions import IDS, IMAGE, PATCH, ROWS, about_numbers, draw
from .parallel_vlm import RankBatch

LENGTH = 96  # tokens of a row: every way to cut it comes out even on 2 and 4 ranks
ROWS_A_STEP = 4  # of all ranks together
GRID = torch.tensor([[1, 4, 4]])  # a picture in patches of 2 x 2 pixels, of which 2 x 2 become one row


def make_rows(count: int, *, seed: int = 0) -> list[list[dict]]:
    """Rows of samples; every second one is text alone, so that of two ranks one has no picture."""
    pictures = [_sample(sample.text, sample.image) for sample in draw(count, seed)]
    rng = np.random.default_rng(seed)
    texts = [_sample(tuple(IDS[word] for word in about_numbers(rng))) for _ in range(count)]
    packed = []
    for samples in (pictures, texts):
        rows = packing.pack_lengths([len(sample["input_ids"]) for sample in samples], LENGTH - ROWS, seed=seed)  # room for the dummy picture
        packed.append([[samples[number] for number in row] for row in rows])
    return [row for both in zip(*packed) for row in both]


def _sample(text: tuple[int, ...], image: Tensor | None = None) -> dict:
    """As a processor of Qwen2.5-VL's kind gives it; the answer is learnt."""
    ids = (IMAGE,) * (0 if image is None else ROWS) + text
    sample = {"input_ids": list(ids), "labels": [-100] * (len(ids) - 1) + [ids[-1]]}
    return sample if image is None else {**sample, "pixel_values": image.reshape(ROWS * 4, -1), "image_grid_thw": GRID}


_collate = packing.PackingCollator(image_token_id=IMAGE, length=LENGTH, mrope=True, dummy_image=_sample((), torch.zeros(ROWS, PATCH * PATCH)))


def collated(rows: list[list[dict]], dtype: torch.dtype = torch.float32) -> dict:
    """A batch of whole rows, with its plan; a batch without a picture gets a dummy."""
    batch = _collate(rows)
    batch["pixel_values"] = batch["pixel_values"].to(dtype).view(-1, ROWS, PATCH * PATCH)
    return batch


def whole(batch: dict) -> RankBatch:
    """Rows of its own: one process alone, and data parallel ranks."""
    plan = batch["plan"]
    return RankBatch(batch["input_ids"], plan, batch["pixel_values"], batch["position_ids"][1:], plan.shift_labels, _attend(plan.mask()))


def in_context(batch: dict, mesh: DeviceMesh, order: str = "zigzag") -> RankBatch:
    """A part of every row (context parallelism): this rank embeds, merges and predicts its rows alone, and runs the tower for the
    pictures in them; keys and values are gathered, the batch never is."""
    shard = batch["plan"].shard(mesh.get_local_rank(), mesh.size(), order=order, features="own")
    pictures = batch["pixel_values"][list(shard.images[0])]
    if not len(pictures):  # every rank runs the tower
        pictures = torch.zeros_like(batch["pixel_values"][:1])
    own = _attend(shard.mask())

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return own(q, *_gathered(torch.stack([k, v]), 3, mesh, shard))

    return RankBatch(shard.input_ids, shard, pictures, shard.slice(batch["position_ids"][1:], -1), shard.shift_labels, attend)


def _gathered(rows: Tensor, dim: int, mesh: DeviceMesh, shard: PlanShard) -> Tensor:
    """The rows of all ranks in the order of the whole; in the backward each rank's are summed over those who have used them."""
    local = DTensor.from_local(rows, mesh, [Shard(dim)], run_check=False)
    return shard.restore(local.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()]), dim)


def in_sequence(batch: dict, mesh: DeviceMesh) -> RankBatch:
    """Heads and vocabulary shared out (tensor parallelism), and between the layers the sequence: each rank merges its part of it.

    The embedding looks up the ids of whole rows, each rank those in its part of the vocabulary, and leaves the rank its part of the rows.
    """
    plan = batch["plan"]
    shard = plan.shard(mesh.get_local_rank(), mesh.size())

    def replicated(features: Tensor) -> Tensor:
        """Every rank has all features and reads some; a row's gradient is the sum over ranks."""
        return DTensor.from_local(features, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])

    positions, labels = batch["position_ids"][1:], plan.shift_labels
    return RankBatch(batch["input_ids"], shard, batch["pixel_values"], positions, labels, _attend(plan.mask()), replicated)


def _attend(mask: vlm_fuse.IntervalMask):
    return lambda q, k, v: vlm_fuse.attention(q, k, v, mask)


def label_count(batch: dict) -> Tensor:
    return (batch["plan"].shift_labels != -100).sum()
