"""What the profiler sees of one step: the share of its parts, forward and backward, and for what the host waits."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from .sections import PREFIX, Nodes, recorded

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines for every call

#: parts that differ between contestants and have nothing to do with what is computed
BETWEEN = ("merge", "mask", "positions")
#: reads of a value, and searches whose result has a size that the host must know
READS = ("aten::_local_scalar_dense", "aten::nonzero")
#: what the host waits in on a GPU
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
#: the engine's own event around a node; the node's event inside it has the same number
_NODE = "autograd::engine::evaluate_function: "
_STEP = "step"


class PartTime(NamedTuple):
    """A part of the step: microseconds in the forward and the backward, and how many ranges and nodes they were."""

    forward: float
    backward: float
    ranges: int
    nodes: int


class Profile(NamedTuple):
    """One profiled step."""

    parts: dict[str, PartTime]
    total: float  # microseconds of the step: on a GPU of its kernels
    counts: dict[str, int]  # of READS and WAITS, without the optimizer's

    def share(self, *names: str) -> float:
        """Share of the step that some parts take, forward and backward."""
        taken = sum(part.forward + part.backward for name, part in self.parts.items() if name in names)
        return taken / self.total if self.total else 0.0

    @property
    def reads(self) -> int:
        """Host reads of the step."""
        return sum(self.counts[name] for name in READS)

    @property
    def waits(self) -> int:
        """Host waits of the step that the GPU's runtime saw; 0 on a CPU."""
        return sum(self.counts[name] for name in WAITS)


def profiled(step: Callable[[], object], device: str, trace: Path | None = None) -> Profile:
    """Profile one call of a step that has run before.

    Args:
        step: its parts are marked by `sections.Part`.
        device: "cpu" or "cuda".
        trace: file for a Chrome trace, which Perfetto opens; ".json.gz" is compressed.

    Example:
        >>> import torch
        >>> from benchmarks.throughput.profiled import profiled
        >>> from benchmarks.throughput.sections import Part
        >>> x = torch.ones(1000, requires_grad=True)
        >>> def step():
        ...     with Part("merge"):
        ...         y = x.sin()
        ...     (y * x).sum().backward()
        >>> found = profiled(step, "cpu")
        >>> found.parts["merge"].ranges, found.parts["merge"].nodes, 0 < found.share("merge") < 1
        (1, 1, True)
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with recorded() as nodes, profile(activities=activities) as seen:
        with torch.profiler.record_function(_STEP):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    if trace is not None:
        seen.export_chrome_trace(str(trace))
    return _read(list(seen.events()), nodes, device)


def _read(events: list, nodes: list[Nodes], device: str) -> Profile:
    def duration(event) -> float:
        return event.device_time_total if device == "cuda" else event.cpu_time_total

    # AdamW on a CPU reads its step counters, which lie there anyway
    optimizer = [(event.time_range.start, event.time_range.end) for event in events if event.name == PREFIX + "optimizer"]
    forward: Counter[str] = Counter()
    backward: Counter[str] = Counter()
    ranges: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    owner = {number: own.part for own in nodes for number in range(own.first, own.end)}
    names: Counter[str] = Counter()
    total = 0.0
    for event in events:
        names[event.name] += not any(start <= event.time_range.start < end for start, end in optimizer)
        # on a GPU a range is listed once more, as what its kernels took there
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        if event.name == _STEP:
            total += duration(event)
        elif event.name.startswith(PREFIX):
            part = event.name.removeprefix(PREFIX)
            forward[part] += duration(event)
            ranges[part] += 1
        elif event.name.startswith(_NODE) and event.sequence_nr in owner:
            backward[owner[event.sequence_nr]] += duration(event)
            counted[owner[event.sequence_nr]] += 1
    parts = {part: PartTime(forward[part], backward[part], ranges[part], counted[part]) for part in ranges}
    return Profile(parts, total, {name: names[name] for name in (*READS, *WAITS)})
