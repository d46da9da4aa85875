"""Packing samples into rows: how full the rows are, and how many samples a second.

    python -m benchmarks.bench_packing            all distributions, then 100,000 samples into rows of 8192; two minutes
    python -m benchmarks.bench_packing --quick

Contestants: vlm_fuse's best fit (C++ and Python), the same from a stream with a buffer, first fit decreasing, and what nanoVLM does:
a knapsack over the samples of 64 rows at a time. Every contestant's rows are checked: each sample once, none over the row.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from benchmarks import generator
from benchmarks.bench_merge import RESULTS
from benchmarks.knapsack import greedy_knapsack
from benchmarks.report import write_json
from benchmarks.timing import Contestant, busy_note, environment, interleave
from vlm_fuse.packing import PackedStream, SampleSize, pack_lengths

MANY = ("finevision_native", 100_000, 8192)


def on_backend(name: str, lengths: list[int], capacity: int, **options) -> list[list[int]]:
    before = os.environ.get("VLM_FUSE_BACKEND")
    os.environ["VLM_FUSE_BACKEND"] = name
    try:
        return pack_lengths(lengths, capacity, **options)
    finally:
        del os.environ["VLM_FUSE_BACKEND"]
        if before is not None:
            os.environ["VLM_FUSE_BACKEND"] = before


def streamed(lengths: list[int], capacity: int) -> list[list[int]]:
    stream = PackedStream(range(len(lengths)), capacity, sizes=[SampleSize(length) for length in lengths], rank=0, world_size=1)
    return list(stream)


def contestants(lengths: list[int], capacity: int, samples: list[generator.Sample]) -> dict:
    images, patches = [len(sample.images) for sample in samples], [4 * sample.rows for sample in samples]
    budgets = dict(image_counts=images, max_images=max(max(images), 32), patch_counts=patches, max_patches=4 * capacity, max_documents=512)
    return {
        "vlm_fuse": lambda: on_backend("cpu", lengths, capacity),
        "vlm_fuse, all four budgets": lambda: on_backend("cpu", lengths, capacity, **budgets),
        "vlm_fuse in Python": lambda: on_backend("reference", lengths, capacity),
        "vlm_fuse stream, buffer of 1024": lambda: streamed(lengths, capacity),
        "first fit decreasing, Python": lambda: generator.first_fit_decreasing(lengths, capacity),
        "nanoVLM's knapsack": lambda: greedy_knapsack(lengths, capacity, rows=64),
    }


def checked(name: str, rows: list[list[int]], lengths: list[int], capacity: int) -> dict:
    if sorted(index for row in rows for index in row) != list(range(len(lengths))) or any(sum(lengths[i] for i in row) > capacity for row in rows):
        raise SystemExit(f"{name}: a sample is lost or repeated, or a row is too long; nothing is reported")
    return dict(rows=len(rows), fill=sum(lengths) / (len(rows) * capacity), documents_per_row=len(lengths) / len(rows))


def measure(distribution: str, count: int, capacity: int, seconds: float) -> dict:
    samples = generator.draw(distribution, count, seed=0, longest=capacity)
    lengths = [sample.tokens for sample in samples]
    given = contestants(lengths, capacity, samples)
    found = {name: checked(name, run(), lengths, capacity) for name, run in given.items()}
    times = interleave([Contestant(name, run) for name, run in given.items()], budget=seconds, warmup=1, least=3, most=15)
    for name, facts in found.items():
        facts["samples_per_second"] = len(lengths) / times.median(name)
    return dict(distribution=distribution, samples=len(lengths), capacity=capacity, tokens=sum(lengths), contestants=found, times=times.times)


def table(results: list[dict]) -> list[str]:
    lines = ["| samples | row | contestant | fill | rows | documents a row | samples a second |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for result in results:
        for name, facts in result["contestants"].items():
            lines.append(
                f"| {result['distribution']}, {result['samples']} | {result['capacity']} | {name} | {100 * facts['fill']:.2f} % | {facts['rows']} "
                f"| {facts['documents_per_row']:.1f} | {facts['samples_per_second']:,.0f} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    parser.add_argument("--name", default=f"cpu-{time.strftime('%Y-%m-%d')}", help="folder below benchmarks/results")
    parser.add_argument("--out", type=Path, default=None, help="folder, instead of one below benchmarks/results")
    asked = parser.parse_args()
    facts = environment()
    note = busy_note()
    results = []
    for name, distribution in generator.DISTRIBUTIONS.items():
        results.append(measure(name, 1000 if asked.quick else 8192, distribution.row, 0.1 if asked.quick else 1.0))
    name, count, capacity = MANY
    results.append(measure(name, 5000 if asked.quick else count, capacity, 0.1 if asked.quick else 20.0))
    lines = ["# Packing", "", *(f"{key}: {value}  " for key, value in facts.items()), *([f"**Note:** {note}"] if note else []), "", *table(results)]
    folder = asked.out or RESULTS / asked.name / "packing"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "packing.json", dict(environment=facts, note=note, results=results))
    (folder / "packing.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[-len(results[0]["contestants"]) - 2 :]))
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
