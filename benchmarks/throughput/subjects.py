"""The models that are trained, each with its samples and contestants, at the size that the machine can do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import nn

from . import nanovlm, nanovlm_ways, samples
from .samples import Load
from .transformers_models import FAMILIES
from .ways import Way

KEYS = ("nanovlm", *FAMILIES)


class Setting(NamedTuple):
    """How large a model and its step are, and how long it is timed."""

    size: str  # key of the sizes of nanovlm or of a family
    capacity: int  # tokens of a row
    rows: int  # micro-batches of a step
    seconds: float  # of measured rounds
    rounds: int  # at most


_QUICK = {key: Setting("tiny", 512, 1, 2.0, 4) for key in KEYS}
_CPU = {key: Setting("scaled", 1024, 1, 9.0, 15) for key in KEYS} | {"nanovlm": Setting("scaled", 1024, 2, 30.0, 15)}
_GPU = {key: Setting("full", 8192, 2, 20.0, 20) for key in KEYS} | {
    "nanovlm": Setting("nanovlm-450m", 4096, 4, 20.0, 20),
    "llava": Setting("full", 2048, 4, 20.0, 20),
}


LONG = 4  # times as many rounds


def setting(key: str, device: str, quick: bool, long: bool = False) -> Setting:
    """What a machine of this kind gets; `long`: with more rounds, for results that are kept."""
    found = (_QUICK if quick else _CPU if device == "cpu" else _GPU)[key]
    return found._replace(seconds=LONG * found.seconds, rounds=LONG * found.rounds) if long else found


class Subject(NamedTuple):
    """A model that is trained, and all that trains it."""

    key: str
    title: str
    model: nn.Module
    shape: samples.Shape
    load: Load
    ways: list[Way]
    parts: Callable[[], AbstractContextManager]  # marks the parts of the model's own forward, while it is profiled
    setting: Setting


def subject(key: str, how: Setting, device: str, dtype: torch.dtype, distribution: str | None = None) -> Subject:
    """A model with random weights, seeded.

    Args:
        key: one of `KEYS`.
        how: of `setting`.
        device: "cpu" or "cuda".
        dtype: float32, or bfloat16 for autocast.
        distribution: key of `generator.DISTRIBUTIONS`; default the one that belongs to the model.

    Raises:
        ValueError: a distribution whose images the model's tower does not make.

    Example:
        >>> import torch
        >>> from benchmarks.throughput import subjects
        >>> made = subjects.subject("nanovlm", subjects.setting("nanovlm", "cpu", quick=True), "cpu", torch.float32)
        >>> made.load.useful
        512
    """
    torch.manual_seed(0)
    if key == "nanovlm":
        shape = nanovlm.SIZES[how.size]
        model = nanovlm.NanoVLM(shape).to(device)
        ways, parts, title = nanovlm_ways.ways_of(model, device, dtype), nullcontext, "nanoVLM"
        distribution = distribution or "cauldron_64"
    else:
        from . import transformers_ways

        family = FAMILIES[key]
        shape, title = family.sizes[how.size], family.title
        model = family.make(shape).to(device).train()
        known = transformers_ways.Model(model)
        ways, parts = transformers_ways.ways_of(known, device, dtype), lambda: transformers_ways.parts_of(known)
        distribution = distribution or family.distribution[how.size]
    load = samples.load(distribution, shape, how.capacity, how.rows, device)
    return Subject(key, title, model, shape, load, ways, parts, how)
