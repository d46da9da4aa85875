"""Packed, merged training steps on several ranks, each beside the same steps in one process.

    python -m examples.train_distributed                       two ranks on this machine, every way to share the work out
    python -m examples.train_distributed --parallel context    one of them
    torchrun --nproc-per-node 4 -m examples.train_distributed --parallel fsdp_context

ddp            every rank has rows of its own, DistributedDataParallel
fsdp           the same under FSDP2: fully_shard of the embedding, every layer and the rest
context        every rank has a part of each row (plan.shard, zigzag) and gathers keys and values
tensor         heads, MLP and vocabulary shared out, the sequence between the layers (parallelize_module)
fsdp_context   both: 2 ranks to a row, FSDP2 over all
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from .parallel_batches import ROWS_A_STEP, collated, in_context, in_sequence, label_count, make_rows, whole
from .parallel_vlm import HEADS, ParallelVLM


class Parallel(NamedTuple):
    """One way to share a step out among all ranks."""

    rows: tuple[int, int]  # (which share of the step's rows this rank has, of how many)
    batch: Callable  # what this rank computes on, of the collated rows
    wrap: Callable  # the model, shared out
    averages: int  # ranks over which gradients are averaged, so that the loss has to be as many times larger


def sharded(model: ParallelVLM, mesh: DeviceMesh) -> nn.Module:
    """FSDP2: the embedding's weight, each layer and the rest are gathered when they run."""
    for module in (model.text, *model.layers):
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model: ParallelVLM, mesh: DeviceMesh) -> nn.Module:
    """Megatron's plan on DTensor, the vision tower whole on every rank. Source: arXiv 2205.05198; torchtitan's plan for Llama."""
    layer = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)),
        **{f"attention.{name}": ColwiseParallel() for name in "qkv"},
        "attention.out": RowwiseParallel(output_layouts=Shard(1)),
        "mlp_norm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "mlp.up": ColwiseParallel(),
        "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
    }
    for one in model.layers:
        parallelize_module(one, mesh, layer)
    outside = {
        "text": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),  # rows of the vocabulary, then of the sequence
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, outside)


def parallel(name: str) -> Parallel:
    """The ways by name; process groups are made here, so every rank calls it."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if name == "alone":
        return Parallel((0, 1), whole, lambda model: model, 1)
    if name == "fsdp_context":
        mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "context"))
        all_ranks = mesh._flatten("all") if hasattr(mesh, "_flatten") else init_device_mesh("cpu", (ranks,))
        share = mesh["data"].get_local_rank(), mesh["data"].size()
        return Parallel(share, lambda batch: in_context(batch, mesh["context"]), lambda model: sharded(model, all_ranks), ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    own_rows = dist.get_rank(), ranks
    return {
        "ddp": lambda: Parallel(own_rows, whole, DistributedDataParallel, ranks),
        "fsdp": lambda: Parallel(own_rows, whole, lambda model: sharded(model, mesh), ranks),
        "context": lambda: Parallel((0, 1), lambda batch: in_context(batch, mesh), DistributedDataParallel, ranks),
        "context_contiguous": lambda: Parallel((0, 1), lambda batch: in_context(batch, mesh, "contiguous"), DistributedDataParallel, ranks),
        "tensor": lambda: Parallel((0, 1), lambda batch: in_sequence(batch, mesh), lambda model: tensor_parallel(model, mesh), 1),
    }[name]()


WAYS = ("ddp", "fsdp", "context", "context_contiguous", "tensor", "fsdp_context")


def train(how: Parallel, steps: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[list[float], list[torch.Tensor]]:
    """(the loss of each step, over the labels of all ranks; the gradients of the last step, whole).

    Every label of the step weighs the same, whichever rank it is on: a rank's losses are summed, and divided by the labels of all.
    """
    torch.manual_seed(seed)
    model = how.wrap(ParallelVLM().to(dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)  # parameters are of two kinds under tensor parallelism
    rows, losses = make_rows(400, seed=seed), []
    share, shares = how.rows
    for step in range(steps):
        mine = rows[step * ROWS_A_STEP : (step + 1) * ROWS_A_STEP][share::shares]
        batch = collated(mine, dtype)
        labels = label_count(batch).to(dtype)
        if shares > 1:
            dist.all_reduce(labels)
            labels *= shares / dist.get_world_size()  # ranks of one row count its labels once each
        optimizer.zero_grad()
        summed = model(how.batch(batch))
        (summed * how.averages / labels).backward()
        optimizer.step()
        losses.append(float(_over_ranks(summed.detach(), how) / labels))
    return losses, [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]


def _over_ranks(summed: torch.Tensor, how: Parallel) -> torch.Tensor:
    if how.averages > 1:  # ranks have different rows, or different parts of them
        dist.all_reduce(summed)
    return summed


def launch(ranks: int, arguments: list[str]) -> int:
    """This example again, under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "examples.train_distributed", *arguments]
    return subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parallel", choices=WAYS, nargs="*", default=None, help="default: all")
    parser.add_argument("--ranks", type=int, default=2, help="where it is not started by torchrun")
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", given.ranks))
    if ranks not in (2, 4):
        parser.error(f"--ranks: {ranks} do not share {ROWS_A_STEP} rows and {HEADS} heads evenly; take 2 or 4")
    if "RANK" not in os.environ:
        return launch(ranks, sys.argv[1:])
    dist.init_process_group("gloo")
    ways = given.parallel or WAYS
    expected, _ = train(parallel("alone"), given.steps)
    if dist.get_rank() == 0:
        print(f"{'one process':28} loss {expected[0]:.4f} -> {expected[-1]:.4f}")
    for name in ways:
        losses, _ = train(parallel(name), given.steps)
        difference = max(abs(loss - one) for loss, one in zip(losses, expected))
        if dist.get_rank() == 0:
            print(f"{name + f', {ranks} ranks':28} loss {losses[0]:.4f} -> {losses[-1]:.4f}   differs by at most {difference:.1e}", flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
