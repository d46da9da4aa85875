"""The contestants' names, and what each is to the measurement."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .losses import Predictions
from .samples import Micro

STOCK = "stock, left padding"
MERGE_REPLACED = "stock, merge replaced"
RIGHT = "right padding"
MAXIMUM = "stock, padded to the model's maximum"
BY_VLM_FUSE = "packed, isolated, vlm_fuse.attention"
DENSE = "packed, isolated, dense mask"
FLEX = "packed, isolated, FlexAttention"
VARLEN = "packed, isolated, varlen"
NOT_ISOLATED = "packed, not isolated"

#: what a reader has to know of each, beside its name
WHAT = {
    STOCK: "as the project itself does it: padded on the left to the longest sample, its own merge, a dense mask made in every pass",
    MERGE_REPLACED: "the same with the merge by vlm_fuse (transformers: `patch(model)`, with its check, M-RoPE positions and DeepStack)",
    RIGHT: "the same with the padding on the right and no mask: causal attention keeps padding behind the samples from being seen",
    MAXIMUM: "as the first, padded to the length that the model takes at most",
    BY_VLM_FUSE: "one filled row, the samples kept apart by `vlm_fuse.attention`: on a CPU SDPA document by document",
    DENSE: "the same under a dense mask",
    FLEX: "the same by compiled FlexAttention under the mask's BlockMask",
    VARLEN: "the same by torch.nn.attention.varlen",
    NOT_ISOLATED: "the same row as if it were one text: causal, positions run on, samples see those before them",
}


class Way(NamedTuple):
    """One contestant: what it makes of a micro-batch."""

    name: str
    layout: str  # the layout of samples.Micro whose rows it computes
    forward: Callable[[Micro], Predictions] | None
    why_not: str | None = None  # why it does not run here
    prepare: Callable[[], None] | None = None  # untimed, before each step
    half_only: bool = False  # does not take float32

    @property
    def isolated(self) -> bool:
        """Whether a sample's loss must be the one that it has alone."""
        return self.name != NOT_ISOLATED
