"""Named parts of a step, in the profiler's record and by the numbers of the autograd nodes that they make.

A part is a range of the forward, which the profiler sees; its backward is the nodes whose sequence numbers were given out inside the
range. The numbers are kept only while `recorded` is open: a timed step pays for the ranges, some microseconds, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

PREFIX = "part: "


class Nodes(NamedTuple):
    """Autograd nodes made in a part: sequence numbers from `first` up to, not including, `end`."""

    part: str
    first: int
    end: int


_recorded: list[Nodes] | None = None


class Part:
    """A part of a step, as a ``with`` block, or opened and closed by hooks.

    Args:
        name: "merge", "mask", "positions", "vision", "optimizer".

    Example:
        >>> import torch
        >>> from benchmarks.throughput.sections import Part, recorded
        >>> x = torch.ones(3, requires_grad=True)
        >>> with recorded() as nodes, Part("merge"):
        ...     y = x * 2 + 1
        >>> nodes[0].part, nodes[0].end - nodes[0].first
        ('merge', 2)
    """

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> Part:
        self.first = torch.autograd._get_sequence_nr()
        self.range = torch.profiler.record_function(PREFIX + self.name)
        self.range.__enter__()
        return self

    def __exit__(self, *raised) -> None:
        self.range.__exit__(*raised)
        if _recorded is not None:
            _recorded.append(Nodes(self.name, self.first, torch.autograd._get_sequence_nr()))


@contextmanager
def recorded() -> Iterator[list[Nodes]]:
    """The nodes of every part that is closed inside the block, in a list."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before
