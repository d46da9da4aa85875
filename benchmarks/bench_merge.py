"""Time merge: forward, backward, in place, fused embedding, packed and dtype conversions, against what others do.

    python -m benchmarks.bench_merge                  all of it, CPU: tens of minutes
    python -m benchmarks.bench_merge --quick          small batches, under a minute
    python -m benchmarks.bench_merge --only "case B"  groups whose name contains the words
    python -m benchmarks.bench_merge --device cuda

Writes results.json (every round), results.md (tables) and results.png (plot) to benchmarks/results/<name>/ and prints
which targets were reached. On a CPU everything is run twice, each in a process of its own: with torch's default pages
and with THP_MEM_ALLOC_ENABLE=1, since page faults of a fresh output can cost more than the copy itself. A contestant
whose result differs from the expected one makes its operation refused, and the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import torch

from benchmarks import baselines, batches, operations, report
from benchmarks.memory import transient_bytes
from benchmarks.presets import DOCUMENTS, IMAGE_SHARES
from benchmarks.targets import evaluate
from benchmarks.timing import busy_note, environment, interleave

RESULTS = Path(__file__).parent / "results"
BF16, FP32 = torch.bfloat16, torch.float32
FEW = ("hf checked", "nanovlm")

#: a group: its name, the batch, and the operations on it.
Group = tuple[str, Callable[[], batches.Batch], list[Callable[[batches.Batch], operations.Operation]]]


def _shared(compiled) -> list[Callable]:
    """What is measured on the batches of round numbers."""
    return [
        operations.forward_into,
        lambda batch: operations.forward(batch, compiled=compiled),
        operations.backward_into,
        lambda batch: operations.backward_into(batch, text_frozen=True),
        operations.backward,
        lambda batch: operations.forward_backward(batch, compiled=compiled),
        operations.in_place,
        operations.fused_into,
        operations.fused,
        operations.fused_gradient,
    ]


def _realistic(packing: bool) -> list[Callable]:
    """What is measured on a batch of a preset."""
    made = [
        operations.forward_into,
        lambda batch: operations.forward(batch, ("hf", *FEW)),
        lambda batch: operations.forward_backward(batch, FEW),
        operations.fused_into,
        lambda batch: operations.fused(batch, FEW),
    ]
    return [*made, operations.packed] if packing else made


def _share(share: float | None) -> Group:
    label = "one image row" if share is None else f"{100 * share:.0f} % image"
    return (
        f"share {label}",
        lambda: batches.runs(f"S (4,2048,960) fp32, {label}", 4, 2048, 960, FP32, share=share),
        [operations.forward_into, lambda batch: operations.forward(batch, FEW)],
    )


def _load(group: str, name: str, description) -> Group:
    made = lambda: batches.load(name, description)
    if group == "legacy":
        return f"{group} {name}", made, [operations.images_first]
    if group == "large":
        return f"{group} {name}", made, [operations.forward_into, lambda batch: operations.forward(batch, FEW)]
    return f"{group} {name}", made, _realistic(packing=not description.packed)


def _sizes() -> list[Group]:
    """Outputs of three sizes, for the share of a GPU's copy speed."""
    return [
        (f"size {mebibytes} MiB", lambda mebibytes=mebibytes: batches.of_size(mebibytes), [operations.forward_into, operations.backward_into])
        for mebibytes in (8, 64, 512)
    ]


def groups(quick: bool, compiled, device: str) -> list[Group]:
    """Everything that is measured, in order."""
    if quick:
        return [
            (
                "case C",
                batches.case_c,
                [
                    operations.forward_into,
                    operations.forward,
                    operations.backward_into,
                    operations.forward_backward,
                    operations.in_place,
                    operations.fused,
                ],
            ),
            *(_load("small", name, description) for name, description in batches.loads("small").items()),
            ("legacy", *_load("legacy", *next(iter(batches.loads("legacy").items())))[1:]),
        ]
    conversions = [
        lambda batch: operations.converted(batch, BF16, FP32, BF16),
        lambda batch: operations.converted(batch, FP32, BF16, FP32),
        lambda batch: operations.converted(batch, BF16, BF16, FP32),
        lambda batch: operations.converted(batch, FP32, FP32, BF16),
    ]
    return [
        *(_sizes() if device == "cuda" else []),
        ("case A", batches.case_a, _shared(compiled)),
        ("case B", batches.case_b, [*_shared(compiled), *conversions]),
        ("case C", batches.case_c, [operations.forward_into, operations.forward, operations.forward_backward]),
        *(_share(share) for share in IMAGE_SHARES),
        *((f"documents {count}", lambda count=count: batches.with_documents(count), [operations.facts]) for count in DOCUMENTS),
        *(_load(group, name, description) for group in ("small", "main", "large", "legacy") for name, description in batches.loads(group).items()),
    ]


def measure(operation: operations.Operation, batch: batches.Batch, budget: float, device: str, least: int) -> dict[str, Any]:
    """One operation on one batch, checked, timed, its transient memory taken."""
    result: dict[str, Any] = {
        "operation": operation.name,
        "batch": batch.name,
        "tokens": batch.tokens,
        "shares": batch.shares,
        "base": operation.base,
        "base_bytes": operation.base_bytes,
    }
    try:
        operations.verify(operation)
    except operations.WrongResult as error:
        return {**result, "refused": str(error)}
    times = interleave(operation.contestants, budget=budget, device=device, least=least, warmup=1 if least < 5 else 2)
    transient = {c.name: transient_bytes(c.run, device) for c in operation.contestants}
    return {**result, "times": times.times, "transient": transient}


def _try_compile(device: str) -> tuple[Any, str | None]:
    """torch.compile of the plain formulation, or why it is left out."""
    try:
        merge = baselines.compiled()
        ids = torch.tensor([[1, 0, 0, 2]], device=device)
        merge(ids, torch.randn(1, 4, 8, device=device), torch.randn(2, 8, device=device), 0)
        return merge, None
    except Exception as error:
        return None, f"torch.compile: {type(error).__name__}: {str(error).splitlines()[0]}"


def worker(arguments: argparse.Namespace, compiled) -> Iterator[dict[str, Any]]:
    """Measure in this process, as its environment says."""
    chosen = [group for group in groups(arguments.quick, compiled, arguments.device) if arguments.only in group[0]]
    progress = _progress(sum(len(group[2]) for group in chosen), arguments.pages)
    stop = time.monotonic() + arguments.limit
    for name, make, makers in chosen:
        batch = None
        for maker in makers:
            if time.monotonic() < stop:
                batch = make().to(arguments.device) if batch is None else batch
                started = time.monotonic()
                operation = maker(batch)
                result = measure(operation, batch, arguments.budget, arguments.device, 3 if arguments.quick else 5)
                del operation
                yield {**result, "group": name, "pages": arguments.pages, "seconds": round(time.monotonic() - started, 1)}
            else:
                yield {"operation": "?", "batch": name, "pages": arguments.pages, "skipped": "the time limit was reached"}
            progress(name)


def _progress(total: int, label: str) -> Callable[[str], None]:
    try:
        from tqdm import tqdm
    except ImportError:
        done = [0]

        def tick(name: str) -> None:
            done[0] += 1
            if sys.stderr.isatty():
                print(f"\r{label}: {done[0]}/{total} {name:50}", end="\n" if done[0] == total else "", file=sys.stderr)

        return tick
    bar = tqdm(total=total, desc=label, disable=None)

    def tick(name: str) -> None:
        bar.set_postfix_str(name)
        bar.update()

    return tick


def _in_process(arguments: argparse.Namespace, pages: str, rest: list[str]) -> dict[str, Any]:
    """Run a worker under one page condition; what it found."""
    variables = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    if pages == "huge":
        variables["THP_MEM_ALLOC_ENABLE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "worker.json"
        command = [sys.executable, "-m", "benchmarks.bench_merge", "--pages", pages, "--write", str(path), *rest]
        subprocess.run(command, env=variables, cwd=RESULTS.parent.parent, check=False)
        if not path.exists():
            return {"results": [], "environment": {}, "failed": f"the worker for {pages} pages ended without results"}
        return json.loads(path.read_text())


def _write_worker(arguments: argparse.Namespace) -> None:
    """A worker's results, rewritten after every operation, so that an end from outside loses only the last one."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    content = {"environment": environment(arguments.device), "busy": busy_note(), "results": []}
    compiled, content["left_out"] = (None, "torch.compile: not in a quick run") if arguments.quick else _try_compile(arguments.device)
    for result in worker(arguments, compiled):
        content["results"].append(result)
        partial = Path(arguments.write + ".part")
        report.write_json(partial, content)
        partial.replace(arguments.write)


def write_report(folder: Path, runs: dict[str, dict[str, Any]]) -> tuple[str, bool]:
    """Files of a run; returns the text to print and whether nothing was refused."""
    results = [result for run in runs.values() for result in run["results"]]
    measured = [result for result in results if "skipped" not in result]
    skipped = sorted({f"{r['batch']} ({r['pages']})" for r in results if "skipped" in r})
    targets = evaluate(measured)
    notes = [note for run in runs.values() for note in (run.get("busy"), run.get("failed")) if note]
    notes += sorted({f"left out: {run['left_out']}" for run in runs.values() if run.get("left_out")})
    notes += [f"left out for lack of time: {', '.join(skipped)}"] if skipped else []
    transient = report.transient_note(measured, operations.OURS)
    summary = [report.targets_table(targets) if targets else "No target is measured by this run."]
    summary += [transient] if transient else []
    text = ["# merge, measured", "", *(f"- {note}" for note in notes), ""]
    for pages, run in runs.items():
        text += [f"**{report.PAGES.get(pages, pages)}**", "", report.environment_table(run["environment"]), ""]
    text += [
        "Medians of interleaved rounds; a ratio is the median of the ratios within a round. GB/s counts the bytes that",
        "the copy reads and writes.",
        "",
        "## Targets",
        "",
        *summary,
        report.results_table(measured),
        "",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    report.write_json(folder / "results.json", runs)
    (folder / "results.md").write_text("\n".join(text))
    report.plot(measured, folder / "results.png")
    refused = [result["refused"] for result in measured if "refused" in result]
    printed = [*notes, *(f"REFUSED: {reason}" for reason in refused), *summary, f"\nWritten to {folder}"]
    return "\n".join(printed), bool(measured) and not refused


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_merge", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small batches, under a minute")
    parser.add_argument("--only", default="", help="only groups whose name contains this")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=0, help="of torch; default its own choice")
    parser.add_argument("--budget", type=float, default=None, help="seconds for the rounds of one operation")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds for each process; what is left then is skipped")
    parser.add_argument("--name", default=None, help="folder below benchmarks/results")
    parser.add_argument("--out", default=None, help="folder, instead of one below benchmarks/results")
    parser.add_argument("--pages", default="both", choices=["both", "default", "huge", "gpu"], help="page conditions, CPU")
    parser.add_argument("--write", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.budget = arguments.budget or (0.25 if arguments.quick else 4.0)
    if arguments.write:
        _write_worker(arguments)
        return 0
    rest = [
        "--device",
        arguments.device,
        "--only",
        arguments.only,
        "--budget",
        str(arguments.budget),
        "--limit",
        str(arguments.limit),
        "--threads",
        str(arguments.threads),
    ]
    rest += ["--quick"] if arguments.quick else []
    conditions = {"both": ("default", "huge")}.get(arguments.pages, (arguments.pages,))
    conditions = ("gpu",) if arguments.device == "cuda" else conditions
    runs = {pages: _in_process(arguments, pages, rest) for pages in conditions}
    folder = Path(arguments.out) if arguments.out else RESULTS / (arguments.name or f"{arguments.device}-{time.strftime('%Y-%m-%d')}")
    printed, good = write_report(folder, runs)
    print(printed)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
