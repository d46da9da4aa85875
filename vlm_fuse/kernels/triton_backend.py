"""The Triton backend as one module: any GPU that Triton knows, or CPU tensors in its interpreter."""

from __future__ import annotations

import torch

from .triton_block_map import block_map
from .triton_dense import bits, dense
from .triton_launch import INTERPRETED
from .triton_masks import intervals
from .triton_merge import accumulate_weight, rows, rows_backward
from .triton_plan import count, facts, plan
from .triton_positions import mrope_position_ids

__all__ = ["EMULATED", "MAKES_TENSORS", "accumulate_weight", "available", "bits", "block_map", "count", "dense", "facts", "intervals", "mrope_position_ids", "plan", "rows", "rows_backward"]


#: under TRITON_INTERPRET=1 kernels run on the host, on CPU tensors.
EMULATED = INTERPRETED.value

#: outputs and gradients are made by the caller.
MAKES_TENSORS = False


def available() -> tuple[bool, str]:
    """Whether it can be used here, and why (not). Without Triton this module cannot be imported, which says why."""
    if INTERPRETED.value:
        return True, "Triton's interpreter (TRITON_INTERPRET=1): CPU tensors, slow"
    if torch.cuda.is_available():
        return True, f"Triton for {torch.cuda.get_device_name()}"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return True, "Triton for XPU"
    return False, "no GPU: Triton needs one (or TRITON_INTERPRET=1 for its interpreter on the CPU)"
