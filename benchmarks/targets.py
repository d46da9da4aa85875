"""What the row op and the masks should reach: thresholds, and whether a run reached them.

Two columns: what it must reach, and what it aims at. All are ratios of medians measured side by side. LLC is the
last-level cache. "huge" is a run with THP_MEM_ALLOC_ENABLE=1, "default" one without it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.operations import OURS, PLANNED
from benchmarks.timing import quantile

HF, NANOVLM = "hf", "nanovlm"

# contestants of bench_masks
RENDERED, FROM_IDS = "vlm_fuse", "vlm_fuse, from document_ids"
EAGER, COMPILED_MASK = "create_block_mask", "create_block_mask, compiled"
FILL, FULL, FLEX = "fill_", "torch.full", "compiled flex_attention"


class Target(NamedTuple):
    """`name` against `base` in one operation on one batch, in one page condition."""

    text: str
    operation: str
    batch: str  # how the batch's name begins
    pages: str  # "default" or "huge"
    name: str
    base: str
    must: float
    aim: float
    at_least: bool = False  # True: times faster (base over name), else at most (name over base)


def _faster(operation: str, batch: str, pages: str, other: str, must: float, aim: float) -> Target:
    return Target(f"{operation}: times faster than {other}", operation, batch, pages, OURS, other, must, aim, True)


TARGETS: list[Target] = [
    Target("forward, out given, larger than LLC / copy_", "forward, out given", "B", "default", OURS, "copy_", 0.85, 0.75),
    Target("forward, out given, smaller than LLC/2 / copy_", "forward, out given", "C", "default", OURS, "copy_", 1.15, 1.0),
    Target("forward, fresh, above 32 MiB / clone", "forward", "B", "default", OURS, "clone", 0.5, 0.4),
    Target("forward, fresh, above 32 MiB / clone", "forward", "B", "huge", OURS, "clone", 1.05, 0.97),
    Target("backward, gradients given / copy_", "backward, gradients given", "B", "default", OURS, "copy_", 1.0, 0.9),
    Target("backward, text frozen, gradients given / copy_", "backward, text frozen, gradients given", "B", "default", OURS, "copy_", 0.5, 0.38),
    Target("backward, fresh, above 32 MiB / clone", "backward", "B", "default", OURS, "clone", 0.7, 0.55),
    Target("fused embedding, out given, larger than LLC / copy_", "fused embedding, out given", "B", "default", OURS, "copy_", 1.0, 0.87),
    Target("in place, large / copy_ of image rows", "in place", "B", "default", OURS, "copy_ of image rows", 1.0, 0.75),
    _faster("forward", "A", "default", HF, 5, 6.5),
    _faster("forward", "B", "default", HF, 5, 6.5),
    _faster("forward", "B", "huge", HF, 5, 6.5),
    _faster("backward", "A", "default", HF, 30, 45),
    _faster("backward", "B", "default", HF, 30, 45),
    _faster("backward", "B", "huge", HF, 30, 45),
    *(
        _faster("forward + backward", "A", pages, other, limit, limit)
        for pages in ("default", "huge")
        for other, limit in ((HF, 30), ("hf checked", 30), (NANOVLM, 5))
    ),
    *(_faster("forward + backward", "B", "huge", other, limit, limit) for other, limit in ((HF, 25), ("hf checked", 25), (NANOVLM, 4))),
    *(_faster("forward + backward", "B", "default", other, limit, limit) for other, limit in ((HF, 8), ("hf checked", 8), (NANOVLM, 1.3))),
    *(
        Target(f"forward, out given: share of copy speed at {size} MiB", "forward, out given", f"G{size}", "gpu", PLANNED, "copy_", must, aim, True)
        for size, must, aim in ((8, 0.7, 0.85), (64, 0.92, 0.96), (512, 0.96, 0.98))
    ),
]

def _block_mask(name: str, length: str, other: str, limit: float) -> Target:
    made = "of a mask" if name == RENDERED else "from document_ids"
    return Target(f"BlockMask {made}: times faster than {other}", "BlockMask", length, "default", name, other, limit, limit, True)


def _fill(operation: str, length: str, fill: str) -> Target:
    where = "into memory that is there" if fill == FILL else "that allocates as well"
    return Target(f"{operation}: time over a fill {where}", operation, length, "default", RENDERED, fill, 1.2, 1.2)


MASK_TARGETS: list[Target] = [
    *(
        _block_mask(name, length, COMPILED_MASK, limit)
        for name in (RENDERED, FROM_IDS)
        for length, limit in (("4K", 50), ("16K", 200), ("64K", 400))
    ),
    *(_block_mask(name, length, EAGER, limit) for name in (RENDERED, FROM_IDS) for length, limit in (("4K", 800), ("16K", 4000))),
    *(
        _fill(operation, length, fill)
        for operation in ("dense", "additive float32", "additive bfloat16")
        for fill in (FILL, FULL)
        for length in ("2K", "4K", "8K", "16K")
    ),
    Target("BlockMask: time over the attention that it serves", "beside FlexAttention", "32K", "gpu", RENDERED, FLEX, 0.01, 0.01),
]

#: limits on one figure of a mask, not on a ratio: text -> most.
BLOCK_MASK_MIB = "BlockMask at T = 131072: MiB more, from document_ids on"
MASK_STATE = "state of a mask: bytes a token and pair"
GPU_MICROSECONDS = {"16K": 50.0, "64K": 150.0}
GPU_WAITS = "BlockMask: waits of the host"
MASK_LIMITS = {BLOCK_MASK_MIB: 64.0, MASK_STATE: 8.0, GPU_WAITS: 0.0}

#: transient bytes a token, beyond the output and the fields asked for.
TRANSIENT_PER_TOKEN = 64


class Reached(NamedTuple):
    target: Target
    value: float
    spread: tuple[float, float]  # 20th and 80th percentile

    @property
    def verdict(self) -> str:
        better = (lambda limit: self.value >= limit) if self.target.at_least else (lambda limit: self.value <= limit)
        return "aim" if better(self.target.aim) else "must" if better(self.target.must) else "MISSED"


def evaluate(results: list[dict[str, Any]], targets: list[Target] = TARGETS) -> list[Reached]:
    """Compare a run's results with the targets; targets that the run did not measure are left out.

    results: entries of bench_merge or bench_masks: operation, batch, pages, times {contestant: [seconds, ...]}.
    """
    reached = []
    for target in targets:
        for result in results:
            if (result["operation"], result["pages"]) != (target.operation, target.pages):
                continue
            if not result["batch"].startswith(target.batch + " ") or target.name not in result.get("times", {}):
                continue
            if target.base not in result["times"]:
                continue
            values = _ratios(result["times"], target)
            reached.append(Reached(target, values[1], (values[0], values[2])))
    return reached


def measured(text: str, batch: str, pages: str, most: float, value: float) -> Reached:
    """One figure against its limit."""
    return Reached(Target(text, "", batch, pages, "", "", most, most), value, (value, value))


def _ratios(times: dict[str, list[float]], target: Target) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile of the ratios round by round."""
    over, under = (target.base, target.name) if target.at_least else (target.name, target.base)
    ratios = [a / b for a, b in zip(times[over], times[under])]
    return quantile(ratios, 0.2), quantile(ratios, 0.5), quantile(ratios, 0.8)
