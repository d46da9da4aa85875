"""What was measured as Markdown and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import environment_table
from benchmarks.timing import Times

from . import goals, nanovlm, ways
from .transformers_models import FAMILIES

HEADS = (
    "contestant", "step, ms", "useful tokens/s", "times stock (p20 to p80)", "padding", "peak MiB", "merge + mask + positions", "vision tower",
    "host reads", "loss, relative difference",
)  # fmt: skip


def markdown(results: list[dict[str, Any]], surroundings: dict[str, Any], notes: list[str], seconds: float) -> str:
    """The whole report."""
    lines = ["# Training steps: the same samples, padded and packed", "", *_how_to_read(surroundings), "", *(f"- {note}" for note in notes)]
    lines += [f"- the run took {seconds:.0f} s", "", environment_table(surroundings), "", "## What was to be shown", "", goals_table(results)]
    for result in results:
        said = [line for paragraph in described(result) for line in (paragraph, "")]
        lines += ["", f"## {result['title']}", "", *said, table(result), "", *_left_out(result)]
    return "\n".join(lines).rstrip() + "\n"


def goals_table(results: list[dict[str, Any]]) -> str:
    """Useful tokens a second of packed and isolated rows (`vlm_fuse.attention`) against the others."""
    lines = ["| model | useful tokens a second of packed, isolated rows | at least | measured (p20 to p80) | reached |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        for goal in goals.reached(result):
            low, high = goal["spread"]
            lines.append(
                f"| {result['title']} | times those {goal['text']} ({_padding_of(goal, result)}) | {goal['least']:g} | {goal['ratio']:.2f} ({low:.2f} to {high:.2f}) "
                f"| {'yes' if goal['reached'] else '**no**'} |"
            )
    return "\n".join(lines)


def _padding_of(goal: dict[str, Any], result: dict[str, Any]) -> str:
    return f"{100 * result['padding'][result['rows'][goal['against']]['layout']]:.0f} % padding"


def described(result: dict[str, Any]) -> list[str]:
    """What the model and its step are, in sentences."""
    batches = "; ".join(" + ".join(map(str, batch)) for batch in result["samples"])
    said = [
        f"{result['parameters'] / 1e6:.1f} M weights: {result['layers']} layers of width {result['width']}, a tower of {result['vision_layers']} layers of width "
        f"{result['vision_width']}, {result['vocabulary']} tokens in the vocabulary.",
        f"Samples of {result['distribution']}, tokens of each, micro-batch by micro-batch: {batches}. {result['useful_tokens']} tokens in a step, "
        f"{100 * result['image_share']:.0f} % of them feature rows of {result['images']} images. Padding to the longest of the batch: "
        f"{100 * result['padding']['left']:.1f} %; to the model's maximum, {result['maximum']} tokens: {100 * result['padding']['maximum']:.1f} %; "
        f"in rows of {result['capacity']}: {100 * result['padding']['packed']:.1f} %.",
    ]
    if result["key"] in FAMILIES and result["size"] == "scaled":
        said.append(
            f"Of the products of the linear layers of tower and decoder the tower does, on such samples, {FAMILIES[result['key']].tower} (by sizes that are "
            "remembered, not verified). The scaled one was chosen to do about as much; its share of the step is in the table."
        )
    if result["key"] == "nanovlm" and result["size"] != "nanovlm-450m":
        tower, decoder = nanovlm.SIZES["nanovlm-450m"].work(result["images"], result["useful_tokens"])
        share = tower / (tower + decoder)
        most = [f"{share + (1 - share) / (1 - result['padding'][layout]):.2f}" for layout in ("left", "maximum")]
        said.append(
            f"The tower is small here. With SigLIP-B/16 and SmolLM2-360M these samples would have {100 * share:.0f} % of the products of all linear layers in the "
            f"tower, whatever the padding: where it is trained too, these layers alone would gain {most[0]} and {most[1]} times by packing, not more. "
            "A tower that is frozen, or whose features are kept, leaves the ratios below."
        )
    return said


def table(result: dict[str, Any]) -> str:
    """Every contestant that was timed."""
    lines = ["| " + " | ".join(HEADS) + " |", "| --- " * len(HEADS) + "|"]
    base, times = next(iter(result["rows"]), None), Times(result["times"])
    for name, row in result["rows"].items():
        ratio, low, high = goals.faster(times, name, base)
        found = result["losses"][name]
        said = f"{found['difference']:.1e}" + ("" if found["equal"] else ", not equal")
        lines.append(
            f"| {name} | {1e3 * row['seconds']:.0f} | {row['tokens_per_second']:,.0f} | {ratio:.2f} ({low:.2f} to {high:.2f}) | {100 * result['padding'][row['layout']]:.1f} % "
            f"| {row['peak_bytes'] / 2**20:.0f} | {100 * row['between_share']:.2f} % | {100 * row['vision_share']:.1f} % | {row['host_reads']}"
            f"{_waits(row)} | {said} |"
        )
    return "\n".join(lines)


def _waits(row: dict[str, Any]) -> str:
    return f" ({row['host_waits']} waits)" if row["host_waits"] else ""


def _left_out(result: dict[str, Any]) -> list[str]:
    made = [f"- **Refused:** {name}: {why}." for name, why in result["refused"].items()]
    return made + [f"- Not run: {name}: {why}." for name, why in result["not_run"].items()]


def _how_to_read(surroundings: dict[str, Any]) -> list[str]:
    return [
        f"Forward, backward and AdamW, {surroundings['dtype']}. All contestants train on the same samples in a step, over the same micro-batches, with the same",
        "gradients but for rounding; useful tokens are those of the samples. Every row of a batch has logits, as nanoVLM's and transformers' forward make",
        "them, padding too. Contestants take turns; times are medians, ratios are taken within a round. Peak MiB is what the step holds at most beyond",
        "weights and optimizer. The shares are the profiler's, of one step, forward and backward, with nanoVLM's embedding lookup in the merge; host reads",
        "are `aten::_local_scalar_dense` and `aten::nonzero` outside the optimizer. Losses are each sample's mean over its answers, in float32 before the",
        "first step, against the sample alone: equal means within 2e-5.",
        "",
        *(f"- {name}: {what}." for name, what in ways.WHAT.items()),
    ]


BAR, OWN_BAR = "#52606d", "#b23a1e"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Useful tokens a second, one panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [result for result in results if result["rows"]]
    if not shown:
        return
    columns = min(2, len(shown))
    lines = -(-len(shown) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(7.4 * columns, 3.1 * lines), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, result in zip(axes.flat, shown):
        names = list(result["rows"])
        speeds = [result["rows"][name]["tokens_per_second"] for name in names]
        bars = axis.barh(range(len(names)), speeds, color=[OWN_BAR if name == ways.BY_VLM_FUSE else BAR for name in names])
        axis.bar_label(bars, [f" {speed:,.0f}" for speed in speeds], fontsize=7)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.tick_params(labelsize=8)
        axis.set_title(f"{result['title']}: {100 * result['padding']['left']:.0f} % padding, {100 * result['padding']['maximum']:.0f} % at the maximum", fontsize=9)
        axis.set_xlabel("useful tokens a second", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
