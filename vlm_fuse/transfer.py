"""Copies between devices for which the host waits only where it must."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device, non_blocking: bool = True) -> Tensor:
    """The tensor on `device`. A copy to the CPU is always waited for: whoever read it before it ended would find garbage.

    Source: PyTorch's tutorial "A guide on good usage of non_blocking and pin_memory()".
    """
    return tensor.to(device, non_blocking=non_blocking and device.type != "cpu")
