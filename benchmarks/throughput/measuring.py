"""One model measured: losses compared first, then the contestants in turn, their memory, and one profiled step of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory
from benchmarks.timing import Contestant, interleave

from . import losses, profiled, samples, training, ways
from .subjects import Subject
from .ways import Way


def compared(subject: Subject, device: str, tick: Callable[[], None]) -> dict[str, dict[str, Any]]:
    """Of every contestant that runs here: how far the loss of any sample is from the one that the sample has alone.

    In float32, before the first step; what takes bfloat16 alone is compared under autocast and with its rounding.

    Returns:
        dict: by name `difference` and `tolerance`, both relative, and `equal`.
    """
    micros = list(subject.load.micros)
    alone = [one for whole in micros for one in samples.alone(whole, subject.shape, device)]
    stock = subject.ways[0]
    wanted = training.losses_of(stock, alone, device, torch.float32)
    found = {}
    for way in running(subject):
        dtype, tolerance = (torch.bfloat16, losses.HALF_TOLERANCE) if way.half_only else (torch.float32, losses.TOLERANCE)
        difference = losses.difference(training.losses_of(way, micros, device, dtype), wanted)
        found[way.name] = dict(difference=difference, tolerance=tolerance, equal=difference <= tolerance, dtype=str(dtype).removeprefix("torch."))
        tick()
    return found


def running(subject: Subject) -> list[Way]:
    """The contestants that run here."""
    return [way for way in subject.ways if way.why_not is None]


def refusals(subject: Subject, found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Contestants that get no time, and why: losses that are not those of the samples alone, or that cannot tell.

    Samples that see one another must show in the loss: else the comparison would say nothing about the others either.
    """
    made = {}
    for way in running(subject):
        facts = found[way.name]
        if way.isolated and not facts["equal"]:
            made[way.name] = f"a sample's loss differs by {facts['difference']:.1e} from the one that it has alone ({facts['tolerance']:.0e} is allowed)"
        elif not way.isolated and facts["equal"]:
            made[way.name] = "its samples see one another, and the losses do not show it: the comparison is blind"
    return made


def ticks(subject: Subject) -> int:
    """How often `measure` ticks at most: fewer rounds are timed on a machine that is slow."""
    return len(running(subject)) * (1 + 2 + subject.setting.rounds + 2)


def measure(subject: Subject, device: str, dtype: torch.dtype, tick: Callable[[], None], traces: Path | None = None) -> dict[str, Any]:
    """All that is reported of one model.

    Args:
        subject: of `subjects.subject`.
        device, dtype: where and how it is trained.
        tick: called for every contestant that is compared, timed (each time), weighed and profiled.
        traces: folder for the traces of one step before and after (as the project does it, and packed by vlm_fuse); None: none.
    """
    found = compared(subject, device, tick)
    refused = refusals(subject, found)
    chosen = [way for way in running(subject) if way.name not in refused]
    optimizer = training.optimizer_of(subject.model)
    steps = {way.name: training.step_of(way, optimizer, subject.load, device, dtype) for way in chosen}

    def prepared(way: Way) -> Callable[[], None]:
        def prepare() -> None:
            if way.prepare is not None:
                way.prepare()
            tick()

        return prepare

    how = subject.setting
    contestants = [Contestant(way.name, steps[way.name], prepared(way)) for way in chosen]
    for contestant in contestants:  # a first step takes several times as long as the others, from which the number of rounds is told
        contestant.prepare()
        contestant.run()
    times = interleave(contestants, budget=how.seconds, warmup=1, least=3, most=how.rounds, device=device)
    rows = {}
    for way in chosen:
        prepared(way)()
        optimizer.zero_grad()  # or those of the step before would be freed in this one
        peak = memory.peak_bytes(steps[way.name], device, warm=True)
        prepared(way)()
        name = {ways.STOCK: "trace_before.json.gz", ways.BY_VLM_FUSE: "trace_after.json.gz"}.get(way.name)
        with subject.parts():
            seen = profiled.profiled(steps[way.name], device, traces / name if traces is not None and name else None)
        rows[way.name] = row(subject, way, times.median(way.name), peak, seen)
    return dict(
        **facts(subject), losses=found, refused=refused, not_run={way.name: way.why_not for way in subject.ways if way.why_not is not None}, rows=rows,
        times=times.times,
    )  # fmt: skip


def row(subject: Subject, way: Way, seconds: float, peak: int, seen: profiled.Profile) -> dict[str, Any]:
    """What a table shows of one contestant."""
    return dict(
        layout=way.layout,
        seconds=seconds,
        tokens_per_second=subject.load.useful / seconds,
        peak_bytes=peak,
        between_share=seen.share(*profiled.BETWEEN),
        vision_share=seen.share("vision"),
        optimizer_share=seen.share("optimizer"),
        host_reads=seen.reads,
        host_waits=seen.waits,
        parts={name: part._asdict() for name, part in seen.parts.items()},
        profiled_us=seen.total,
    )


def facts(subject: Subject) -> dict[str, Any]:
    """What the model and its step are."""
    load, shape = subject.load, subject.shape
    return dict(
        key=subject.key,
        title=subject.title,
        size=subject.setting.size,
        parameters=sum(parameter.numel() for parameter in subject.model.parameters()),
        width=shape.preset.hidden_size,
        layers=shape.layers,
        vision_width=shape.vision_width,
        vision_layers=shape.vision_layers,
        vocabulary=shape.preset.vocab_size,
        distribution=load.distribution,
        samples=[[sample.tokens for sample in micro.samples] for micro in load.micros],
        images=sum(len(micro.sizes) for micro in load.micros),
        useful_tokens=load.useful,
        image_share=load.image_share,
        capacity=load.capacity,
        maximum=load.maximum,
        padding={layout: load.padding(layout) for layout in ("left", "right", "maximum", "packed")},
    )
