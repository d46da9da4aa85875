"""A run's results as files: JSON with every round, a Markdown table, a plot."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.targets import TRANSIENT_PER_TOKEN, Reached
from benchmarks.timing import Times

PAGES = {"default": "THP_MEM_ALLOC_ENABLE unset", "huge": "THP_MEM_ALLOC_ENABLE=1"}


def cells(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a contestant: its times, its ratio to the base, GB/s of the base's bytes, transient bytes a token."""
    times = Times(result["times"], result.get("faults", {}))
    rows = []
    for name in result["times"]:
        row = times.row(name, result["base"])
        row.update(contestant=name, gbs=result["base_bytes"] / (row["ms"] * 1e6))
        transient = result.get("transient", {}).get(name)
        row["transient"] = None if transient is None else transient / max(result["tokens"], 1)
        rows.append(row)
    return rows


def results_table(results: list[dict[str, Any]]) -> str:
    """Markdown: one table a batch and operation, the page conditions side by side."""
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["batch"], result["operation"]), {})[result["pages"]] = result
    lines, batch_before = [], None
    for (batch, operation), by_pages in groups.items():
        first = next(iter(by_pages.values()))
        if batch != batch_before:
            shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in first["shares"].items())
            lines += ["", f"## {batch}", "", f"{first['tokens']} tokens: {shares}."]
            batch_before = batch
        lines += ["", f"### {operation}", ""]
        refused = [f"{result['refused']} ({PAGES[pages]})" for pages, result in by_pages.items() if "refused" in result]
        lines += [f"**Refused:** {reason}" for reason in refused]
        shown = {pages: {row["contestant"]: row for row in cells(result)} for pages, result in by_pages.items() if "times" in result}
        if not shown:
            continue
        lines.append(f"Ratios are to {first['base']}, which moves {first['base_bytes'] / 1e6:.1f} MB.")
        heads = "".join(f" ms, {pages} pages | ratio (p20 to p80) | GB/s | faults |" for pages in shown)
        lines += ["", f"| contestant |{heads} transient B a token |"]
        lines.append("| --- |" + " --- | --- | --- | --- |" * len(shown) + " --- |")
        for name in next(iter(shown.values())):
            line = f"| {name} |"
            for rows in shown.values():
                row = rows[name]
                faults = "" if row["faults"] is None else f"{row['faults']:.0f}"
                spread = f"{digits(row['ratio_p20'])} to {digits(row['ratio_p80'])}"
                line += f" {digits(row['ms'])} | {digits(row['ratio'])} ({spread}) | {row['gbs']:.1f} | {faults} |"
            transient = next(iter(shown.values()))[name]["transient"]
            lines.append(line + (" |" if transient is None else f" {transient:.0f} |"))
    return "\n".join(lines)


def targets_table(reached: list[Reached]) -> str:
    """Markdown: every target that the run measured."""
    lines = ["| target | batch | pages | must | aim | measured (p20 to p80) | reached |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for item in reached:
        t = item.target
        sign = ">=" if t.at_least else "<="
        lines.append(
            f"| {t.text} | {t.batch} | {t.pages} | {sign} {t.must:g} | {sign} {t.aim:g} | {digits(item.value)} "
            f"({digits(item.spread[0])} to {digits(item.spread[1])}) | {item.verdict} |"
        )
    return "\n".join(lines)


def transient_note(results: list[dict[str, Any]], ours: str) -> str | None:
    """The most that our own calls held beyond their results, in bytes a token."""
    most = max(
        ((r["transient"][ours] / max(r["tokens"], 1), r) for r in results if ours in r.get("transient", {})), key=lambda pair: pair[0], default=None
    )
    if most is None:
        return None
    verdict = "reached" if most[0] < TRANSIENT_PER_TOKEN else "MISSED"
    return (
        f"Transient memory of {ours}, beyond what it returns: at most {most[0]:.0f} bytes a token "
        f"({most[1]['operation']}, {most[1]['batch']}); target under {TRANSIENT_PER_TOKEN}: {verdict}."
    )


def environment_table(environment: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in environment.items())


MOST_PANELS = 24
BARS = {"default": "#52606d", "huge": "#9aa5b1", "gpu": "#52606d"}
OWN_BARS = {"default": "#b23a1e", "huge": "#e8997f", "gpu": "#b23a1e"}


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Bars of the ratio to a plain copy, one panel a batch and operation where others compete, a bar for each page condition."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for result in results:
        if len(result.get("times", {})) > 3 and not result["batch"].startswith("S "):
            groups.setdefault((result["operation"], result["batch"]), {})[result["pages"]] = result
    chosen = list(groups.items())[:MOST_PANELS]
    if not chosen:
        return
    columns = min(3, len(chosen))
    lines = -(-len(chosen) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6.4 * columns, 3.2 * lines), squeeze=False)
    for axis in axes.flat[len(chosen) :]:
        axis.set_visible(False)
    for axis, ((operation, batch), by_pages) in zip(axes.flat, chosen):
        height = 0.8 / len(by_pages)
        for offset, (pages, result) in enumerate(by_pages.items()):
            rows = cells(result)
            places = [i + (offset - (len(by_pages) - 1) / 2) * height for i in range(len(rows))]
            colors = [(OWN_BARS if row["contestant"].startswith("vlm_fuse") else BARS)[pages] for row in rows]
            bars = axis.barh(places, [row["ratio"] for row in rows], height=height, color=colors)
            axis.bar_label(bars, [f" {digits(row['ratio'])}" for row in rows], fontsize=7)
            axis.set_yticks(range(len(rows)), [row["contestant"] for row in rows])
        shades = "; dark: default, light: huge pages" if len(by_pages) > 1 else ""
        axis.axvline(1, color="black", linewidth=0.6)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.25)
        axis.invert_yaxis()
        axis.set_title(f"{operation}: {batch}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.set_xlabel(f"time over {result['base']}{shades}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write_json(path: Path, content: Any) -> None:
    """Indented, but a list of numbers on one line; seconds to four figures."""
    text = json.dumps(_shortened(content), indent=1)
    path.write_text(re.sub(r"\[\s+([-\d.e,\s]+?)\s+\]", lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]", text) + "\n")


def _shortened(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _shortened(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_shortened(value) for value in content]
    return float(f"{content:.4g}") if isinstance(content, float) else content


def digits(value: float) -> str:
    """Three figures that mean something."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"
