"""Time merge: forward, backward, in place, fused embedding, packed and dtype conversions, against what others do.

    python -m benchmarks.bench_merge                  all of it, CPU: about half an hour
    python -m benchmarks.bench_merge --quick          small batches, about a minute
    python -m benchmarks.bench_merge --only "case B"  groups whose name contains the words
    python -m benchmarks.bench_merge --device cuda

Writes results.json (every round), results.md (tables), results.png (ratios) and roofline.png (time over bytes moved) to
benchmarks/results/<name>/ and prints which targets were reached. On a CPU everything is run under two conditions: with
torch's default pages and with THP_MEM_ALLOC_ENABLE=1, since page faults of fresh memory can cost more than the copy itself.
Whether malloc has memory at hand that it need not fetch anew depends on what the process did before; so each group runs in
processes of its own, several of them for the cases with targets, whose rounds are pooled, and page faults are counted. A
contestant whose result differs from the expected one makes its operation refused, and the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import batches, operations, report, roofline
from benchmarks.memory import transient_bytes
from benchmarks.presets import DOCUMENTS, IMAGE_SHARES
from benchmarks.targets import evaluate
from benchmarks.timing import busy_note, environment, interleave

RESULTS = Path(__file__).parent / "results"
BF16, FP32 = torch.bfloat16, torch.float32
FEW = ("hf checked", "nanovlm")
Maker = Callable[[batches.Batch], operations.Operation]


class Group(NamedTuple):
    """A batch and the operations measured on it, in a process of their own on a CPU."""

    name: str
    batch: Callable[[], batches.Batch]
    operations: list[Maker]
    processes: int = 1  # whose rounds are pooled


def _shared() -> list[Maker]:
    """What is measured on the batches of round numbers."""
    return [
        operations.forward_into,
        operations.forward,
        operations.backward_into,
        lambda batch: operations.backward_into(batch, text_frozen=True),
        operations.backward,
        operations.forward_backward,
        operations.in_place,
        operations.fused_into,
        operations.fused,
        operations.fused_gradient,
    ]


def _conversions() -> list[Maker]:
    pairs = [(BF16, FP32, BF16), (FP32, BF16, FP32), (BF16, BF16, FP32), (FP32, FP32, BF16)]
    return [lambda batch, pair=pair: operations.converted(batch, *pair) for pair in pairs]


def _compiled(name: str, make: Callable[[], batches.Batch]) -> Group:
    """torch.compile beside us, apart from the others: compiling fills the process with memory that malloc then reuses."""
    names = (operations.COMPILED,)

    def apart(measured: Callable[..., operations.Operation]) -> Maker:
        def make(batch: batches.Batch) -> operations.Operation:
            operation = measured(batch, names)
            return operation._replace(name=f"{operation.name}, compiled")

        return make

    return Group(name, make, [apart(operations.forward), apart(operations.forward_backward)])


def _share(share: float | None) -> Group:
    label = "one image row" if share is None else f"{100 * share:.0f} % image"
    return Group(
        f"share {label}",
        lambda: batches.runs(f"S (4,2048,960) fp32, {label}", 4, 2048, 960, FP32, share=share),
        [operations.forward_into, lambda batch: operations.forward(batch, FEW)],
    )


def _load(group: str, name: str, description) -> Group:
    if group == "legacy":
        made: list[Maker] = [operations.images_first]
    elif group == "large":
        made = [operations.forward_into, lambda batch: operations.forward(batch, FEW)]
    else:
        made = [
            operations.forward_into,
            lambda batch: operations.forward(batch, ("hf", *FEW)),
            lambda batch: operations.forward_backward(batch, FEW),
            operations.fused_into,
            lambda batch: operations.fused(batch, FEW),
        ]
        made += [] if description.packed else [operations.packed]
    return Group(f"{group} {name}", lambda: batches.load(name, description), made)


def _loads(*names: str) -> list[Group]:
    return [_load(group, name, description) for group in names for name, description in batches.loads(group).items()]


def _size(mebibytes: int) -> Group:
    """For the share of a GPU's copy speed."""
    return Group(f"size {mebibytes} MiB", lambda: batches.of_size(mebibytes), [operations.forward_into, operations.backward_into])


def groups(quick: bool, device: str) -> list[Group]:
    """Everything that is measured, in order."""
    if quick:
        chosen = [operations.forward_into, operations.forward, operations.backward_into]
        chosen += [operations.forward_backward, operations.in_place, operations.fused]
        return [Group("case C", batches.case_c, chosen), *_loads("small", "legacy")]
    return [
        *([_size(mebibytes) for mebibytes in (8, 64, 512)] if device == "cuda" else []),
        Group("case A", batches.case_a, _shared(), 3),
        Group("case B", batches.case_b, _shared(), 3),
        Group("case C", batches.case_c, [operations.forward_into, operations.forward, operations.forward_backward], 3),
        Group("conversions", batches.case_b, _conversions()),
        *_loads("main"),
        *_loads("small", "legacy", "large"),
        *(_share(share) for share in IMAGE_SHARES),
        *(Group(f"documents {count}", lambda count=count: batches.with_documents(count), [operations.facts]) for count in DOCUMENTS),
        _compiled("compiled A", batches.case_a),
        _compiled("compiled B", batches.case_b),
    ]


def measure(operation: operations.Operation, batch: batches.Batch, arguments: argparse.Namespace) -> dict[str, Any]:
    """One operation on one batch, checked, timed, its transient memory taken."""
    result = operations.described(operation, batch)
    try:
        operations.verify(operation)
    except operations.WrongResult as error:
        return {**result, "refused": str(error)}
    least, warmup = (3, 1) if arguments.quick else (5, 2)
    times = interleave(operation.contestants, budget=arguments.budget, device=arguments.device, least=least, warmup=warmup, seed=arguments.seed)
    # the same in every process
    transient = {c.name: transient_bytes(c.run, arguments.device, warm=True) for c in operation.contestants} if not arguments.seed else {}
    return {**result, "times": times.times, "faults": times.faults, "transient": transient}


def _failed(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def worker(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure in this process, as its environment says."""
    stop = time.monotonic() + arguments.limit
    for group in groups(arguments.quick, arguments.device):
        if not _wanted(group, arguments):
            continue
        batch = None
        for make in group.operations:
            about = {"group": group.name, "pages": arguments.pages}
            if time.monotonic() > stop:
                yield {**about, "left_out": f"{group.name}: the time limit was reached"}
                break
            started = time.monotonic()
            try:
                batch = group.batch().to(arguments.device) if batch is None else batch
                result = measure(make(batch), batch, arguments)
            except Exception as error:  # one operation that fails must not cost the others
                yield {**about, "left_out": f"{group.name}: {_failed(error)}", "failed": True}
                continue
            yield {**about, **result, "seconds": round(time.monotonic() - started, 1)}


def _wanted(group: Group, arguments: argparse.Namespace) -> bool:
    return group.name == arguments.group if arguments.group else arguments.only in group.name


def _write_worker(arguments: argparse.Namespace) -> None:
    """A worker's results, rewritten after every operation, so that an end from outside loses only the last one."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    content = {"environment": environment(arguments.device), "busy": busy_note(), "results": []}
    for result in worker(arguments):
        content["results"].append(result)
        partial = Path(arguments.write + ".part")
        report.write_json(partial, content)
        partial.replace(arguments.write)


def _in_process(arguments: argparse.Namespace, pages: str, group: str | None, seed: int, limit: float) -> dict[str, Any]:
    """Run a worker under one page condition; what it found."""
    variables = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    if pages == "huge":
        variables["THP_MEM_ALLOC_ENABLE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "worker.json"
        options = dict(pages=pages, write=path, seed=seed, device=arguments.device, budget=arguments.budget, limit=limit)
        options.update(threads=arguments.threads, only=arguments.only, **({"group": group} if group else {}))
        command = [sys.executable, "-m", "benchmarks.bench_merge", *(f"--{k}={v}" for k, v in options.items())]
        command += ["--quick"] if arguments.quick else []
        subprocess.run(command, env=variables, cwd=RESULTS.parent.parent, check=False)
        if not path.exists():
            return {"results": [{"group": group, "pages": pages, "left_out": f"{group or 'the worker'}: ended without results", "failed": True}]}
        return json.loads(path.read_text())


def _pool(run: dict[str, Any], found: dict[str, Any]) -> None:
    """Add a process's results to a condition's: rounds of the same operation on the same batch are pooled."""
    for name in ("environment", "busy"):
        run[name] = run.get(name) or found.get(name)
    for result in found["results"]:
        same = [r for r in run["results"] if _key(r) == _key(result) and "times" in r and "times" in result]
        if not same:
            run["results"].append(result)
            continue
        for field in ("times", "faults"):
            for name, values in result[field].items():
                same[0][field][name] += values
        same[0]["processes"] = same[0].get("processes", 1) + 1


def _key(result: dict[str, Any]) -> tuple:
    return result.get("group"), result.get("operation"), result.get("batch")


def run_all(arguments: argparse.Namespace, conditions: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Every group under every condition, side by side in time: condition -> environment and results."""
    chosen = [group for group in groups(arguments.quick, arguments.device) if _wanted(group, arguments)]
    together = arguments.quick or arguments.device == "cuda"  # one process: starting one costs more than it gives
    jobs = [(None, 0)] if together else [(g.name, seed) for g in chosen for seed in range(g.processes)]
    stop = time.monotonic() + arguments.limit
    runs: dict[str, dict[str, Any]] = {pages: {"results": []} for pages in conditions}
    progress = progress_bar(len(jobs) * len(conditions))
    for group, seed in jobs:
        for pages in conditions:
            progress(f"{group or 'all'}, {pages} pages")
            _pool(runs[pages], _in_process(arguments, pages, group, seed, max(0.0, stop - time.monotonic())))
    progress(None)
    return runs


def progress_bar(total: int) -> Callable[[str | None], None]:
    """Told what begins; None at the end."""
    try:
        from tqdm import tqdm
    except ImportError:
        begun = [0]

        def tick(name: str | None) -> None:
            if sys.stderr.isatty():
                print("\r" + (f"{begun[0]}/{total} done, now {name}" if name else "").ljust(78), end="", file=sys.stderr, flush=True)
            begun[0] += 1

        return tick
    bar = tqdm(total=total, disable=None)
    running = []  # a bar without a terminal keeps no postfix

    def tick(name: str | None) -> None:
        bar.update(len(running))
        running[:] = [name]
        bar.set_postfix_str(name or "done")
        if name is None:
            bar.close()

    return tick


def write_report(folder: Path, runs: dict[str, dict[str, Any]]) -> tuple[str, bool]:
    """Files of a run; returns the text to print and whether all went well: nothing refused, nothing failed."""
    results = [result for run in runs.values() for result in run["results"]]
    measured = [result for result in results if "operation" in result]
    targets = evaluate(measured)
    notes = sorted({run["busy"] for run in runs.values() if run.get("busy")})
    notes += [f"left out: {reason}" for reason in dict.fromkeys(r["left_out"] for r in results if "left_out" in r)]
    transient = report.transient_note(measured, operations.OURS)
    summary = [report.targets_table(targets) if targets else "No target is measured by this run."]
    summary += [transient] if transient else []
    text = ["# merge, measured", "", *(f"- {note}" for note in notes), ""]
    for pages, run in runs.items():
        text += [f"**{report.PAGES.get(pages, pages)}**", "", report.environment_table(run.get("environment") or {}), ""]
    text += ["Medians of interleaved rounds; a ratio is the median of the ratios within a round. GB/s counts the bytes that"]
    text += ["the copy reads and writes. Faults are page faults of one call, of 4 KiB or more.", ""]
    text += ["## Targets", "", *summary, report.results_table(measured), ""]
    folder.mkdir(parents=True, exist_ok=True)
    report.write_json(folder / "results.json", runs)
    (folder / "results.md").write_text("\n".join(text))
    report.plot(measured, folder / "results.png")
    roofline.write(measured, folder)
    refused = [result["refused"] for result in measured if "refused" in result]
    printed = [*notes, *(f"REFUSED: {reason}" for reason in refused), *summary, f"\nWritten to {folder}"]
    failed = any("failed" in result for result in results)
    return "\n".join(printed), bool(measured) and not refused and not failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_merge", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small batches, about a minute")
    parser.add_argument("--only", default="", help="only groups whose name contains this")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=0, help="of torch; default its own choice")
    parser.add_argument("--budget", type=float, default=None, help="seconds for the rounds of one operation in one process")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds for everything; what is left then is left out")
    parser.add_argument("--name", default=None, help="folder below benchmarks/results")
    parser.add_argument("--out", default=None, help="folder, instead of one below benchmarks/results")
    parser.add_argument("--pages", default="both", choices=["both", "default", "huge", "gpu"], help="page conditions, CPU")
    for hidden, kind in (("group", str), ("write", str), ("seed", int)):
        parser.add_argument(f"--{hidden}", type=kind, default=0 if kind is int else None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.budget = arguments.budget or (0.25 if arguments.quick else 2.0)
    if arguments.write:
        _write_worker(arguments)
        return 0
    conditions = ("gpu",) if arguments.device == "cuda" else {"both": ("default", "huge")}.get(arguments.pages, (arguments.pages,))
    runs = run_all(arguments, conditions)
    folder = RESULTS / (arguments.name or f"{arguments.device}-{time.strftime('%Y-%m-%d')}")
    printed, good = write_report(Path(arguments.out) if arguments.out else folder, runs)
    print(printed)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
