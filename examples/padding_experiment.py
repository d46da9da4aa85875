"""Where should the padding of a vision-language batch go? A small model trained with each of the answers there have been.

    python -m examples.padding_experiment            3 seeds, under 5 minutes on 2 cores
    python -m examples.padding_experiment --quick    one seed, a few steps: to see that it runs
    python -m examples.padding_experiment --steps 1200 --schemes left packed not_isolated    does it pass with more training?

The same samples in the same order, as many a step, for each scheme (`padding_schemes.py`). Accuracy is that of the answer's token
on held-out digits, with prompts formatted as in training, and with prompts alone and without any padding, which is what a user sends
later. Useful is the share of rows that are tokens. A run is one process with one thread, and as many run at a time as there are cores: the
same seed gives the same numbers whatever else runs. Speed is measured before that, with torch's own number of threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import timing

from .digit_questions import draw, guessing
from .padding_schemes import CAPACITY, SCHEMES, Batch, batch_of
from .small_vlm import POSITIONS, SmallVLM

RESULTS = Path(__file__).parent.parent / "out" / "padding_experiment"
SAMPLES = 64  # a step
CHECKS = 2  # times that accuracy is looked at: half-way and at the end
MEASURED = ("halfway", "as_trained", "alone", "loss", "guessing")  # of each run, summed up over the seeds
BASE = "placeholders"  # what speeds are compared with


def logits_of(model: SmallVLM, batch: Batch) -> torch.Tensor:
    """``(samples, vocabulary)``: of the answers."""
    hidden = model(batch.rows, batch.position_ids, batch.attend)
    return model.head(hidden.flatten(0, 1)[batch.asks])


def step(model: SmallVLM, optimizer: torch.optim.Optimizer, scheme: str, samples: list) -> tuple[float, Batch]:
    """One step of training: its loss and the batch."""
    batch = batch_of(scheme, model, samples)
    loss = F.cross_entropy(logits_of(model, batch), batch.answers)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item(), batch


@torch.no_grad()
def accuracy(model: SmallVLM, scheme: str, samples: list) -> float:
    """Share of answers that are right, the samples formatted by the scheme ("packed" is what each would give alone)."""
    right = 0
    for start in range(0, len(samples), SAMPLES):
        batch = batch_of(scheme, model, samples[start : start + SAMPLES])
        right += int((logits_of(model, batch).argmax(-1) == batch.answers).sum())
    return right / len(samples)


def train(scheme: str, positions: str, seed: int, steps: int, held_out: int) -> dict:
    """One run; nothing of it depends on the machine's other work but its time."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = SmallVLM(positions, CAPACITY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    samples, test = draw(steps * SAMPLES, seed), draw(held_out, seed, held_out=True)
    losses, curve, useful, rows = [], [], 0, 0
    for number in range(steps):
        loss, batch = step(model, optimizer, scheme, samples[number * SAMPLES : (number + 1) * SAMPLES])
        schedule.step()
        losses.append(loss)
        useful, rows = useful + batch.useful, rows + batch.kinds.numel()
        if (number + 1) * CHECKS % steps < CHECKS:
            curve.append(dict(step=number + 1, as_trained=accuracy(model, scheme, test), alone=accuracy(model, "packed", test)))
    return dict(
        scheme=scheme, positions=positions, seed=seed, loss=statistics.mean(losses[-max(1, steps // 10) :]), as_trained=curve[-1]["as_trained"],
        alone=curve[-1]["alone"], halfway=curve[0]["as_trained"], guessing=guessing(samples, test), curve=curve, useful=useful / rows,
    )  # fmt: skip


def speeds(schemes: list[str], rounds: int) -> list[dict]:
    """Useful tokens a second in training steps; every scheme with each kind of positions once a round, ratios within the round."""
    samples = draw(SAMPLES, 0)
    useful = sum(sample.tokens for sample in samples)
    lines = []
    contestants = []
    for positions in POSITIONS:
        for scheme in dict.fromkeys([*schemes, BASE]):
            model = SmallVLM(positions, CAPACITY)
            optimizer = torch.optim.AdamW(model.parameters())
            run = lambda model=model, optimizer=optimizer, scheme=scheme: step(model, optimizer, scheme, samples)
            contestants.append(timing.Contestant(f"{positions} {scheme}", run))
    times = timing.interleave(contestants, budget=0, least=rounds)
    for positions in POSITIONS:
        for scheme in schemes:
            name, base = f"{positions} {scheme}", f"{positions} {BASE}"
            # twice the time is half the speed
            ratios = [1 / ratio for ratio in times.ratios(name, base)]
            found = dict(tokens_per_second=useful / times.median(name), ratio=[timing.quantile(ratios, q) for q in (0.5, 0.2, 0.8)])
            lines.append(dict(scheme=scheme, positions=positions, **found, seconds=times.times[name]))
    return lines


def summary(runs: list[dict], speed: list[dict]) -> list[dict]:
    """A line for each scheme and kind of positions: mean, lowest and highest seed; of speed the median, 20th and 80th percentile."""
    lines = []
    for timed in speed:
        own = [run for run in runs if all(run[name] == timed[name] for name in ("scheme", "positions"))]
        line = {name: value for name, value in timed.items() if name != "seconds"}
        line.update(seeds=len(own), useful=statistics.mean(run["useful"] for run in own))
        for name in MEASURED:
            values = [run[name] for run in own]
            line[name] = [statistics.mean(values), min(values), max(values)]
        lines.append(line)
    return lines


def spread(found: list[float], percent: bool = False) -> str:
    """"mean (lowest to highest)"."""
    mean, low, high = (f"{100 * value:.1f}" if percent else f"{value:.3f}" for value in found)
    return f"{mean} ({low} to {high})"


def table(lines: list[dict]) -> str:
    """Markdown."""
    heads = ["positions", "scheme", "accuracy, % as trained", "% alone, no padding", "% as trained, half-way", "loss at the end", "useful rows", "tokens/s", "times c"]
    shown = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for line in lines:
        cells = [line["positions"], SCHEMES[line["scheme"]], *(spread(line[name], True) for name in ("as_trained", "alone", "halfway")), spread(line["loss"])]
        cells += [f"{100 * line['useful']:.0f} %", f"{line['tokens_per_second']:,.0f}", "{:.2f} ({:.2f} to {:.2f})".format(*line["ratio"])]
        shown.append(f"| {' | '.join(cells)} |")
    guessed = f"Whoever reads the questions and sees no image is right in {spread(lines[0]['guessing'], True)} % of them."
    return "\n".join([*shown, "", guessed])


def environment() -> dict:
    """Where and of what it was made."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent, check=False).stdout.strip()

    facts = {name: value for name, value in timing.environment().items() if name in ("cpu", "cores", "threads", "python", "torch", "date", "load")}
    packages = {name: version(name) for name in ("numpy", "scikit-learn")}
    changed = git("status", "--porcelain", ".", "../vlm_fuse", "../csrc").split("\n")
    # a commit says nothing of what was changed since
    return dict(facts, **packages, commit=git("rev-parse", "HEAD") or None, changed_since=", ".join(line[2:].strip() for line in changed if line) or None)


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--held-out", type=int, default=1024, help="samples of the test")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="all, if none is named")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    asked = parser.parse_args(arguments)
    if asked.quick:
        asked.seeds, asked.steps, asked.held_out = 1, 8, 64
    facts, began = environment(), time.perf_counter()
    speed = speeds(asked.schemes, 2 if asked.quick else 15)
    tasks = [(scheme, positions, seed) for seed in range(asked.seeds) for positions in POSITIONS for scheme in asked.schemes]
    if asked.quick:
        runs = [train(*task, asked.steps, asked.held_out) for task in tasks]
    else:
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            runs = list(pool.map(train, *zip(*tasks), [asked.steps] * len(tasks), [asked.held_out] * len(tasks)))
    lines = summary(runs, speed)
    settings = dict(seeds=asked.seeds, steps=asked.steps, samples_a_step=SAMPLES, held_out=asked.held_out, row=CAPACITY, seconds=round(time.perf_counter() - began, 1))
    asked.out.mkdir(parents=True, exist_ok=True)
    content = dict(environment=facts, settings=settings, summary=lines, runs=runs, speed=speed)
    (asked.out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    text = ["# Where the padding goes", "", *(f"{name}: {value}  " for name, value in {**facts, **settings}.items()), "", table(lines)]
    (asked.out / "results.md").write_text("\n".join(text) + "\n")
    from .padding_plot import draw_results

    draw_results(asked.out / "results.png", lines)
    print(table(lines))
    print(f"{settings['seconds']:.0f} s; written to {asked.out}")
    return asked.out


if __name__ == "__main__":
    main()
