"""The CUDA backend as one module: NVIDIA GPUs, or CPU tensors where the module was built for the host (tests/emulator).

Outputs are made by torch's allocator, which knows streams and graphs. Nothing is read back from the device but by `count`
and by what must raise at once.
"""

from __future__ import annotations

from . import cuda_module
from .cuda_masks import intervals
from .cuda_merge import accumulate_weight, gradients, rows, rows_backward
from .cuda_plan import count, facts, plan
from .cuda_renderings import bits, block_map, dense
from .cuda_tokens import merge_usual, rows_of

__all__ = ["EMULATED", "MAKES_TENSORS", "accumulate_weight", "available", "bits", "block_map", "dense", "count", "facts", "gradients", "intervals", "plan", "merge_usual", "rows", "rows_backward", "rows_of"]

#: kernels run on the host, on CPU tensors.
EMULATED = cuda_module.module is not None and cuda_module.module.emulated

#: `rows` takes a dtype for an output, `rows_backward` (shape, dtype) for a gradient, and makes the tensor.
MAKES_TENSORS = True


def available() -> tuple[bool, str]:
    """Whether the compiled module can be used here, and why (not)."""
    return cuda_module.module is not None, cuda_module.reason
