"""Two results of the same benchmark side by side: what became faster or slower beyond the spread of both.

    python -m vlm_fuse bench compare OLD NEW                 two JSON files, or two folders: then files of equal names
    python -m vlm_fuse bench compare OLD NEW --json FILE     the comparison as data as well
    python -m vlm_fuse bench compare OLD NEW --plot FILE.png

Rows are matched by their names: pages, batch, operation, contestant. A row that has a plain copy beside it is compared by its ratio to the
copy within each round, for the speed of a machine drifts from hour to hour; others by their milliseconds. Only a row whose 20th to
80th percentile lies outside that of the other file is called faster or slower.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import write_json
from benchmarks.result_files import NotResults, ResultFile, Row, read
from benchmarks.timing import quantile

PASSING = ("date", "load")  # facts that differ between any two runs
FEW_ROUNDS = 5
FASTER, SLOWER, WITHIN, BASE = "faster", "slower", "within spread", "the base itself"
MOST_PLOTTED = 60
SUMMARY = "suite.json"  # of a run of the suite; it holds no times


class Spread(NamedTuple):
    """A row's median and percentiles, in the unit it is compared by."""

    median: float
    p20: float
    p80: float
    rounds: int


class Compared(NamedTuple):
    """A row that both files have."""

    place: str
    contestant: str
    unit: str  # "ms", or what the ratio is to: "x clone"
    old: Spread
    new: Spread
    verdict: str

    @property
    def ratio(self) -> float:
        """New over old: below one is faster."""
        return self.new.median / self.old.median


class Difference(NamedTuple):
    """A fact of the environment that is not the same."""

    fact: str
    condition: str  # "" where it holds for all
    old: Any
    new: Any


class Comparison(NamedTuple):
    """One file against another."""

    name: str
    old: ResultFile
    new: ResultFile
    environment: list[Difference]
    rows: list[Compared]
    only_old: list[tuple[str, str]]  # place and contestant
    only_new: list[tuple[str, str]]


def compare(old: ResultFile, new: ResultFile) -> Comparison:
    """Match the rows of two result files.

    Args:
        old, new: as `result_files.read` gives them.

    Raises:
        NotResults: no row is in both.

    Example:
        >>> def file(ours):
        ...     rows = [Row("A, forward", "clone", [2.0] * 5, "clone", [1.0] * 5), Row("A, forward", "vlm_fuse", ours, "clone", [t / 2 for t in ours])]
        ...     return ResultFile(Path("results.json"), {"": {"cores": 2}}, [], rows)
        >>> [(row.contestant, row.unit, row.ratio, row.verdict) for row in compare(file([1.0] * 5), file([0.5] * 5)).rows]
        [('clone', 'ms', 1.0, 'the base itself'), ('vlm_fuse', 'x clone', 0.5, 'faster')]
    """
    before, after = ({(row.place, row.contestant): row for row in file.rows} for file in (old, new))
    rows = [_compared(before[key], after[key]) for key in before if key in after]
    if not rows:
        raise NotResults(f"{old.path} and {new.path} have no row in common: are they of the same benchmark?")
    only_old, only_new = [key for key in before if key not in after], [key for key in after if key not in before]
    return Comparison(old.path.name, old, new, differences(old.environments, new.environments), rows, only_old, only_new)


def _compared(old: Row, new: Row) -> Compared:
    # a base that is another one by now makes other ratios
    by_ratio = old.base is not None and old.base == new.base and not old.is_base
    first, second = (_spread(row.ratios if by_ratio else [1e3 * value for value in row.seconds]) for row in (old, new))
    verdict = FASTER if second.p80 < first.p20 else SLOWER if second.p20 > first.p80 else WITHIN
    return Compared(old.place, old.contestant, f"x {old.base}" if by_ratio else "ms", first, second, BASE if old.is_base and new.is_base else verdict)


def _spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), quantile(values, 0.2), quantile(values, 0.8), len(values))


def differences(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> list[Difference]:
    """Facts of the environment that differ, condition by condition; date and load, which always do, are left out.

    Example:
        >>> differences({"": {"torch": "2.13", "cores": 2}}, {"": {"torch": "2.14", "cores": 2}})
        [Difference(fact='torch', condition='', old='2.13', new='2.14')]
    """
    shared = [condition for condition in old if condition in new]
    found: dict[tuple[str, str, str], list[str]] = {}
    values = {}
    for condition in shared:
        first, second = old[condition], new[condition]
        for fact in dict.fromkeys([*first, *second]):
            if fact not in PASSING and first.get(fact) != second.get(fact):
                key = (fact, repr(first.get(fact)), repr(second.get(fact)))
                values[key] = first.get(fact), second.get(fact)
                found.setdefault(key, []).append(condition)
    return [
        Difference(key[0], condition, *values[key])
        for key, conditions in found.items()
        for condition in ([""] if len(conditions) == len(shared) else conditions)
    ]


# --- files and folders ------------------------------------------------------------------------------------------------


def compare_paths(old: Path, new: Path) -> tuple[list[Comparison], list[str]]:
    """Compare two files, or all files of equal names below two folders.

    Returns: the comparisons, and in words what was left aside.

    Raises:
        NotResults: a path is not there, one is a file and the other a folder, or nothing can be compared.
    """
    for path in (old, new):
        if not path.exists():
            raise NotResults(f"{path}: there is no such file or folder")
    if old.is_dir() != new.is_dir():
        raise NotResults(f"{old} and {new}: one is a folder, the other a file")
    if not old.is_dir():
        return [compare(read(old), read(new))], []
    first, second = ({path.relative_to(folder).as_posix() for path in folder.rglob("*.json") if path.name != SUMMARY} for folder in (old, new))
    made, aside = [], []
    for name in sorted(first & second):
        try:
            made.append(compare(read(old / name), read(new / name))._replace(name=name))
        except NotResults as error:
            aside.append(f"{name} is not compared: {error}")
    aside += [f"{name} is in {old} only" for name in sorted(first - second)] + [f"{name} is in {new} only" for name in sorted(second - first)]
    if not made:
        raise NotResults("\n".join([f"{old} and {new} have no results in files of equal names", *aside]))
    return made, aside


# --- what is printed --------------------------------------------------------------------------------------------------


def text(comparison: Comparison) -> str:
    """The comparison as Markdown: environment, every row, a summary."""
    lines = [f"# {comparison.name}: {comparison.old.path} against {comparison.new.path}", ""]
    for name, file in (("old", comparison.old), ("new", comparison.new)):
        facts = next(iter(file.environments.values()), {})
        lines.append(f"- {name}: commit {facts.get('commit')}, {facts.get('date')}" + "".join(f"; {note}" for note in file.notes))
    lines += ["", *_environment(comparison.environment), ""]
    cells = [("place", "contestant", "in", "old (p20 to p80)", "new (p20 to p80)", "new / old", "verdict")]
    cells += [(row.place, row.contestant, row.unit, _told(row.old), _told(row.new), _figure(row.ratio), row.verdict) for row in comparison.rows]
    lines += [*table(cells), ""]
    for path, keys in ((comparison.old.path, comparison.only_old), (comparison.new.path, comparison.only_new)):
        lines += [f"Only in {path}:", "", *(f"- {place}: {contestant}" for place, contestant in keys), ""] if keys else []
    return "\n".join([*lines, *_summary(comparison)])


def _environment(found: list[Difference]) -> list[str]:
    if not found:
        return ["The environments are the same."]
    rows = [("fact", "old", "new"), *((d.fact + (f", {d.condition} pages" if d.condition else ""), str(d.old), str(d.new)) for d in found)]
    return ["Not the same in both:", "", *table(rows)]


def _summary(comparison: Comparison) -> list[str]:
    counts = {verdict: sum(row.verdict == verdict for row in comparison.rows) for verdict in (FASTER, SLOWER, WITHIN)}
    told = [f"{counts[FASTER]} faster, {counts[SLOWER]} slower, {counts[WITHIN]} within the spread of both"]
    told += [f"{len(keys)} in {which} only" for which, keys in (("old", comparison.only_old), ("new", comparison.only_new)) if keys]
    lines = ["; ".join(told) + "."]
    bases = [row.ratio for row in comparison.rows if row.verdict == BASE]
    if bases:
        low, high = min(bases), max(bases)
        lines.append(
            f"What the ratios are to took {_figure(statistics.median(bases))} times as long as before ({_figure(low)} to {_figure(high)}): the machine."
        )
    fewest = min(min(row.old.rounds, row.new.rounds) for row in comparison.rows)
    if fewest < FEW_ROUNDS:
        lines.append(f"Some rows have {fewest} rounds: a spread of so few is soon exceeded.")
    return lines


def table(cells: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table, its first row the heading, with columns as wide as what is in them.

    Example:
        >>> print(*table([("fact", "old"), ("torch", "2.13")]), sep=chr(10))
        | fact  | old  |
        | ----- | ---- |
        | torch | 2.13 |
    """
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return [lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]]


def _told(spread: Spread) -> str:
    return f"{_figure(spread.median)} ({_figure(spread.p20)} to {_figure(spread.p80)})"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


# --- files that are written -------------------------------------------------------------------------------------------


def as_data(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON takes it."""
    return {
        "file": comparison.name,
        "old": str(comparison.old.path),
        "new": str(comparison.new.path),
        "environment": [d._asdict() for d in comparison.environment],
        "rows": [{**row._asdict(), "old": row.old._asdict(), "new": row.new._asdict(), "ratio": row.ratio} for row in comparison.rows],
        "only_old": comparison.only_old,
        "only_new": comparison.only_new,
    }


COLORS = {FASTER: "#2f7d4f", SLOWER: "#b23a1e", WITHIN: "#9aa5b1"}


def plot(comparisons: list[Comparison], path: Path) -> None:
    """New over old for every row: a dot, and a line as far as the two spreads allow; those that changed the most on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    rows = [row for comparison in comparisons for row in comparison.rows if row.verdict != BASE]
    # far from one on either side comes first
    shown = sorted(rows, key=lambda row: (row.verdict == WITHIN, -abs(math.log(row.ratio))))[:MOST_PLOTTED]
    figure, axis = plt.subplots(figsize=(11, 1.2 + 0.24 * max(4, len(shown))))
    for place, row in enumerate(shown):
        color = COLORS[row.verdict]
        axis.plot([row.new.p20 / row.old.p80, row.new.p80 / row.old.p20], [place, place], color=color, linewidth=1.4, alpha=0.6)
        axis.plot(row.ratio, place, marker="o", markersize=5, color=color)
    axis.axvline(1, color="black", linewidth=0.6)
    axis.set_yticks(range(len(shown)), [f"{row.contestant}  |  {row.place}" for row in shown], fontsize=7)
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, 0.5), max(high, 2))  # else a tenth of a percent fills the picture
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", color="#e4e7eb", linewidth=0.5)
    axis.set_xlabel("new / old: left of 1 is faster. The line goes from new p20 / old p80 to new p80 / old p20", fontsize=8)
    for verdict, color in COLORS.items():
        axis.plot([], [], "o", color=color, markersize=5, label=verdict)
    axis.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    compared = [f"old: {comparisons[0].old.path}", f"new: {comparisons[0].new.path}"] if len(comparisons) == 1 else [f"{len(comparisons)} files"]
    compared += [f"the {len(shown)} of {len(rows)} rows that changed the most"] if len(shown) < len(rows) else []
    axis.set_title("\n".join(compared), loc="left", fontsize=9, pad=24)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main(arguments: list[str] | None = None, prog: str = "python -m benchmarks.compare") -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a result file (JSON), or a folder of them")
    parser.add_argument("new", type=Path, help="another of the same benchmark, or another folder")
    parser.add_argument("--json", type=Path, default=None, help="write the comparison to this file")
    parser.add_argument("--plot", type=Path, default=None, help="draw it into this PNG")
    asked = parser.parse_args(arguments)
    try:
        made, aside = compare_paths(asked.old, asked.new)
    except NotResults as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(text(comparison) for comparison in made))
    print("".join(f"\n{reason}" for reason in aside))
    if asked.json:
        write_json(asked.json, [as_data(comparison) for comparison in made])
    if asked.plot:
        plot(made, asked.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
