"""Comparisons, and how a test asks for a backend."""

from __future__ import annotations

import contextlib
import os

import hypothesis
import torch
from torch.utils._pytree import tree_map_only

import vlm_fuse

# the interpreter takes milliseconds for a program: few examples there
EXAMPLES = {"reference": 60, "cpu": 150, "triton": 8}

INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def examples(backend: str, share: float = 1.0):
    """Settings with as many examples as the backend is fast enough for."""
    search = hypothesis.settings.get_current_profile_name() == "search"
    number = hypothesis.settings.get_profile("search").max_examples if search else EXAMPLES.get(backend, 60)
    return hypothesis.settings(max_examples=max(1, int(number * share)))


@contextlib.contextmanager
def serving(backend: str):
    """The backend for calls that take no `backend` argument."""
    before = os.environ.get("VLM_FUSE_BACKEND")
    os.environ["VLM_FUSE_BACKEND"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["VLM_FUSE_BACKEND"]
        else:
            os.environ["VLM_FUSE_BACKEND"] = before


def placed(value, device: str):
    """The value, with the tensors in its lists and dicts on the device."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), value)


def assert_bits(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Same dtype, shape and bits."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    if actual.dtype.is_floating_point:
        actual, expected = (t.view(INTEGER[t.element_size()]) for t in (actual, expected))
    assert torch.equal(actual, expected), f"{what}: first difference at {(actual != expected).nonzero()[0].tolist()}"


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Same dtype, shape and values; NaN equals nothing, the sign of zero does not count."""
    assert actual is not None, f"{what}: None"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.equal(actual.detach().cpu(), expected.detach().cpu()), (
        f"{what}:\n{actual}\nexpected\n{expected}"
    )


def merge(tensors, backend: str, **changes):
    """merge() on the tensors of a case."""
    arguments = tensors.merge_arguments() | changes
    return vlm_fuse.merge(tensors.case.input_ids(tensors.leaves[0].device), backend=backend, **arguments)
