"""What do I gain? One table and one picture from the results that are committed, every number with its file.

    python -m benchmarks.gain            prints the table, writes benchmarks/results/gain.png
    python -m benchmarks.gain --readme   also puts the table into README.md

Of each kind of result the newest of a CPU is taken. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import digits
from benchmarks.result_files import load
from benchmarks.throughput import ways
from benchmarks.timing import Times

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PICTURE = RESULTS / "gain.png"
BEGIN, END = "<!-- gain table: begin -->", "<!-- gain table: end -->"


class Gain(NamedTuple):
    """One line: the same thing as it is and with vlm_fuse. Of training steps a number for each model, in one order."""

    what: str
    before: str
    after: str
    gain: str
    file: Path


def newest(place: str) -> Path:
    """The newest result of a CPU at ``cpu-<date>/<place>``."""
    found = sorted(RESULTS.glob(f"cpu-*/{place}"))
    if not found:
        raise FileNotFoundError(f"{RESULTS}/cpu-*/{place}: not measured yet; run the benchmark that writes it (benchmarks/README.md)")
    return found[-1]


def gains() -> list[Gain]:
    """Every line of the table."""
    return [*_training(), *_masks(), *_merge(), *_before_the_model()]


def _training() -> Iterator[Gain]:
    file = newest("throughput/throughput.json")
    results = load(file)["results"]
    speeds = (
        (ways.STOCK, ways.BY_VLM_FUSE, "padding removed: padded to the longest of the batch ({}), packed and isolated; useful tokens/s"),
        (ways.MAXIMUM, ways.BY_VLM_FUSE, "the same, padded to the model's maximum ({})"),
        (ways.NOT_ISOLATED, ways.BY_VLM_FUSE, "isolation alone: the same filled rows, not isolated and isolated"),
        (ways.STOCK, ways.MERGE_REPLACED, "merge replaced, nothing else"),
    )
    for before, after, words in speeds:
        one, other = ([f"{result['rows'][name]['tokens_per_second']:,.0f}" for result in results] for name in (before, after))
        ratios = [Times(result["times"]).row(before, after)["ratio"] for result in results]
        padding = [100 * result["padding"][result["rows"][before]["layout"]] for result in results]
        yield Gain(words.format(_range(padding)), _each(one), _each(other), _each(f"{ratio:.2f} x" for ratio in ratios), file)

    def facts(name: str, words: str, form: str, scale: float = 1) -> Gain:
        one, other = ([scale * result["rows"][way][name] for result in results] for way in (ways.STOCK, ways.BY_VLM_FUSE))
        return Gain(words, *(_each(form.format(value) for value in values) for values in (one, other)), "", file)

    yield facts("host_reads", "reads by the host in a step, for each of which it waits on a GPU: padded, packed", "{:.0f}")
    yield facts("between_share", "share of merge, mask and positions in the step", "{:.1f} %", 100)
    yield facts("peak_bytes", "memory of the step at its highest point, MiB", "{:.0f}", 2**-20)


def _each(values: Iterable[str]) -> str:
    return " / ".join(values)


def _range(percent: list[float]) -> str:
    low, high = min(percent), max(percent)
    return f"{low:.0f} % padding" if round(low) == round(high) else f"{low:.0f} to {high:.0f} % padding"


def _masks() -> Iterator[Gain]:
    file = newest("masks/masks.json")
    before, after = "create_block_mask, compiled", "vlm_fuse, from document_ids"
    for result in load(file)["results"]:
        times = result.get("times", {})
        if result.get("operation") == "BlockMask" and before in times and after in times and result["tokens"] in (16384, 65536):
            one, other = (1e3 * statistics.median(times[name]) for name in (before, after))
            what = f"BlockMask of a packed row of {result['tokens']}, by compiled `create_block_mask` and from document_ids; ms"
            yield Gain(what, digits(one), digits(other), f"{one / other:.0f} x", file)


def _merge() -> Iterator[Gain]:
    file = newest("case_b/results.json")
    for result in load(file)["default"]["results"]:
        times = result.get("times", {})
        if result.get("operation") == "forward + backward" and "hf checked" in times:
            one, other = (1e3 * statistics.median(times[name]) for name in ("hf checked", "vlm_fuse"))
            ratio = statistics.median(Times(times).ratios("hf checked", "vlm_fuse"))
            yield Gain("merge alone, 8 x 4096 rows of 2048 bfloat16, by `masked_scatter`; forward and backward, ms", digits(one), digits(other), f"{ratio:.0f} x", file)


def _before_the_model() -> Iterator[Gain]:
    file = newest("positions/positions.json")
    for result in load(file)["results"]:
        if result["family"] == "qwen2_5_vl" and result["load"] == "4 images a sample":
            one, other = (result["rows"][name]["ms"] for name in ("transformers", "vlm_fuse"))
            what = f"M-RoPE positions of {' x '.join(map(str, result['shape']))} tokens, by `get_rope_index`; ms"
            yield Gain(what, digits(one), digits(other), f"{one / other:.0f} x", file)
    file = newest("packing/packing.json")
    found = [result for result in load(file)["results"] if result["distribution"] == "finevision_native"]
    if found:
        result = max(found, key=lambda one: one["samples"])
        one, other = (f"{100 * result['contestants'][name]['fill']:.2f} %" for name in ("nanoVLM's knapsack", "vlm_fuse"))
        yield Gain(f"rows of {result['capacity']} filled, by nanoVLM's packer", one, other, "", file)


def table(found: list[Gain]) -> str:
    """Markdown, the files as links from README.md."""
    models = [result["title"] for result in load(newest("throughput/throughput.json"))["results"]]
    lines = [f"| {_each(models)}, scaled down | as it is | with vlm_fuse | gain | from |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {one.what} | {one.before} | {one.after} | {one.gain} | [{one.file.stem}]({one.file.relative_to(ROOT).as_posix()}) |" for one in found]
    return "\n".join(lines)


def plot(path: Path) -> None:
    """Four panels: padding removed, isolation, masks, host reads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = load(newest("throughput/throughput.json"))["results"]
    figure, ((speed, isolation), (mask, reads)) = plt.subplots(2, 2, figsize=(12, 7.6))
    own, other, third = "#b23a1e", "#52606d", "#9aa5b1"
    titles = [result["title"] for result in results]

    def bars(axis, groups: list[tuple[str, list[float], str]], form: str) -> None:
        width = 0.8 / len(groups)
        for number, (label, values, color) in enumerate(groups):
            places = [i + (number - (len(groups) - 1) / 2) * width for i in range(len(values))]
            axis.bar_label(axis.bar(places, values, width, color=color, label=label), [form.format(value) for value in values], fontsize=8)
        axis.set_xticks(range(len(titles)), titles)
        axis.legend(fontsize=8, frameon=False)
        axis.margins(y=0.25)

    def relative(result: dict[str, Any], name: str, base: str) -> float:
        """Times the useful tokens a second of `base`."""
        return statistics.median(Times(result["times"]).ratios(base, name))

    bars(speed, [
        ("padded to the model's maximum", [relative(result, ways.MAXIMUM, ways.STOCK) for result in results], third),
        ("padded to the longest of the batch", [1.0 for _ in results], other),
        ("packed and isolated", [relative(result, ways.BY_VLM_FUSE, ways.STOCK) for result in results], own),
    ], "{:.2f}")  # fmt: skip
    speed.set_title("Padding removed: useful tokens a second, padded to the longest = 1", fontsize=10)
    bars(isolation, [
        ("filled rows, samples see one another", [1.0 for _ in results], other),
        ("the same rows, isolated", [relative(result, ways.BY_VLM_FUSE, ways.NOT_ISOLATED) for result in results], own),
    ], "{:.2f}")  # fmt: skip
    isolation.set_title("Isolation: useful tokens a second, not isolated = 1", fontsize=10)
    masks = [result for result in load(newest("masks/masks.json"))["results"] if result.get("operation") == "BlockMask" and "times" in result]
    for name, label, color in (("create_block_mask", "create_block_mask", third), ("create_block_mask, compiled", "the same, compiled and warm", other), ("vlm_fuse, from document_ids", "vlm_fuse", own)):
        points = [(result["tokens"], 1e3 * statistics.median(result["times"][name])) for result in masks if name in result["times"]]
        mask.loglog(*zip(*points), marker="o", color=color, label=label)
    mask.set_title("Masks: BlockMask of a packed row, ms", fontsize=10)
    mask.set_xlabel("tokens of the row", fontsize=8)
    mask.legend(fontsize=8, frameon=False)
    mask.grid(alpha=0.3)
    bars(reads, [(label, [result["rows"][name]["host_reads"] for result in results], color) for name, label, color in (
        (ways.STOCK, "as it is", other), (ways.MERGE_REPLACED, "merge replaced", third), (ways.BY_VLM_FUSE, "packed and isolated", own),
    )], "{:.0f}")  # fmt: skip
    reads.set_title("Reads by the host in a step, for each of which it waits on a GPU", fontsize=10)
    for axis in (speed, isolation, mask, reads):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def in_readme(text: str, made: str) -> str:
    """README's text with the table between its marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gain", description=__doc__.splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    given = parser.parse_args(arguments)
    made = table(gains())
    plot(PICTURE)
    if given.readme:
        readme = ROOT / "README.md"
        readme.write_text(in_readme(readme.read_text(), made))
    print(made, f"\nPicture: {PICTURE.relative_to(ROOT)}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
