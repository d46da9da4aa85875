"""Bytes moved against time, for every operation and contestant of a run, with the limit that a plain copy sets.

    python -m benchmarks.roofline FOLDER        reads every JSON file of results below it, writes FOLDER/roofline.png,
                                                and FOLDER/roofline_masks.png where there are masks

A merge computes nothing, so that its roof is the memory's speed: the time that the base of its operation, which moves the same
bytes and does nothing else, took in the same run. Colour says who, shape says which operation. A point on the line is as fast as
the copy; one above it takes longer. Below it is what need not read all that the copy reads, or writes past the caches.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.result_files import CONDITIONS, OWN, NotResults, conditions, load


class Point(NamedTuple):
    """One contestant in one operation on one batch."""

    operation: str
    contestant: str
    bytes: int  # that the operation's base reads and writes
    seconds: float  # median


class Panel(NamedTuple):
    """What shares a limit: a kind of copy under one page condition."""

    kind: str
    condition: str
    points: list[Point]
    limits: dict[str, list[tuple[int, float]]]  # what does nothing else -> (bytes, seconds), as it grows


GIVEN, ALLOCATED, FILLED = "output given", "output allocated by the call", "masks"

#: the bases of the operations: their panel, and the limit that they belong to. Two clones are no clone of twice the size, since
#: malloc has the memory for small ones at hand.
KINDS = {
    "copy_": (GIVEN, "copy_"),
    "copy_ of image rows": (GIVEN, "copy_"),
    "clone": (ALLOCATED, "clone"),
    "clone of kept rows": (ALLOCATED, "clone"),
    "two clones": (ALLOCATED, "two clones"),
    "clone and zeros": (ALLOCATED, "clone and zeros"),
    "fill_": (FILLED, "fill_"),
}
DASHES = {"two clones": "--", "clone and zeros": ":"}

#: the pictures, and what each shows.
PICTURES = {"roofline.png": (GIVEN, ALLOCATED), "roofline_masks.png": (FILLED,)}


def panels(results: list[dict[str, Any]]) -> list[Panel]:
    """Sort a run's entries into panels.

    Args:
        results: entries of bench_merge or bench_masks: operation, base, base_bytes, pages, times. What has no bytes (a BlockMask, which
            is not a copy) or no times (refused, left out) is passed over.

    Example:
        >>> entry = dict(operation="forward", base="clone", base_bytes=100, pages="huge", times={"clone": [2.0], "hf": [8.0, 9.0, 7.0]})
        >>> panels([entry])[0].points, panels([entry])[0].limits
        ([Point(operation='forward', contestant='hf', bytes=100, seconds=8.0)], {'clone': [(100, 2.0)]})
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        if result.get("base_bytes") and result.get("times") and result.get("base") in KINDS:
            found.setdefault((KINDS[result["base"]][0], result["pages"]), []).append(result)
    made = []
    for kind in dict.fromkeys(kind for kind, _ in KINDS.values()):
        for condition in dict.fromkeys(condition for of, condition in found if of == kind):
            entries = found[kind, condition]
            points = [
                Point(what(entry["operation"]), who(name), entry["base_bytes"], statistics.median(times))
                for entry in entries
                for name, times in entry["times"].items()
                if name != entry["base"]
            ]
            made.append(Panel(kind, condition, points, _limits(entries)))
    return made


def _limits(entries: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, dict[int, list[float]]] = {}
    for entry in entries:
        sizes = found.setdefault(KINDS[entry["base"]][1], {})
        sizes.setdefault(entry["base_bytes"], []).append(statistics.median(entry["times"][entry["base"]]))
    # several operations of the same size each have a copy of their own; the middle one stands for all
    return {name: sorted((size, statistics.median(times)) for size, times in sizes.items()) for name, sizes in found.items()}


def who(contestant: str) -> str:
    """Whose merge it is: the operation says already that a lookup comes before it, or that padding is removed after it."""
    return contestant.removeprefix("F.embedding, ").removesuffix(", boolean index")


def what(operation: str) -> str:
    """Which kernel it is: a contestant that is compiled says so itself, and one shape stands for all pairs of dtypes."""
    return "dtypes converted, out given" if operation.startswith("text ") else operation.removesuffix(", compiled")


# --- how it looks -----------------------------------------------------------------------------------------------------

OURS_COLOR, OURS_READY = "#b23a1e", "#e8997f"
OTHERS = ("#1f4e79", "#5b9bd5", "#4a7c59", "#8e6bb0", "#c9a227", "#7f6a55", "#3aa6a0", "#52606d", "#b5739d", "#9aa5b1")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d", "8")
BEYOND = 1.3
LEAST_SPAN = 8  # of the bytes that are shown: the largest over the smallest
GUIDES = (0.1, 1, 10, 100, 1000, 10000)  # GB/s


def _colors(names: list[str]) -> dict[str, str]:
    """Ours in reds, the others each in a colour of its own."""
    ours = [name for name in names if name.startswith(OWN)]
    others = [name for name in names if not name.startswith(OWN)]
    chosen = {name: OURS_COLOR if name == OWN else OURS_READY for name in ours}
    return chosen | {name: OTHERS[number % len(OTHERS)] for number, name in enumerate(others)}


def write(results: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw the pictures that the results have points for.

    Args:
        results: as in `panels`.
        folder: that the pictures go into.

    Returns: the files that were written; none where no entry has bytes and times.
    """
    found, written = panels(results), []
    for name, kinds in PICTURES.items():
        drawn = [panel for panel in found if panel.kind in kinds]
        if drawn:
            _plot(drawn, folder / name)
            written.append(folder / name)
    return written


def _plot(drawn: list[Panel], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    kinds, rows = list(dict.fromkeys(panel.kind for panel in drawn)), list(dict.fromkeys(panel.condition for panel in drawn))
    figure, axes = plt.subplots(len(rows), len(kinds), figsize=(6.2 * len(kinds) + 2.6, 5.2 * len(rows)), squeeze=False, layout="constrained")
    points = [point for panel in drawn for point in panel.points]
    colors, shapes = _colors(list(dict.fromkeys(point.contestant for point in points))), {}
    for operation in dict.fromkeys(point.operation for point in points):
        shapes[operation] = MARKERS[len(shapes) % len(MARKERS)]
    for axis in axes.flat:
        axis.set_visible(False)
    for panel in drawn:
        axis = axes[rows.index(panel.condition), kinds.index(panel.kind)]
        axis.set_visible(True)
        _draw(axis, panel, colors, shapes)
    dot = dict(linestyle="", markeredgewidth=0.5, markeredgecolor="white")
    contestants = [
        Line2D([], [], color=color, marker="o", markersize=9 if name.startswith(OWN) else 7, label=name, **dot) for name, color in colors.items()
    ]
    operations = [Line2D([], [], color="#52606d", marker=shape, markersize=7, label=operation, **dot) for operation, shape in shapes.items()]
    limits = [
        Line2D([], [], color="black", linewidth=1.6, linestyle=DASHES.get(name, "-"), marker=".", label=name)
        for name in dict.fromkeys(name for panel in drawn for name in panel.limits)
    ]
    handles = []
    for head, members in (("the limit, measured in the same run", limits), ("who", contestants), ("operation", operations)):
        handles += [Line2D([], [], linestyle="", label=head), *members, Line2D([], [], linestyle="", label="")]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(axis, panel: Panel, colors: dict[str, str], shapes: dict[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set(xscale="log", yscale="log")
    for name, line in panel.limits.items():
        # a little further at the speed of its ends, so that a single size too makes a line
        (first, quickest), (last, slowest) = line[0], line[-1]
        further = [(first / BEYOND, quickest / BEYOND), *line, (last * BEYOND, slowest * BEYOND)]
        look = dict(color="black", linestyle=DASHES.get(name, "-"), zorder=3)
        axis.plot([size / 1e6 for size, _ in further], [1e3 * seconds for _, seconds in further], linewidth=1.6, **look)
        axis.plot([size / 1e6 for size, _ in line], [1e3 * seconds for _, seconds in line], **{**look, "linestyle": ""}, marker=".")
    # ours last, on top of the others
    for point in sorted(panel.points, key=lambda point: (point.contestant.startswith(OWN), point.contestant == OWN)):
        own = point.contestant.startswith(OWN)
        axis.scatter(
            point.bytes / 1e6, 1e3 * point.seconds, marker=shapes[point.operation], s=70 if own else 38, color=colors[point.contestant],
            edgecolors="white", linewidths=0.5, alpha=1 if own else 0.8, zorder=5 if own else 4,
        )  # fmt: skip
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    wider = max(1.3, math.sqrt(LEAST_SPAN / (right / left)))
    left, right, low, high = left / wider, right * wider * 1.2, low / 1.2, high * 1.2  # the words stand on the right
    for speed in GUIDES:  # a megabyte in a millisecond is a gigabyte a second
        axis.plot([left, right], [left / speed, right / speed], color="#d5dae0", linewidth=0.8, zorder=1)
        at = min(right, high * speed) / 1.06
        if left * 1.3 < at and low * 1.3 < at / speed:
            axis.annotate(f"{speed:g} GB/s", (at, at / speed), fontsize=7, color="#7b8794", ha="right", va="top", zorder=2)
    axis.set(xlim=(left, right), ylim=(low, high), xlabel="MB read and written by the limit", ylabel="ms")
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_locator(LogLocator(subs=(1, 2, 5)))
        each.set_minor_locator(NullLocator())
        each.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(color="#f0f2f4", linewidth=0.6, zorder=0)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
    condition = CONDITIONS.get(panel.condition, panel.condition)
    axis.set_title(f"{panel.kind}, {condition}", fontsize=10)


def results_below(folder: Path) -> list[dict[str, Any]]:
    """The entries of every JSON file of results in a folder and below it.

    Raises:
        NotResults: the folder is not there.
    """
    if not folder.is_dir():
        raise NotResults(f"{folder}: there is no such folder")
    runs = [run for path in sorted(folder.rglob("*.json")) for run in conditions(load(path)).values()]
    entries = [entry for run in runs if isinstance(run.get("results"), list) for entry in run["results"]]
    return [entry for entry in entries if isinstance(entry, dict)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of results; the picture goes into it")
    folder = parser.parse_args().folder
    try:
        written = write(results_below(folder), folder)
    except NotResults as error:
        print(f"benchmarks.roofline: {error}", file=sys.stderr)
        return 2
    if not written:
        print(f"benchmarks.roofline: {folder}: no results of bench_merge or bench_masks with bytes and times below it", file=sys.stderr)
        return 2
    print("Written to " + ", ".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
