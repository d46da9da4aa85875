"""Every benchmark, one after the other: ``python -m vlm_fuse bench``, or ``make bench``.

    python -m vlm_fuse bench                        all of them into benchmarks/results/cpu-<date>/
    python -m vlm_fuse bench --quick                small batches and few rounds
    python -m vlm_fuse bench --only merge,masks     some; --list tells their names and how long they take
    python -m vlm_fuse bench --device cuda          those that measure a GPU
    python -m vlm_fuse bench compare OLD NEW        two result files, or two folders of them

Each runs in a process of its own and writes its files (JSON with every round, tables, plots) and what it printed (log.txt) into
a folder of its own. One that fails does not stop the others; the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import compare, watched
from benchmarks.bars import Bars
from benchmarks.report import write_json
from benchmarks.timing import busy_note, environment

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
COMPARE = "compare"
LONGEST = 24  # lines of a benchmark's tables that are printed
INTERRUPTED = 130  # as shells tell it


class Benchmark(NamedTuple):
    """One program: it takes --out FOLDER, the arguments of `quick`, and --device where it knows several."""

    name: str
    module: str
    subject: str
    minutes: str  # quick, and in full, on a CPU of two cores
    devices: tuple[str, ...] = ("cpu",)
    quick: tuple[str, ...] = ("--quick",)


BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark("overhead", "benchmarks.bench_overhead", "microseconds of one eager call on a tiny batch", "0.1 / 0.5", ("cpu", "cuda")),
    Benchmark("merge", "benchmarks.bench_merge", "forward, backward, in place, fused embedding, packed, dtypes", "1.5 / 30", ("cpu", "cuda")),
    Benchmark(
        "apart", "benchmarks.bench_apart", "the same, every contestant in a process of its own", "1.3 / 10", quick=("--case", "C", "--rounds", "5")
    ),
    Benchmark("masks", "benchmarks.bench_masks", "BlockMask and the other renderings, attention under a mask", "1.6 / 10", ("cpu", "cuda")),
    Benchmark("positions", "benchmarks.bench_positions", "M-RoPE positions", "0.3 / 1"),
    Benchmark("packing", "benchmarks.bench_packing", "samples to rows: fill and speed", "0.2 / 2"),
    Benchmark("collators", "benchmarks.bench_collators", "collators beside a pipeline that pads and stacks", "0.2 / 1"),
    Benchmark("patched", "benchmarks.bench_patched", "transformers models, patched and as they are", "1.2 / 2", ("cpu", "cuda")),
    Benchmark("throughput", "benchmarks.train_throughput", "tokens a second of training steps", "2 / 3", ("cpu", "cuda")),
)


class Outcome(NamedTuple):
    """How a benchmark ended."""

    name: str
    ended: str  # "ok", "failed (status)", or "left out: why"
    seconds: float
    files: list[Path]
    last_line: str = ""  # of what a failed one printed

    @property
    def failed(self) -> bool:
        return self.ended.startswith("failed")


def chosen(only: str) -> list[Benchmark]:
    """Benchmarks by name.

    Args:
        only: names with commas between them; "" for all.

    Raises:
        ValueError: a name is not known.

    Example:
        >>> [benchmark.name for benchmark in chosen("masks,merge")]
        ['merge', 'masks']
    """
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in {benchmark.name for benchmark in BENCHMARKS}]
    if unknown:
        raise ValueError(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(benchmark.name for benchmark in BENCHMARKS)}")
    return [benchmark for benchmark in BENCHMARKS if not names or benchmark.name in names]


def command(benchmark: Benchmark, folder: Path, *, device: str, quick: bool) -> list[str]:
    """How a benchmark is called.

    Example:
        >>> command(chosen("packing")[0], Path("out"), device="cpu", quick=True)[1:]
        ['-m', 'benchmarks.bench_packing', '--quick', '--out', 'out']
    """
    more = [*(benchmark.quick if quick else ()), *(("--device", device) if len(benchmark.devices) > 1 else ())]
    return [sys.executable, "-m", benchmark.module, *more, "--out", str(folder)]


def run_one(benchmark: Benchmark, folder: Path, bars: Bars, *, device: str, quick: bool) -> Outcome:
    """Run a benchmark into its folder, its output into log.txt there."""
    if device not in benchmark.devices:
        return Outcome(benchmark.name, f"left out: measures no {device}", 0.0, [])
    folder.mkdir(parents=True, exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    started, log = time.monotonic(), folder / "log.txt"
    status = watched.run(command(benchmark, folder, device=device, quick=quick), log, bars.show, cwd=ROOT, columns=bars.columns)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and before.get(path) != path.stat().st_mtime_ns)
    last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "it printed nothing")
    return Outcome(benchmark.name, f"failed ({status})" if status else "ok", time.monotonic() - started, files, last if status else "")


# --- report -----------------------------------------------------------------------------------------------------------


def main_tables(outcome: Outcome) -> list[str]:
    """The tables that a benchmark has written, from the first one on and with their headings, as far as LONGEST goes."""
    for path in outcome.files:
        lines = path.read_text().splitlines() if path.suffix == ".md" else []
        first = next((number for number, line in enumerate(lines) if line.startswith("|")), len(lines))
        told = [line for line in lines[first:] if line.startswith(("|", "#"))]
        cut = min(len(told), LONGEST)
        while cut and (told[cut - 1].startswith(("#", "| ---")) or "".join(told[cut : cut + 1]).startswith("| ---")):
            cut -= 1  # no head without its table
        if cut:
            # one level deeper, for they stand below the benchmark's own heading
            shown = [f"\n#{line}\n" if line.startswith("#") else line for line in told[:cut]]
            return shown + ([f"\n{len(told) - cut} more lines in {path}"] if cut < len(told) else [])
    return []


def summary(outcomes: list[Outcome], folder: Path) -> list[str]:
    """A line for each benchmark: how it ended, seconds, files.

    Example:
        >>> print(*summary([Outcome("merge", "ok", 61.2, [Path("out/merge/results.json")])], Path("out")), sep=chr(10))
        | benchmark | how it ended | seconds | files              |
        | --------- | ------------ | ------- | ------------------ |
        | merge     | ok           | 61      | merge/results.json |
    """
    cells = [("benchmark", "how it ended", "seconds", "files")]
    for outcome in outcomes:
        names = [path.name for path in outcome.files]
        files = [path.relative_to(folder).as_posix() for path in outcome.files[:1]] + names[1:]
        cells.append((outcome.name, outcome.ended, f"{outcome.seconds:.0f}", ", ".join(files)))
    return compare.table(cells)


def report(facts: dict[str, Any], outcomes: list[Outcome], folder: Path, asked: argparse.Namespace) -> str:
    """What is printed at the end; the same goes to suite.md, and as data to suite.json."""
    lines = []
    for outcome in outcomes:
        tables = main_tables(outcome)
        lines += [f"## {outcome.name}", "", *tables, ""] if tables else []
    # last, where a terminal shows it
    lines += ["## How they ended", "", *summary(outcomes, folder)]
    lines += [
        "",
        *(f"{outcome.name}: {outcome.last_line} (all of it in {folder / outcome.name / 'log.txt'})" for outcome in outcomes if outcome.failed),
    ]
    text = "\n".join(lines)
    told = [{**outcome._asdict(), "files": [path.relative_to(folder).as_posix() for path in outcome.files]} for outcome in outcomes]
    write_json(folder / compare.SUMMARY, {"environment": facts, "device": asked.device, "quick": asked.quick, "benchmarks": told})
    about = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    (folder / "suite.md").write_text(f"# Benchmarks{', quick' if asked.quick else ''}\n\n{about}\n\n{text}\n")
    return text


def listing() -> str:
    """Names, devices, what they measure, how long they take."""
    cells = [("benchmark", "devices", "minutes: quick / in full", "what it measures")]
    cells += [(benchmark.name, ", ".join(benchmark.devices), benchmark.minutes, benchmark.subject) for benchmark in BENCHMARKS]
    return "\n".join(compare.table(cells))


def run(benchmarks: list[Benchmark], asked: argparse.Namespace) -> int:
    """Run benchmarks one after the other; the exit status."""
    folder = (asked.out or RESULTS / (asked.name or f"{asked.device}-{time.strftime('%Y-%m-%d')}")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    facts = environment(asked.device)
    print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n")
    print(*filter(None, [busy_note(), f"into {folder}", ""]), sep="\n", flush=True)
    outcomes: list[Outcome] = []
    bars, status = Bars(len(benchmarks)), 0
    try:
        for benchmark in benchmarks:
            bars.begin(benchmark.name)
            outcome = run_one(benchmark, folder / benchmark.name, bars, device=asked.device, quick=asked.quick)
            outcomes.append(outcome)
            bars.end(f"{outcome.name}: {outcome.ended}" + (f", {outcome.seconds:.0f} s" if outcome.files else ""))
    except KeyboardInterrupt:
        outcomes.append(Outcome(benchmark.name, "interrupted", 0.0, []))
        status = INTERRUPTED
    bars.close()
    print("", report(facts, outcomes, folder, asked), f"\n{'Interrupted. ' if status else ''}Written to {folder}", sep="\n")
    return status or int(any(outcome.failed for outcome in outcomes))


def main(arguments: list[str] | None = None, prog: str = "python -m benchmarks") -> int:
    """The command line; returns the exit status: 1 where a benchmark failed, 2 where what is asked for is not there."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == [COMPARE]:
        return compare.main(arguments[1:], f"{prog} {COMPARE}")
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of benchmarks with commas between them")
    parser.add_argument("--quick", action="store_true", help="small batches and few rounds")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--name", default=None, help="folder below benchmarks/results; default the device and the date")
    parser.add_argument("--out", type=Path, default=None, help="folder, instead of one below benchmarks/results")
    parser.add_argument("--list", action="store_true", help="the benchmarks and how long they take, and nothing else")
    asked = parser.parse_args(arguments)
    if asked.list:
        print(listing())
        return 0
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU that torch can use")
    try:
        benchmarks = chosen(asked.only)
    except ValueError as error:
        parser.error(str(error))
    return run(benchmarks, asked)


if __name__ == "__main__":
    sys.exit(main())
