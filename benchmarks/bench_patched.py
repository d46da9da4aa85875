"""Time and host reads of transformers models, as they are and patched by vlm_fuse.

    python -m benchmarks.bench_patched            about two minutes
    python -m benchmarks.bench_patched --quick    small models; on a CPU in float32, since many have no bfloat16 and take minutes
    python -m benchmarks.bench_patched --device cuda

Models of the width of Qwen2.5-VL 3B and LLaVA 1.5 with few layers and random weights: what a step spends beside the merge grows
with the layers, what the merge costs does not. The same model is timed in turn, patched and unpatched; loss and gradients must be
equal to the bit first. Host reads are the profiler's counts of `aten::_local_scalar_dense` and `aten::nonzero` in one forward and
backward. Writes patched.json (every round) and patched.md to benchmarks/results/<name>/patched/.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
from torch import nn

from benchmarks import report
from benchmarks.timing import Contestant, busy_note, environment, interleave
from vlm_fuse.integrations.transformers import patch, unpatch

RESULTS = Path(__file__).parent / "results"
PATCHED, STOCK = "patched", "as it is"
COUNTED = ("masked_scatter", "masked_scatter_backward", "_local_scalar_dense", "nonzero")


class Load(NamedTuple):
    """A model, and the batch that it is called with."""

    name: str
    model: nn.Module
    batch: dict[str, Any]


def llava(quick: bool) -> Load:
    """LLaVA 1.5's 576 rows an image of 336 x 336 pixels; one image in each of two rows of 2048 tokens."""
    import transformers

    width, length = (256, 1024) if quick else (4096, 2048)
    image = 1000
    text = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=width // 128, vocab_size=1001, max_position_embeddings=length
    )
    vision = transformers.CLIPVisionConfig(hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=image))
    ids = torch.randint(1, 1000, (2, length))
    ids[:, 20 : 20 + 576] = image
    return Load("LLaVA 1.5", model, dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(2, 3, 336, 336)))


def qwen2_5_vl(quick: bool) -> Load:
    """Images of 16 x 24 and 24 x 32 placeholders in each of two rows of 2048 tokens."""
    import transformers

    width, length = (256, 1024) if quick else (2048, 2048)
    image = 1000
    ids = dict(image_token_id=image, video_token_id=1001, vision_start_token_id=1002, vision_end_token_id=1003)
    text = dict(
        hidden_size=width, intermediate_size=width, num_hidden_layers=1, num_attention_heads=width // 128, num_key_value_heads=2, vocab_size=1004,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
    )  # fmt: skip
    vision = dict(hidden_size=64, intermediate_size=64, depth=1, num_heads=2, out_hidden_size=width, fullatt_block_indexes=[0])
    model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))
    grids = [(1, 32, 48)] if quick else [(1, 32, 48), (1, 48, 64)]
    tokens = torch.randint(1, 1000, (2, length))
    at = 20
    for _, height, across in grids:
        count = height * across // 4
        tokens[:, at - 1], tokens[:, at : at + count], tokens[:, at + count] = 1002, image, 1003
        at += count + 30
    grid = torch.tensor(grids * 2)
    pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14)
    batch = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=pixels, image_grid_thw=grid)
    return Load("Qwen2.5-VL 3B", model, batch | dict(mm_token_type_ids=(tokens == image).int()))


def forward(load: Load) -> torch.Tensor:
    """The hidden states alone: a head of the whole vocabulary would outweigh the rest."""
    return load.model.model(**load.batch, use_cache=False).last_hidden_state


def step(load: Load) -> list[torch.Tensor]:
    load.model.zero_grad()
    states = forward(load)
    states.backward(torch.ones_like(states))
    return [states.detach(), *(parameter.grad for parameter in load.model.parameters() if parameter.grad is not None)]


def host_reads(run: Callable[[], Any]) -> dict[str, int]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    counts = Counter(event.name for event in profile.events())
    return {name: counts[f"aten::{name}"] for name in COUNTED}


def measure(load: Load, device: str, dtype: torch.dtype, quick: bool) -> dict[str, Any]:
    budget, least = (2, 3) if quick else (20, 7)
    load.model.to(device, dtype).train()
    load = load._replace(batch={name: _sent(value, device, dtype) for name, value in load.batch.items()})
    stock = [value.clone() for value in step(load)]
    reads = {STOCK: host_reads(lambda: step(load))}
    started = time.perf_counter()
    patch(load.model)
    first = time.perf_counter() - started
    if not all(map(torch.equal, step(load), stock)):
        raise SystemExit(f"refused: the patched {load.name} differs")
    reads[PATCHED] = host_reads(lambda: step(load))
    unpatch(load.model)
    started = time.perf_counter()
    patch(load.model)
    again = time.perf_counter() - started
    unpatch(load.model)
    rows, rounds = {}, {}
    for operation, run in (("forward", forward), ("forward and backward", step)):
        # each undoes what the other left before the clock starts
        contestants = [Contestant(STOCK, lambda run=run: run(load), lambda: unpatch(load.model)), Contestant(PATCHED, lambda run=run: run(load), lambda: _patched(load))]
        times = interleave(contestants, budget=budget, least=least, most=60, device=device)
        unpatch(load.model)
        rows[operation] = {name: times.row(name, STOCK) for name in times.times}
        rounds[operation] = times.times
    shape = list(load.batch["input_ids"].shape)
    placeholders = int((load.batch["input_ids"] == 1000).sum())
    return dict(load=load.name, shape=shape, width=load.model.get_input_embeddings().embedding_dim, placeholders=placeholders, host_reads=reads,
                patch_ms=[1e3 * first, 1e3 * again], rows=rows, rounds=rounds)  # fmt: skip


def _patched(load: Load) -> None:
    unpatch(load.model)  # patches are counted
    patch(load.model)


def _sent(value, device: str, dtype: torch.dtype):
    return value.to(device, dtype if value.dtype.is_floating_point else value.dtype)


def table(found: list[dict[str, Any]]) -> str:
    lines = ["| model | operation | as it is, ms (20th, 80th percentile) | patched, ms | patched / as it is |", "| --- | --- | --- | --- | --- |"]
    for result in found:
        for operation, rows in result["rows"].items():
            cells = [f"{rows[name]['ms']:.4g} ({rows[name]['ms_p20']:.4g}, {rows[name]['ms_p80']:.4g})" for name in (STOCK, PATCHED)]
            ratio = rows[PATCHED]
            spread = f"{ratio['ratio']:.3f} ({ratio['ratio_p20']:.3f}, {ratio['ratio_p80']:.3f})"
            lines.append(f"| {result['load']}, {result['shape']} x {result['width']} | {operation} | {' | '.join(cells)} | {spread} |")
    lines += ["", f"| model | in one forward and backward | {' | '.join(COUNTED)} |", "| --- |" * 1 + " --- |" * (1 + len(COUNTED))]
    for result in found:
        for name, counts in result["host_reads"].items():
            lines.append(f"| {result['load']} | {name} | {' | '.join(str(counts[counted]) for counted in COUNTED)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_patched", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models, fewer rounds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default=None, help="folder below benchmarks/results")
    parser.add_argument("--out", default=None, help="another folder")
    arguments = parser.parse_args()
    import transformers

    note = busy_note()
    torch.manual_seed(0)
    if arguments.device != "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)  # or two unpatched runs differ
    dtype = torch.float32 if arguments.quick and arguments.device == "cpu" else torch.bfloat16
    found = [measure(make(arguments.quick), arguments.device, dtype, arguments.quick) for make in (qwen2_5_vl, llava)]
    surroundings = environment(arguments.device)
    folder = Path(arguments.out) if arguments.out else RESULTS / (arguments.name or f"{arguments.device}-{time.strftime('%Y-%m-%d')}") / "patched"
    folder.mkdir(parents=True, exist_ok=True)
    report.write_json(folder / "patched.json", {"environment": surroundings, "busy": note, "results": found})
    heading = [
        "# transformers models, patched and as they are",
        "",
        f"transformers {transformers.__version__}, {str(dtype).removeprefix('torch.')}, one decoder layer, without the head. Outputs and gradients equal to the bit.",
        "",
        *([f"- {note}", ""] if note else []),
        report.environment_table(surroundings),
        "",
        "",
    ]
    (folder / "patched.md").write_text("\n".join(heading) + table(found) + "\n")
    print(*([note] if note else []), table(found), f"\nWritten to {folder}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
