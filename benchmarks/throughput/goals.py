"""What packing with isolation should reach in useful tokens a second, and whether it did."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from benchmarks.timing import Times, quantile

from . import ways


class Goal(NamedTuple):
    """`ways.BY_VLM_FUSE` against another contestant."""

    against: str
    least: float  # times its useful tokens a second
    text: str


GOALS = (
    Goal(ways.STOCK, 1.25, "of padding to the longest of the batch"),
    Goal(ways.MAXIMUM, 3.0, "of padding to the model's maximum"),
    Goal(ways.NOT_ISOLATED, 1.0, "of the same filled rows without isolation"),
)


def faster(times: Times, name: str, against: str) -> tuple[float, float, float]:
    """How many times the useful tokens a second of another contestant one has: median, 20th and 80th percentile of the rounds."""
    ratios = times.ratios(against, name)
    return statistics.median(ratios), quantile(ratios, 0.2), quantile(ratios, 0.8)


def reached(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every goal that one model's result can be held against; ratios are taken within a round.

    Example:
        >>> from benchmarks.throughput import goals, ways
        >>> times = {ways.BY_VLM_FUSE: [1.0, 1.0], ways.STOCK: [1.5, 1.7]}
        >>> [(goal["ratio"], goal["reached"]) for goal in goals.reached({"times": times})]
        [(1.6, True)]
    """
    times = Times(result["times"])
    made = []
    for goal in GOALS:
        if goal.against not in times.times or ways.BY_VLM_FUSE not in times.times:
            continue
        ratio, *spread = faster(times, ways.BY_VLM_FUSE, goal.against)
        made.append(dict(text=goal.text, against=goal.against, least=goal.least, ratio=ratio, spread=spread, reached=ratio >= goal.least))
    return made
