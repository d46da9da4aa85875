"""Time M-RoPE positions against transformers' get_rope_index.

    python -m benchmarks.bench_positions            about a minute
    python -m benchmarks.bench_positions --quick    a few seconds

Contestants take turns of several calls within a round, ratios are taken within it; the first call of a turn, which finds cold
caches, is reported apart. What each returns is compared with transformers' to the
bit before it is timed; a batch in which one differs is refused, and the exit status 1. Writes positions.json (every round) and
positions.md to benchmarks/results/<name>/positions/ and prints whether the target was reached.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vlm_fuse
from benchmarks import report
from benchmarks.timing import Contestant, busy_note, environment, take_turns

RESULTS = Path(__file__).parent / "results"
SAMPLES, LENGTH = 8, 4096
OURS, REFERENCE, THEIRS = "vlm_fuse", "vlm_fuse, reference", "transformers"
TARGET = 50  # times faster than transformers

MODELS = {"qwen2_5_vl": "Qwen2_5_VLModel", "qwen3_vl": "Qwen3VLModel"}


class Load(NamedTuple):
    """A batch, and the model whose rules it follows."""

    name: str
    family: str
    types: Tensor
    attention_mask: Tensor | None
    image_grid_thw: Tensor
    video_grid_thw: Tensor
    second_per_grid_ts: Tensor | None = None

    @property
    def split(self) -> bool:
        return self.family == "qwen3_vl"


def batch(name: str, family: str, *, images: int = 0, videos: int = 0, frames: int = 8, padded: bool = False) -> Load:
    """Samples of equal length; images of a quarter to a whole of 1024 placeholders, text shared out between them."""
    generator = torch.Generator().manual_seed(0)
    split = family == "qwen3_vl"
    types = torch.zeros(SAMPLES, LENGTH, dtype=torch.int64)
    mask = torch.ones(SAMPLES, LENGTH, dtype=torch.int64)
    grids: dict[int, list[list[int]]] = {1: [], 2: []}
    for sample in range(SAMPLES):
        first = int(torch.randint(1, 600, (), generator=generator)) if padded and sample else 0
        mask[sample, :first] = 0
        pieces = []
        for kind in [1] * images + [2] * videos:
            h, w = (int(side) for side in torch.randint(16, 28 if kind == 1 else 20, (2,), generator=generator))
            t = 1 if kind == 1 else frames
            side = 1 if kind == 1 else 4
            h, w = max(h // side, 2), max(w // side, 2)
            grids[kind].append([t, 2 * h, 2 * w])
            pieces += [(kind, h * w)] * t if split else [(kind, t * h * w)]
        gap = (LENGTH - first - sum(size for _, size in pieces)) // (len(pieces) + 1)
        at = first
        for kind, size in pieces:
            at += gap
            types[sample, at : at + size] = kind
            at += size
    image_grid, video_grid = (torch.tensor(grids[kind], dtype=torch.int64).view(-1, 3) for kind in (1, 2))
    seconds = torch.full((len(video_grid),), 0.5) if len(video_grid) and not split else None
    return Load(name, family, types, mask if padded else None, image_grid, video_grid, seconds)


def loads() -> list[Load]:
    return [
        batch("4 images a sample", "qwen2_5_vl", images=4),
        batch("4 images a sample, left padded", "qwen2_5_vl", images=4, padded=True),
        batch("2 images and 2 videos a sample", "qwen2_5_vl", images=2, videos=2),
        batch("2 images and 2 videos a sample, frames apart", "qwen3_vl", images=2, videos=2),
        batch("text alone", "qwen2_5_vl"),
    ]


def ours(load: Load, backend: str):
    return vlm_fuse.mrope_position_ids(
        load.types, image_grid_thw=load.image_grid_thw, video_grid_thw=load.video_grid_thw, second_per_grid_ts=load.second_per_grid_ts,
        attention_mask=load.attention_mask, tokens_per_second=2, split_video_frames=load.split, backend=backend,
    )  # fmt: skip


def theirs(load: Load):
    """get_rope_index as the model calls it, without the model around it."""
    model = getattr(importlib.import_module(f"transformers.models.{load.family}.modeling_{load.family}"), MODELS[load.family])
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2))
    around = SimpleNamespace(config=config, get_vision_position_ids=lambda *args, **more: model.get_vision_position_ids(None, *args, **more))
    more = {} if load.split else {"second_per_grid_ts": load.second_per_grid_ts}
    grids = [grid if len(grid) else None for grid in (load.image_grid_thw, load.video_grid_thw)]
    return lambda: model.get_rope_index(around, load.types, load.types, *grids, attention_mask=load.attention_mask, **more)


def measure(load: Load, budget: float) -> dict[str, Any]:
    contestants = [
        Contestant(OURS, lambda: ours(load, "auto")),
        Contestant(REFERENCE, lambda: ours(load, "reference")),
        Contestant(THEIRS, theirs(load)),
    ]
    wanted = contestants[-1].run()
    for contestant in contestants:
        found = contestant.run()
        if not all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, wanted)):
            raise SystemExit(f"refused: {contestant.name} differs from transformers on {load.name}")
    times, first = take_turns(contestants, budget=budget, turn=0.1, least=5, most=60)
    rows = {name: times.row(name, OURS) | {"first_ms": 1e3 * statistics.median(first[name])} for name in times.times}
    placeholders = int((load.types > 0).sum())
    told = {"load": load.name, "family": load.family, "shape": [SAMPLES, LENGTH], "placeholders": placeholders}
    return told | {"rows": rows, "rounds": times.times, "first_calls": first}


def table(found: list[dict[str, Any]]) -> str:
    lines = ["| batch | placeholders | contestant | ms (20th, 80th percentile) | first call of a turn | times as long as vlm_fuse |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for result in found:
        for name, row in result["rows"].items():
            spread = f"{row['ms']:.3g} ({row['ms_p20']:.3g}, {row['ms_p80']:.3g})"
            lines.append(f"| {result['load']} ({result['family']}) | {result['placeholders']} | {name} | {spread} | {row['first_ms']:.3g} | {row['ratio']:.3g} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_positions", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--name", default=None, help="folder below benchmarks/results")
    parser.add_argument("--out", default=None, help="folder, instead of one below benchmarks/results")
    arguments = parser.parse_args()
    # neither needs a second thread at this size, and transformers' small tensor operations are slower with one on a busy machine
    torch.set_num_threads(1)
    note = busy_note()
    found = [measure(load, 1 if arguments.quick else 10) for load in loads()]
    least = min(result["rows"][THEIRS]["ratio"] for result in found if result["placeholders"])
    reached = f"at least {TARGET} times as fast as transformers: {'yes' if least >= TARGET else 'MISSED'}, {least:.3g} on the batch with the least"
    surroundings = environment("cpu")
    folder = Path(arguments.out) if arguments.out else RESULTS / (arguments.name or f"cpu-{time.strftime('%Y-%m-%d')}") / "positions"
    folder.mkdir(parents=True, exist_ok=True)
    report.write_json(folder / "positions.json", {"environment": surroundings, "busy": note, "results": found, "target": reached})
    import transformers

    heading = [
        "# M-RoPE positions",
        "",
        f"{SAMPLES} samples of {LENGTH} tokens, one thread; transformers {transformers.__version__}. Results equal to the bit.",
        "",
        *([f"- {note}", ""] if note else []),
        report.environment_table(surroundings),
        "",
        "",
    ]
    (folder / "positions.md").write_text("\n".join(heading) + table(found) + f"\n\n{reached}\n")
    print(*([note] if note else []), table(found), reached, f"\nWritten to {folder}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
