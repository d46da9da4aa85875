"""Forward and backward with every contestant in a process of its own, as in the programs that use it.

    python -m benchmarks.bench_apart               cases A and B, about ten minutes
    python -m benchmarks.bench_apart --case A --rounds 5

In one process contestants share malloc's heap: what one of them leaves there spares another its page faults, or costs
it some. Here the processes take turns of a few calls: one runs while the others wait, in an order shuffled anew each
round, and ratios are taken within a round as everywhere. Writes the same files as bench_merge.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import batches, operations
from benchmarks.bench_merge import RESULTS, write_report
from benchmarks.timing import busy_note, cpu_clock, environment

CASES = {"A": batches.case_a, "B": batches.case_b, "C": batches.case_c}
BY_DEFAULT = ("A", "B")
CONDITIONS = ("default", "huge")
CALLS = 6  # in a turn; the first, with cold caches and sleeping threads, is not counted
WARM = 3  # runs that are not counted; after them malloc's thresholds have settled


class Process:
    """One contestant, waiting to be told to run."""

    def __init__(self, case: str, name: str, pages: str):
        variables = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
        if pages == "huge":
            variables["THP_MEM_ALLOC_ENABLE"] = "1"
        command = [sys.executable, "-m", "benchmarks.bench_apart", "--case", case, "--contestant", name]
        self.name = name
        self.running = subprocess.Popen(
            command, env=variables, cwd=RESULTS.parent.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def answer(self) -> list[str]:
        line = self.running.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended with status {self.running.wait()}")
        return line.split()

    def run(self) -> tuple[float, int]:
        """Seconds and page faults of one call, the medians of a turn."""
        self.running.stdin.write("go\n")
        seconds, faults = self.answer()
        return float(seconds), int(faults)

    def end(self) -> None:
        self.running.stdin.close()
        self.running.wait()


def contestant(case: str, name: str) -> None:
    """The other side: check the result, warm up, then a turn for each line that comes in."""
    operation = operations.forward_backward(CASES[case]())
    (own,) = [c for c in operation.contestants if c.name == name]
    operations.verify(operation._replace(contestants=[own]))
    for _ in range(WARM):
        cpu_clock(own.run)
    print("ready", flush=True)
    for _ in sys.stdin:
        calls = [cpu_clock(own.run) for _ in range(CALLS)][1:]
        print(statistics.median(seconds for seconds, _ in calls), statistics.median_low(faults for _, faults in calls), flush=True)


def measure(case: str, pages: str, rounds: int) -> dict:
    """One case in one page condition, as bench_merge stores it."""
    batch = CASES[case]()
    operation = operations.forward_backward(batch)
    processes = [Process(case, c.name, pages) for c in operation.contestants]
    for process in processes:
        process.answer()
    times: dict[str, list[float]] = {process.name: [] for process in processes}
    faults: dict[str, list[int]] = {process.name: [] for process in processes}
    order, shuffle = list(processes), random.Random(0).shuffle
    for done in range(rounds):
        shuffle(order)
        for process in order:
            seconds, faulted = process.run()
            times[process.name].append(seconds)
            faults[process.name].append(faulted)
        if sys.stderr.isatty():
            print(f"\r{case}, {pages} pages: round {done + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    for process in processes:
        process.end()
    return {
        "group": f"apart {case}",
        "pages": pages,
        **operations.described(operation, batch),
        "times": times,
        "faults": faults,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_apart", description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=sorted(CASES), default=None, help="default A and B")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", default=None, help="folder, instead of one below benchmarks/results")
    parser.add_argument("--contestant", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        contestant(arguments.case, arguments.contestant)
        return 0
    note = busy_note()
    runs = {}
    for pages in CONDITIONS:
        found = [measure(case, pages, arguments.rounds) for case in ([arguments.case] if arguments.case else BY_DEFAULT)]
        about = {**environment(), "THP_MEM_ALLOC_ENABLE": "1" if pages == "huge" else None}
        runs[pages] = {"environment": about, "busy": note, "results": found}
    folder = Path(arguments.out) if arguments.out else RESULTS / f"cpu-{time.strftime('%Y-%m-%d')}" / "apart"
    text, fine = write_report(folder, runs)
    print(text)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
