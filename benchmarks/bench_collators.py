"""What the collators cost beside a data pipeline that pads and stacks: the same samples, one worker.

    python -m benchmarks.bench_collators           one minute
    python -m benchmarks.bench_collators --quick

A step is what a data-loader worker does for one batch: decode JPEGs, resize, cut patches (Qwen2.5-VL's sizes), tokenize the
text, collate. The pipelines differ in the last part alone, which is timed by itself too: plain is
torch's pad_sequence for the tokens and torch.cat for the patches, with none of the checks, plans, positions or counts.
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from benchmarks import generator
from benchmarks.bench_merge import RESULTS
from benchmarks.presets import PRESETS
from benchmarks.report import write_json
from benchmarks.timing import Contestant, busy_note, environment, interleave
from vlm_fuse.packing import PackingCollator, PaddingCollator, pack_lengths

PRESET = PRESETS["qwen2.5-vl-7b"]
PATCH, MERGE, FRAMES = 14, 2, 2  # pixels a side of a patch, patches a side of a row, frames of a patch (Qwen2.5-VL)
CAPACITY = 8192
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def photographs(rows: list[int]) -> list[bytes]:
    """JPEGs of the pictures that scikit-learn ships, twice as large as the tower will see them, as pictures mostly are."""
    from sklearn.datasets import load_sample_images

    pictures = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    made = []
    for number, count in enumerate(rows):
        high, wide = grid_of(count)
        file = io.BytesIO()
        pictures[number % len(pictures)].resize((2 * wide * PATCH * MERGE, 2 * high * PATCH * MERGE)).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def grid_of(rows: int) -> tuple[int, int]:
    """(high, wide) of a picture of so many rows or a few less, about 3 to 4."""
    high = max(1, min(rows, round((rows * 0.75) ** 0.5)))
    return high, rows // high


def tokenizer():
    """Tekken, which mistral-common ships: text to ids."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    from examples.chat_batch import load_tokenizer

    found = load_tokenizer()
    return found if isinstance(found, Tekkenizer) else found.instruct_tokenizer.tokenizer


class Pipeline:
    """Samples before anything is done to them, and what a worker does to one."""

    def __init__(self, samples: list[generator.Sample]):
        self.encode = tokenizer()
        self.samples = samples
        self.grids = [[grid_of(image.rows) for image in sample.images] for sample in samples]
        self.jpegs = [photographs([high * wide for high, wide in grids]) for grids in self.grids]
        words = "the columns of this building are red and it stands on a hill among trees high above a wide lake with a few boats".split()
        rng = np.random.default_rng(0)
        self.texts = [" ".join(rng.choice(words, sample.text_tokens)) for sample in samples]

    def prepare(self, number: int) -> dict:
        """One sample, as Qwen2.5-VL's processor gives it."""
        text = self.encode.encode(self.texts[number], bos=False, eos=False)[: self.samples[number].text_tokens]
        ids, patches = [], []
        for (high, wide), jpeg in zip(self.grids[number], self.jpegs[number]):
            pixels = Image.open(io.BytesIO(jpeg)).convert("RGB").resize((wide * PATCH * MERGE, high * PATCH * MERGE), Image.Resampling.BICUBIC)
            patches.append(patchified(np.asarray(pixels), high, wide))
            ids += [PRESET.marks[0][0], *[PRESET.image_token_id] * (high * wide), PRESET.marks[1][0]]
        made = dict(input_ids=torch.tensor(ids + text), labels=torch.tensor([-100] * len(ids) + text))
        if patches:
            made["pixel_values"] = torch.from_numpy(np.concatenate(patches))
            made["image_grid_thw"] = torch.tensor([(1, high * MERGE, wide * MERGE) for high, wide in self.grids[number]])
        return made


def patchified(pixels: np.ndarray, high: int, wide: int) -> np.ndarray:
    """``(patches, 3 * 2 * 14 * 14)`` float32, the patches of a row next to each other, as Qwen's towers take them."""
    scaled = (pixels.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(DEVIATION)
    blocks = scaled.reshape(high, MERGE, PATCH, wide, MERGE, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    doubled = np.repeat(blocks.reshape(-1, 3, 1, PATCH, PATCH), FRAMES, axis=2)
    return doubled.reshape(len(doubled), -1)


def pad_and_stack(samples: list[dict]) -> dict:
    """What a collator does at the least."""
    ids = [sample["input_ids"] for sample in samples]
    return dict(
        input_ids=pad_sequence(ids, batch_first=True),
        labels=pad_sequence([sample["labels"] for sample in samples], batch_first=True, padding_value=-100),
        attention_mask=pad_sequence([torch.ones_like(own) for own in ids], batch_first=True),
        pixel_values=torch.cat([sample["pixel_values"] for sample in samples if "pixel_values" in sample]),
        image_grid_thw=torch.cat([sample["image_grid_thw"] for sample in samples if "image_grid_thw" in sample]),
    )


def collators() -> dict:
    given = dict(image_token_id=PRESET.image_token_id, video_token_id=PRESET.video_token_id)
    return {
        "pad and stack": pad_and_stack,
        "PaddingCollator": PaddingCollator(**given),
        "PackingCollator": PackingCollator(**given, length=CAPACITY),
        "PackingCollator, M-RoPE and weights": PackingCollator(**given, length=CAPACITY, mrope=True, loss_weights=True),
    }


def measure(row: list[int], pipeline: Pipeline, seconds: float) -> dict:
    """One row of samples: what preparing them takes, and each way to collate them."""
    prepared = [pipeline.prepare(number) for number in row]
    given = [Contestant("preparing", lambda: [pipeline.prepare(number) for number in row])]
    given += [Contestant(name, lambda collate=collate: collate(prepared)) for name, collate in collators().items()]
    times = interleave(given, budget=seconds, least=5, most=20)
    plain = times.median("preparing") + times.median("pad and stack")
    shown = {}
    for name in collators():
        # within a round, so that the machine's mood does not count
        more = sorted(own - base for own, base in zip(times.times[name], times.times["pad and stack"]))
        shown[name] = dict(ms=1e3 * times.median(name), overhead=more[len(more) // 2] / plain)
    tokens = sum(len(sample["input_ids"]) for sample in prepared)
    pixels = sum(sample["pixel_values"].numel() * 4 for sample in prepared if "pixel_values" in sample)
    return dict(samples=len(row), tokens=tokens, pixel_megabytes=pixels / 1e6, preparing_ms=1e3 * times.median("preparing"), step_ms=1e3 * plain, collators=shown, times=times.times)


def table(results: list[dict]) -> list[str]:
    names = list(results[0]["collators"])
    lines = [f"| samples | tokens | pixels, MB | a step, ms | {' | '.join(f'{name}, ms | of a step' for name in names)} |", "| --- |" + " --- |" * (3 + 2 * len(names))]
    for result in results:
        cells = [f"{found['ms']:.2f} | {100 * found['overhead']:+.2f} %" for found in result["collators"].values()]
        lines.append(f"| {result['samples']} | {result['tokens']} | {result['pixel_megabytes']:.0f} | {result['step_ms']:.0f} | {' | '.join(cells)} |")
    sums = [sum(result[name] for result in results) for name in ("tokens", "pixel_megabytes", "step_ms")]
    lines.append(f"| all | {sums[0]} | {sums[1]:.0f} | {sums[2]:.0f} | {' | '.join(together(results, name) for name in names)} |")
    return lines


def together(results: list[dict], name: str) -> str:
    """Over all rows: milliseconds, and what it takes beyond pad and stack as a share of all steps."""
    steps = sum(result["step_ms"] for result in results)
    more = sum(result["collators"][name]["overhead"] * result["step_ms"] for result in results)
    return f"{sum(result['collators'][name]['ms'] for result in results):.2f} | {100 * more / steps:+.2f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short rows")
    parser.add_argument("--name", default=f"cpu-{time.strftime('%Y-%m-%d')}", help="folder below benchmarks/results")
    parser.add_argument("--out", type=Path, default=None, help="folder, instead of one below benchmarks/results")
    asked = parser.parse_args()
    facts, note = environment(), busy_note()
    torch.set_num_threads(1)  # what a data-loader worker has
    samples = generator.draw("finevision_native", 60 if asked.quick else 400, seed=0, longest=CAPACITY)
    rows = pack_lengths([sample.tokens for sample in samples], CAPACITY, seed=0)
    with_images = [row for row in rows if sum(len(samples[i].images) for i in row)][: 1 if asked.quick else 6]
    results = [measure(list(range(len(row))), Pipeline([samples[i] for i in row]), 0.2 if asked.quick else 6.0) for row in with_images]
    lines = ["# Collators", "", *(f"{key}: {value}  " for key, value in facts.items()), *([f"**Note:** {note}"] if note else []), "",
             "Time of each way to collate the samples of a packed row, and what it takes beyond pad and stack as a share of the step", "(preparing the samples, then pad and stack). One thread, as in a worker.", "", *table(results)]  # fmt: skip
    folder = asked.out or RESULTS / asked.name / "collators"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "collators.json", dict(environment=facts, note=note, results=results))
    (folder / "collators.md").write_text("\n".join(lines) + "\n")
    print("\n".join(table(results)))
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
