"""Host cost of an eager call: microseconds on a batch so small that the work itself costs nothing.

    python -m benchmarks.bench_overhead            about half a minute
    python -m benchmarks.bench_overhead --quick    a few seconds
    python -m benchmarks.bench_overhead --emulated the "cuda" backend without a GPU: its code as compiled for tests/emulator,
                                                   where a launch does nothing; neither the driver nor torch's allocator of a
                                                   GPU is in it. Rows stay unwritten, so that nothing is compared.

One thread, short rounds of every contestant in turn, the 10th percentile and the median over the rounds; garbage
collection off while the clock runs, as in timeit. A ready plan has its fields made, so that reading them again costs a
look-up. Writes overhead.json and overhead.md to benchmarks/results/<name>/ and prints the differences to F.embedding.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
import torch.nn.functional as F

import vlm_fuse
from benchmarks import baselines, report
from benchmarks.timing import Contestant, Times, busy_note, environment, short_rounds
from tests.emulator import build
from vlm_fuse import autograd, ops
from vlm_fuse.backend import VARIABLE, name_from

RESULTS = Path(__file__).parent / "results"
SAMPLES, LENGTH, HIDDEN, VOCABULARY, IMAGE = 2, 16, 32, 64, 60
MODES = ("forward", "with gradient", "with backward")
EMBEDDING = "F.embedding"
READ = ("position_ids", "labels", "document_ids", "attention_mask", "cu_seqlens")
ROW_OP, READY, WHOLE = "row op, ready plan", "merge, ready plan", "merge"


class Limit(NamedTuple):
    """Microseconds beyond F.embedding in the same mode."""

    contestant: str
    mode: str
    at_most: float


#: a merge is measured in two layouts; its limits hold for both.
LIMITS = [
    Limit(ROW_OP, "forward", 1),
    Limit(ROW_OP, "with backward", 4),
    Limit(READY, "forward", 6),
    Limit(READY, "with gradient", 6 + 2),
    Limit(READY, "with backward", 6 + 6),
    Limit(WHOLE, "forward", 13),
    Limit(WHOLE, "with gradient", 13 + 2),
    Limit(WHOLE, "with backward", 13 + 6),
]


class Tiny(NamedTuple):
    """A batch of 2 samples of 16 tokens, 8 of them image, D = 32."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    text: torch.Tensor
    features: torch.Tensor
    weight: torch.Tensor


def tiny(device: str) -> Tiny:
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, IMAGE, (SAMPLES, LENGTH), generator=rng)
    ids[:, 2:6] = IMAGE
    mask = torch.ones(SAMPLES, LENGTH, dtype=torch.bool)
    mask[1, -3:] = False
    made = Tiny(
        ids,
        mask,
        ids.clone(),
        torch.randn(SAMPLES, LENGTH, HIDDEN, generator=rng),
        torch.randn(int((ids == IMAGE).sum()), HIDDEN, generator=rng),
        torch.randn(VOCABULARY, HIDDEN, generator=rng),
    )
    return Tiny(*(tensor.to(device) for tensor in made))


def read_all(merged) -> torch.Tensor:
    """The rows, after everything a model and a loss need has been read."""
    for name in READ:
        getattr(merged, name)
    return merged.inputs_embeds


def row_op(text: torch.Tensor, features: torch.Tensor, call: autograd.RowCall) -> torch.Tensor:
    """The row op below `merge`, with its guards and its choice of route."""
    return autograd.merge_rows(ops.direct(call.backend, text, (features,)), text, None, (features,), call)


def calls(batch: Tiny, text: torch.Tensor, features: torch.Tensor, weight: torch.Tensor, validate: str) -> dict[str, tuple[Callable, tuple]]:
    """What is timed: name -> (function to rows, the tensors that take a gradient)."""
    ids = batch.input_ids
    planned = dict(image_token_id=IMAGE, backend="cpu" if text.is_cpu else "auto")
    plan = vlm_fuse.plan(ids, **planned)
    mode, backend = ops.mode_of(validate, text), name_from("auto")
    row_call = autograd.RowCall(None, None, (0,), plan.source_index, None, False, text.dtype, mode, backend)
    both = (text, features)
    frozen = features.detach()
    made = {
        EMBEDDING: (lambda: F.embedding(ids, weight), (weight,)),
        "masked_scatter": (lambda: baselines.hf_masked_scatter(ids, text, features, IMAGE), both),
        "masked_scatter, checked": (lambda: baselines.hf_checked(ids, text, features, IMAGE), both),
        "clone and index": (lambda: baselines.nanovlm(ids, text, features, IMAGE), both),
        ROW_OP: (lambda: row_op(text, features, row_call), both),
        "row op, ready plan, images frozen": (lambda: row_op(text, frozen, row_call), (text,)),
    }
    for layout in ("keep", "packed"):
        given = dict(attention_mask=batch.attention_mask, labels=batch.labels, layout=layout, validate=validate)
        if layout == "packed" and (not text.is_cpu or validate == "async"):
            given["length"] = ids.numel()  # else the width is read back from the device
        ready = vlm_fuse.plan(ids, **planned, **given)
        made[f"{READY}, {layout}"] = (lambda ready=ready: read_all(vlm_fuse.merge(ids, text, features, plan=ready, validate=validate)), both)
        made[f"{WHOLE}, {layout}"] = (lambda given=given: read_all(vlm_fuse.merge(ids, text, features, image_token_id=IMAGE, **given)), both)
    made["merge, rows alone"] = (lambda: vlm_fuse.merge(ids, text, features, image_token_id=IMAGE, validate=validate).inputs_embeds, both)
    return made


def measure(mode: str, device: str, rounds: int, repeats: int, emulated: bool = False) -> Times:
    """All contestants in one mode."""
    batch = tiny(device)
    wanted = mode != "forward"
    text, features, weight = (t.clone().requires_grad_(wanted) for t in (batch.text, batch.features, batch.weight))
    contestants = []
    for name, (call, inputs) in calls(batch, text, features, weight, "async" if emulated else "auto").items():
        if mode == "with backward":
            grad = torch.ones_like(call())
            contestants.append(Contestant(name, lambda call=call, inputs=inputs, grad=grad: torch.autograd.grad(call(), inputs, grad)))
        else:
            contestants.append(Contestant(name, call))
    if not emulated:
        check(contestants, mode)
    gc.collect()
    gc.disable()
    try:
        settle = torch.cuda.synchronize if device == "cuda" else lambda: None
        return short_rounds(contestants, rounds=rounds, calls=repeats, settle=settle)
    finally:
        gc.enable()


def check(contestants: list[Contestant], mode: str) -> None:
    """All merges of the same layout agree to the bit, or nothing is reported."""
    found = {c.name: c.run() for c in contestants if c.name != EMBEDDING}
    expected = found["clone and index"]
    for name, result in found.items():
        if "packed" in name:
            continue
        pairs = zip(result, expected) if mode == "with backward" else [(result, expected)]
        if not all(torch.equal(a, b) for a, b in pairs):
            raise SystemExit(f"refused: {name} {mode} differs from clone and index")


def rows_of(times: Times) -> dict[str, dict[str, float]]:
    """Microseconds and the difference to F.embedding, by contestant."""
    base = times.times[EMBEDDING]
    low, middle = times.quantile(EMBEDDING, 0.1), times.median(EMBEDDING)
    return {
        name: {
            "p10_us": 1e6 * times.quantile(name, 0.1),
            "median_us": 1e6 * times.median(name),
            "p10_difference_us": 1e6 * (times.quantile(name, 0.1) - low),
            "median_difference_us": 1e6 * (times.median(name) - middle),
            "rounds": len(base),
        }
        for name in times.times
    }


def verdicts(found: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """Every limit against every layout it holds for, by the 10th percentile."""
    made = []
    for limit in LIMITS:
        for name, row in found[limit.mode].items():
            if name == limit.contestant or name in (f"{limit.contestant}, keep", f"{limit.contestant}, packed"):
                value = row["p10_difference_us"]
                made.append(
                    dict(
                        contestant=name,
                        mode=limit.mode,
                        at_most_us=limit.at_most,
                        measured_us=value,
                        median_us=row["median_difference_us"],
                        reached=value <= limit.at_most,
                    )
                )
    return made


def tables(found: dict[str, dict[str, dict[str, float]]], judged: list[dict[str, Any]]) -> str:
    lines = ["| us, 10th percentile (median) |" + "".join(f" {mode} | beyond F.embedding |" for mode in MODES)]
    lines.append("| --- |" + " --- | --- |" * len(MODES))
    for name in found["forward"]:
        cells = "".join(
            f" {row['p10_us']:.2f} ({row['median_us']:.2f}) | {row['p10_difference_us']:+.2f} |" for row in (found[mode][name] for mode in MODES)
        )
        lines.append(f"| {name} |{cells}")
    lines += [
        "",
        "| limit: us beyond F.embedding | mode | at most | measured, 10th percentile (median) | reached |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in judged:
        lines.append(
            f"| {row['contestant']} | {row['mode']} | {row['at_most_us']:g} | {row['measured_us']:.2f} "
            f"({row['median_us']:.2f}) | {'yes' if row['reached'] else 'MISSED'} |"
        )
    return "\n".join(lines)


def emulate() -> None:
    """Before the backends are looked for: "cuda" becomes the emulated module, and the one that is used."""
    os.environ |= {"VLM_FUSE_EMULATOR_IDLE": "1", VARIABLE: "cuda"}
    build.install()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--emulated", action="store_true", help="the host's part of the CUDA backend, on CPU tensors; needs g++")
    parser.add_argument("--name", default=None, help="folder below benchmarks/results")
    parser.add_argument("--out", default=None, help="folder, instead of one below benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.emulated:
        emulate()
    note = busy_note()
    # short enough to fit between two interruptions of a shared machine
    rounds, repeats = (100, 10) if arguments.quick else (1000, 10)
    timed = {mode: measure(mode, arguments.device, rounds, repeats, arguments.emulated) for mode in MODES}
    found = {mode: rows_of(times) for mode, times in timed.items()}
    judged = verdicts(found)
    text = tables(found, judged)
    surroundings = environment(arguments.device)
    folder = Path(arguments.out) if arguments.out else RESULTS / (arguments.name or f"{arguments.device}-{time.strftime('%Y-%m-%d')}")
    folder.mkdir(parents=True, exist_ok=True)
    report.write_json(
        folder / "overhead.json",
        {
            "environment": surroundings,
            "busy": note,
            "summary": found,
            "limits": judged,
            "rounds": {mode: times.times for mode, times in timed.items()},
        },
    )
    heading = [
        "# Host cost of an eager call",
        "",
        f"{SAMPLES} samples of {LENGTH} tokens, D = {HIDDEN}, one thread."
        + (" The cuda backend on an emulator whose launches do nothing: the driver's cost comes on top." if arguments.emulated else ""),
        "",
        *([f"- {note}", ""] if note else []),
        report.environment_table(surroundings),
        "",
        "",
    ]
    (folder / "overhead.md").write_text("\n".join(heading) + text + "\n")
    print(*([note] if note else []), text, f"\nWritten to {folder}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
