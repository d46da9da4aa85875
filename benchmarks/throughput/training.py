"""One optimizer step over the micro-batches of a load, and the losses of its samples."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import losses
from .samples import Load, Micro
from .sections import Part
from .ways import Way

LEARNING_RATE = 1e-5  # many steps on the same samples, contestants in turn on the same weights


def computing(device: str, dtype: torch.dtype):
    """Autocast, as nanoVLM trains; nothing where weights and products are of float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype)


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def step_of(way: Way, optimizer: torch.optim.Optimizer, load: Load, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """A training step of a contestant: every micro-batch forward and backward, then AdamW. The host reads nothing.

    The loss is the mean over the answers of the whole step, so that all contestants have the same gradients.
    """
    answers = sum(micro.answers for micro in load.micros)

    def step() -> None:
        optimizer.zero_grad()
        for micro in load.micros:
            with computing(device, dtype):
                loss = losses.summed(way.forward(micro)) / answers
            loss.backward()
        with Part("optimizer"):
            optimizer.step()

    return step


@torch.no_grad()
def losses_of(way: Way, micros: list[Micro], device: str, dtype: torch.dtype) -> Tensor:
    """The mean loss of every sample, ``(samples,)`` float64, in the order of the micro-batches."""
    if way.prepare is not None:
        way.prepare()
    found = []
    for micro in micros:
        with computing(device, dtype):
            found.append(losses.of_samples(way.forward(micro), len(micro.samples)))
    return torch.cat(found).cpu()
