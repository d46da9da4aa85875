"""Time and transient memory of merge beside a plain copy of the same bytes, and beside what merge replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

import vlm_fuse
from benchmarks import baselines
from benchmarks.memory import transient_bytes
from benchmarks.timing import Contestant, interleave

from .chat_batch import ChatBatch, embed
from .checking import DTYPES, LAYOUTS, given, places, short

COLUMNS = ("", "rows out", "padding removed", "ms", "x copy", "transient MB")


REFERENCE_ROUNDS = 1  # nobody chooses it for its speed


class Line(NamedTuple):
    """A line of a table: what runs, and how many rows come out, which tells the copy that it is compared with."""

    name: str
    run: Callable
    rows: int


def tables() -> list[tuple[str, torch.dtype]]:
    """(device, dtype) of every table."""
    return [(device, dtype) for device in dict.fromkeys(device for _, device in places()) for dtype in DTYPES]


def ticks(rounds: int) -> int:
    """How often all tables together call `tick`."""
    return len(tables()) * (rounds + REFERENCE_ROUNDS)


def table(batch: ChatBatch, hidden: int, rounds: int, device: str, dtype: torch.dtype, tick: Callable[[], None]) -> str:
    """Runs every contestant once a round and formats the medians; ratios are taken within a round.

    The reference has a run of its own, in which the copies take turns with it as well.
    """
    lines = contestants(batch, hidden, device, dtype)
    copies = [line for line in lines if line.name.startswith("copy")]
    slow = [line for line in lines if line.name.startswith("reference")]
    fast = [line for line in lines if line not in slow]
    cells = [(f"{device}, {short(dtype)}", *COLUMNS[1:])]
    for shown, beside, count in ((fast, [], rounds), (slow, copies, REFERENCE_ROUNDS)):
        cells += measured(batch, shown, beside, copies, count, device, tick)
    return aligned(cells)


def measured(batch: ChatBatch, shown: list[Line], beside: list[Line], copies: list[Line], rounds: int, device: str, tick) -> list[tuple]:
    """The cells of the lines that are shown, after a run in which they take turns with those beside."""
    run = [Contestant(line.name, line.run) for line in beside + shown]
    times = interleave(run, budget=0, warmup=1, least=rounds, device=device, tick=tick)
    copy_of = {line.rows: line.name for line in copies}
    places = batch.input_ids.numel()
    padding = places - int(batch.attention_mask.sum())
    cells = []
    for line in shown:
        row = times.row(line.name, copy_of[line.rows])
        memory = transient_bytes(line.run, device) / 1e6
        cells.append((line.name, str(line.rows), f"{(places - line.rows) / padding:.0%}", f"{row['ms']:.2f}", f"{row['ratio']:.2f}", f"{memory:.2f}"))
    return cells


def contestants(batch: ChatBatch, hidden: int, device: str, dtype: torch.dtype) -> list[Line]:
    weight, features = embed(batch, hidden, dtype, device)
    rows = torch.cat(features)
    arguments = given(batch, device)
    ids, mask = arguments["input_ids"], arguments["attention_mask"]
    text = F.embedding(ids, weight)
    places, kept = ids.numel(), int(mask.sum())
    packed_text = text.flatten(0, 1)[:kept].clone()
    theirs = (ids, text, rows, batch.image_token_id)

    lines = [
        Line("copy, padded", text.clone, places),
        Line("copy, packed", packed_text.clone, kept),
        Line("Hugging Face masked_scatter", lambda: baselines.hf_masked_scatter(*theirs), places),
        Line("nanoVLM boolean index", lambda: baselines.nanovlm(*theirs), places),
        Line("Hugging Face, then packed", lambda: baselines.remove_padding(baselines.hf_masked_scatter, *theirs, mask), kept),
    ]
    for backend in [name for name, where in places_on(device)]:
        for layout in LAYOUTS:
            run = merging(arguments, inputs_embeds=text, image_embeds=rows, layout=layout, backend=backend)
            lines.append(Line(f"{backend}: {layout}", run, kept if layout == "packed" else places))
        run = merging(arguments, weight=weight, image_embeds=rows, layout="packed", backend=backend)
        lines.append(Line(f"{backend}: packed, lookup fused", run, kept))
    lines += with_backward(arguments, text, rows, device)
    return lines


def places_on(device: str) -> list[tuple[str, str]]:
    return [(name, where) for name, where in places() if where == device]


def merging(arguments: dict, **options) -> Callable:
    """A merge, and the reading of what a model asks of a packed batch (as `remove_padding` returns it)."""

    def run():
        merged = vlm_fuse.merge(**arguments, **options)
        if options["layout"] == "packed":
            return merged.inputs_embeds, merged.position_ids, merged.cu_seqlens
        return merged.inputs_embeds

    return run


def with_backward(arguments: dict, text, rows, device: str) -> list[Line]:
    """Forward and backward in the layout `keep`, gradients of text and images."""
    ids, token = arguments["input_ids"], arguments["image_token_id"]
    text, rows, towards = text.detach().requires_grad_(), rows.detach().requires_grad_(), torch.randn_like(text)

    def both(forward: Callable) -> Callable:
        return lambda: torch.autograd.grad(forward(), (text, rows), towards)

    lines = [
        Line("Hugging Face, with backward", both(lambda: baselines.hf_masked_scatter(ids, text, rows, token)), ids.numel()),
        Line("nanoVLM, with backward", both(lambda: baselines.nanovlm(ids, text, rows, token)), ids.numel()),
    ]
    for name, _ in places_on(device):
        run = merging(arguments, inputs_embeds=text, image_embeds=rows, layout="keep", backend=name)
        lines.append(Line(f"{name}: keep, with backward", both(run), ids.numel()))
    return lines


def aligned(cells: list[tuple[str, ...]]) -> str:
    """Cells as text: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  " + "  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in cells
    )
