"""The loss of a step and of each sample in it, and whether it is what the sample gets alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.generator import IGNORE_INDEX

TOLERANCE = 2e-5  # relative, in float32
HALF_TOLERANCE = 2e-2  # relative, of what runs in bfloat16 alone


class Predictions(NamedTuple):
    """What a forward gives. Row i of the logits predicts the label of row i + 1."""

    logits: Tensor  # (G, W, V)
    labels: Tensor  # (G, W), -100 where there is nothing to learn
    samples: Tensor  # (G, W) number of the sample, -1 at padding


def summed(found: Predictions) -> Tensor:
    """The loss of all answers, summed. Every row has logits, as in nanoVLM and transformers, also where nothing is learnt."""
    return F.cross_entropy(found.logits.flatten(0, 1).float(), _following(found.labels).flatten().long(), ignore_index=IGNORE_INDEX, reduction="sum")


@torch.no_grad()
def of_samples(found: Predictions, count: int) -> Tensor:
    """The mean loss of each sample, ``(count,)`` float64.

    Example:
        >>> import torch
        >>> from benchmarks.throughput.losses import Predictions, of_samples
        >>> found = Predictions(torch.zeros(1, 4, 8), torch.tensor([[-100, 3, -100, 5]]), torch.tensor([[0, 0, 1, 1]]))
        >>> of_samples(found, 2).mul(1000).round().tolist()
        [2079.0, 2079.0]
    """
    following = _following(found.labels).flatten().long()
    each = F.cross_entropy(found.logits.flatten(0, 1).float(), following, ignore_index=IGNORE_INDEX, reduction="none").double()
    learnt = following != IGNORE_INDEX
    # the sample of the answer, not of the row before it
    numbers = _following(found.samples).flatten().long()[learnt]
    totals = each.new_zeros(count).index_add_(0, numbers, each[learnt])
    return totals / each.new_zeros(count).index_add_(0, numbers, torch.ones_like(each[learnt]))


def difference(losses: Tensor, wanted: Tensor) -> float:
    """The largest difference of a sample's loss from the one wanted, relative to it."""
    return float(((losses - wanted).abs() / wanted).max())


def _following(rows: Tensor) -> Tensor:
    """Each row's next one; behind the last there is none. Cheaper than logits without their last row, which are copied."""
    return F.pad(rows[:, 1:], (0, 1), value=IGNORE_INDEX)
