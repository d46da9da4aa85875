"""What benchmarks/launches.py counts in a profile."""

from types import SimpleNamespace

import torch

from benchmarks.launches import CALL, counted

CPU, GPU = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


def event(name, device, start=0, duration=1):
    return SimpleNamespace(name=lambda: name, device_type=lambda: device, start_ns=lambda: start, duration_ns=lambda: duration)


def test_the_wait_at_the_end_of_the_profile_is_not_the_calls():
    events = [
        event(CALL, CPU, 10, 100),
        event(CALL, GPU, 50, 200),
        event("rows_kernel", GPU, 60, 50),
        event("Memcpy DtoH", GPU, 120, 5),
        event("cudaStreamSynchronize", CPU, 20, 5),
        event("cudaLaunchKernel", CPU, 30, 5),
        event("cudaDeviceSynchronize", CPU, 110, 90),
    ]
    assert counted(events) == (1, 1, 1)
    assert counted(events[:4]) == (1, 1, 0)
