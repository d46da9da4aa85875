"""Where should the padding of a vision-language batch go? A small model trained with each of the answers there have been.

    python -m examples.padding_experiment            3 seeds, under 5 minutes on 2 cores
    python -m examples.padding_experiment --quick    one seed, a few steps: to see that it runs

The same samples in the same order, as many a step, for each scheme (`padding_schemes.py`). Accuracy is that of the answer's token
on held-out digits, with prompts formatted as in training, and with prompts alone and without any padding, which is what a user sends
later. Useful is the share of rows that are tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F

from .digit_questions import draw
from .padding_schemes import CAPACITY, SCHEMES, Batch, batch_of
from .small_vlm import POSITIONS, SmallVLM

RESULTS = Path(__file__).parent.parent / "out" / "padding_experiment"
SAMPLES = 64  # a step
CHECKS = 2  # times that accuracy is looked at


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
        alone=curve[-1]["alone"], curve=curve, useful=useful / rows,
    )  # fmt: skip


def speeds(rounds: int) -> dict[str, list[float]]:
    """Useful tokens a second of training steps, scheme after scheme within each round, in shuffled order."""
    samples = draw(SAMPLES, 0)
    models = {scheme: SmallVLM("rope", CAPACITY) for scheme in SCHEMES}
    optimizers = {scheme: torch.optim.AdamW(model.parameters()) for scheme, model in models.items()}
    found: dict[str, list[float]] = {scheme: [] for scheme in SCHEMES}
    order, shuffle = list(SCHEMES), random.Random(0).shuffle
    for number in range(rounds + 2):
        shuffle(order)
        for scheme in order:
            began = time.perf_counter()
            _, batch = step(models[scheme], optimizers[scheme], scheme, samples)
            if number >= 2:  # after the warm-up
                found[scheme].append(batch.useful / (time.perf_counter() - began))
    return found


def summary(runs: list[dict], speed: dict[str, list[float]]) -> list[dict]:
    """A line for each scheme and kind of positions: means and extremes over the seeds."""
    lines = []
    for positions in POSITIONS:
        for scheme in SCHEMES:
            own = [run for run in runs if run["scheme"] == scheme and run["positions"] == positions]
            line = dict(scheme=scheme, positions=positions, seeds=len(own), useful=own[0]["useful"], tokens_per_second=statistics.median(speed[scheme]))
            for name in ("as_trained", "alone", "loss"):
                values = [run[name] for run in own]
                line[name] = [statistics.mean(values), min(values), max(values)]
            lines.append(line)
    return lines


def table(lines: list[dict]) -> str:
    """Markdown."""
    shown = ["| positions | scheme | accuracy, % as trained | % alone, no padding | loss at the end | useful rows | tokens/s |", "|" + " --- |" * 7]
    for line in lines:
        cells = [f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})" for mean, low, high in (line["as_trained"], line["alone"])]
        mean, low, high = line["loss"]
        shown.append(
            f"| {line['positions']} | {SCHEMES[line['scheme']]} | {' | '.join(cells)} | {mean:.3f} ({low:.3f} to {high:.3f}) "
            f"| {100 * line['useful']:.0f} % | {line['tokens_per_second']:,.0f} |"
        )
    return "\n".join(shown)


def environment() -> dict:
    """Where and of what it was made."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False).stdout.strip()
    return dict(commit=commit or None, date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), cores=os.cpu_count(), machine=platform.machine(), python=platform.python_version(), torch=torch.__version__)  # fmt: skip


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--held-out", type=int, default=1024, help="samples of the test")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    asked = parser.parse_args(arguments)
    if asked.quick:
        asked.seeds, asked.steps, asked.held_out = 1, 8, 64
    began = time.perf_counter()
    speed = speeds(2 if asked.quick else 15)
    tasks = [(scheme, positions, seed) for seed in range(asked.seeds) for positions in POSITIONS for scheme in SCHEMES]
    if asked.quick:
        runs = [train(*task, asked.steps, asked.held_out) for task in tasks]
    else:
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            runs = list(pool.map(train, *zip(*tasks), [asked.steps] * len(tasks), [asked.held_out] * len(tasks)))
    lines = summary(runs, speed)
    settings = dict(seeds=asked.seeds, steps=asked.steps, samples_a_step=SAMPLES, held_out=asked.held_out, row=CAPACITY, seconds=time.perf_counter() - began)
    asked.out.mkdir(parents=True, exist_ok=True)
    content = dict(environment=environment(), settings=settings, summary=lines, runs=runs, tokens_per_second=speed)
    (asked.out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    text = "\n".join(["# Where the padding goes", "", *(f"{name}: {value}  " for name, value in {**environment(), **settings}.items()), "", table(lines)])
    (asked.out / "results.md").write_text(text + "\n")
    from .padding_plot import draw_results

    draw_results(asked.out / "results.png", lines)
    print(table(lines))
    print(f"{settings['seconds']:.0f} s; written to {asked.out}")
    return asked.out


if __name__ == "__main__":
    main()
