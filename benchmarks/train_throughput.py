"""Training steps of whole vision-language models: useful tokens a second of padded and packed batches of the same samples.

    python -m benchmarks.train_throughput                        on a CPU small models, under three minutes
    python -m benchmarks.train_throughput --quick                tiny ones, under a minute
    python -m benchmarks.train_throughput --long                 four times the rounds, seven minutes: for results that are kept
    python -m benchmarks.train_throughput --device cuda --trace  the models' own widths, bfloat16
    python -m benchmarks.train_throughput --only nanovlm,llava

A model of nanoVLM's shape and transformers' Qwen2.5-VL, Qwen3-VL and LLaVA, random weights, on samples as in training data. Contestants:
the project's own code path (left padding, its own merge, dense mask), the same with the merge replaced, right padding, padding to the
model's maximum, packed rows that are kept apart by each kind of attention, and packed rows that are not. Losses of every sample must be
those that it has alone: a contestant of which they are not gets no time, and the command fails.

Writes throughput.json (every round), throughput.md and throughput.png, with --trace also trace_before.json.gz and trace_after.json.gz
(one step of the first model, for Perfetto or chrome://tracing) to benchmarks/results/<name>/throughput/.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.generator import DISTRIBUTIONS
from benchmarks.throughput import measuring, nanovlm, precision, reporting, subjects
from benchmarks.timing import busy_note, environment

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def asked(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_throughput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="tiny models, few rounds")
    length.add_argument("--long", action="store_true", help="four times the rounds")
    parser.add_argument("--only", default=",".join(subjects.KEYS), help=f"models, by comma; default all: {', '.join(subjects.KEYS)}")
    parser.add_argument("--nanovlm", choices=nanovlm.SIZES, help="another size of the nanoVLM-shaped model")
    parser.add_argument("--distribution", choices=DISTRIBUTIONS, help="samples of another distribution, for models whose towers make such images")
    parser.add_argument("--dtype", choices=DTYPES, help="of the products; default bfloat16 (autocast), on a CPU that is slow at it float32")
    parser.add_argument("--trace", action="store_true", help="also write a Chrome trace of one step before and after")
    parser.add_argument("--name", help="folder below benchmarks/results")
    parser.add_argument("--out", type=Path, help="another folder")
    found = parser.parse_args(arguments)
    if found.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU that torch can use")
    found.only = found.only.split(",")
    unknown = [key for key in found.only if key not in subjects.KEYS]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)}: not one of {', '.join(subjects.KEYS)}")
    return found


def settled_dtype(name: str | None, device: str) -> tuple[str, list[str]]:
    """The dtype that is asked for, or else fits the machine, and what the report has to say of it."""
    if name is not None or device != "cpu":
        return name or "bfloat16", []
    slower = precision.slowdown()
    if slower <= 1:
        return "bfloat16", []
    return "float32", [f"float32: a product in bfloat16 takes this CPU {slower:.0f} times as long (`--dtype bfloat16` trains in it all the same)"]


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 1 where a contestant was refused."""
    options = asked(arguments)
    started = time.perf_counter()
    from tqdm import tqdm

    busy = busy_note()
    dtype, notes = settled_dtype(options.dtype, options.device)
    surroundings = environment(options.device) | {"dtype": dtype}
    folder = options.out or RESULTS / (options.name or f"{options.device}-{time.strftime('%Y-%m-%d')}") / "throughput"
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    with tqdm(unit="step", disable=None) as bar:
        for number, key in enumerate(options.only, 1):
            bar.set_description(f"{key}, {number} of {len(options.only)}")
            setting = subjects.setting(key, options.device, options.quick, options.long)
            if key == "nanovlm" and options.nanovlm is not None:
                setting = setting._replace(size=options.nanovlm)
            try:
                subject = subjects.subject(key, setting, options.device, DTYPES[dtype], options.distribution)
            except ValueError as error:
                raise SystemExit(f"{key}: {error}") from None
            bar.reset(measuring.ticks(subject))
            traces = folder if options.trace and not results else None
            results.append(measuring.measure(subject, options.device, DTYPES[dtype], bar.update, traces))
            bar.total = bar.n
    tiny = ["tiny models, to see that the command works: what the ratios are worth is for the larger ones to say"] if options.quick else []
    notes = [*([busy] if busy else []), *notes, *tiny]
    seconds = time.perf_counter() - started
    report.write_json(folder / "throughput.json", dict(environment=surroundings, notes=notes, seconds=seconds, results=results))
    (folder / "throughput.md").write_text(reporting.markdown(results, surroundings, notes, seconds))
    reporting.plot(results, folder / "throughput.png")
    print(*notes, *(f"\n{result['title']}\n{reporting.table(result)}" for result in results), "", reporting.goals_table(results), sep="\n")
    refused = [f"refused: {result['title']}, {name}: {why}" for result in results for name, why in result["refused"].items()]
    print(*refused, f"\n{seconds:.0f} s; written to {folder}", sep="\n")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
