"""Every kind of mask as a picture: query rows downwards, keys to the right, a square where the row sees the key.

    python -m examples.draw_masks                       docs/pictures/masks.png
    python -m examples.draw_masks --out /tmp/pictures

Each is drawn from `mask.dense()`, and its title is the call that makes it. The same picture every time.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from torch import Tensor

from vlm_fuse import Attend, IntervalMask

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend has to be chosen first)
from matplotlib.colors import ListedColormap  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

ROWS = 24
LINE = 34  # characters of a title's line
OUT = Path(__file__).parent.parent / "docs" / "pictures"
COLUMNS = 4

PADDING, UNSEEN, IMAGES, DOCUMENTS = 0, 1, (2, 3), (4, 5, 6)
COLORS = ("#d3d6da", "#ffffff", "#ef8636", "#c4571b", "#3b76af", "#5fa05a", "#8c6bb1")
LEGEND = {"first, second, third document": DOCUMENTS, "first, second image": IMAGES, "padding": (PADDING,)}


class Kind(NamedTuple):
    """One mask of ROWS query rows and keys, and what its rows are."""

    name: str
    call: str
    mask: IntervalMask
    document_ids: Tensor  # (ROWS,), -1 = padding
    image_ids: Tensor  # (ROWS,), -1 = no image


def rows(*runs: tuple[int, int]) -> Tensor:
    """(id, length), one after the other, as one row of ids."""
    return torch.cat([torch.full((length,), number, dtype=torch.int32) for number, length in runs])


def written(attend: Attend, **more) -> str:
    """The call that makes it, in one line or two."""
    changed = {field.name: getattr(attend, field.name) for field in fields(attend) if getattr(attend, field.name) != field.default}
    kind = [f'"{changed.pop("kind")}"'] if "kind" in changed else []
    parts = kind + [f'{name}="{value}"' if isinstance(value, str) else f"{name}={value}" for name, value in changed.items()]
    call = ", ".join([f"Attend({', '.join(parts)})", *(f"{name}={value}" for name, value in more.items())])
    return call if len(call) <= LINE else call.replace(", ", ",\n", 1)


def block_diffusion(tokens: int, block: int) -> IntervalMask:
    """Rows 0 .. tokens are noised, the rows behind them the same tokens clean.

    A noised row sees its own block, and the clean blocks before it; a clean row sees the clean blocks up to its own.
    Source: arXiv 2503.09573.
    """
    begin = torch.arange(tokens, dtype=torch.int32) // block * block
    end = (begin + block).clamp(max=tokens)
    none = torch.zeros_like(begin)
    # clean rows see nothing before the first block; noised rows of the last block end where the clean ones begin
    apart, some = end < tokens, begin > 0
    lo = torch.cat([begin, none + tokens])
    hi = torch.cat([torch.where(apart, end, tokens + begin), tokens + end])
    lo2 = torch.cat([torch.where(apart & some, tokens, none), none])
    hi2 = torch.cat([torch.where(apart & some, tokens + begin, none), none])
    return IntervalMask(lo[None], hi[None], 2 * tokens, lo2[None], hi2[None])


def images_across_text(image_ids: Tensor) -> IntervalMask:
    """Causal, and all rows of two images see one another, whatever stands between them (Molmo 2)."""
    row = torch.arange(len(image_ids), dtype=torch.int32)
    first, second = ((image_ids == number).nonzero()[:, 0] for number in (0, 1))
    lo, hi, lo2, hi2 = torch.zeros_like(row), row + 1, torch.zeros_like(row), torch.zeros_like(row)
    hi[first], lo2[first], hi2[first] = int(first[-1]) + 1, int(second[0]), int(second[-1]) + 1
    hi[second] = int(second[-1]) + 1
    return IntervalMask(lo[None], hi[None], len(row), lo2[None], hi2[None])


def kinds() -> list[Kind]:
    """All that is drawn, in order."""
    none = rows((-1, ROWS))
    one = rows((0, ROWS))
    packed = rows((0, 9), (1, 6), (2, 6), (-1, 3))
    images = rows((-1, 2), (0, 7), (-1, 3), (1, 6), (-1, 6))

    def of(name: str, document_ids: Tensor, attend: Attend = Attend(), image_ids: Tensor = none, **more) -> Kind:
        mask = IntervalMask.from_document_ids(document_ids[None], attend, image_ids=image_ids[None], **more)
        return Kind(name, written(attend, **more), mask, document_ids, image_ids)

    across = rows((-1, 3), (0, 5), (-1, 4), (1, 6), (-1, 6))
    by_hand = "IntervalMask(kv_lo, kv_hi, 24,\nkv_lo2, kv_hi2)"
    return [
        of("causal", one),
        of("padded on the left", rows((-1, 5), (0, ROWS - 5))),
        of("packed, the tail is padding", packed),
        of("full", packed, Attend("full")),
        of("sliding window", packed, Attend(window=4)),
        of("window with sinks", one, Attend(window=5, sinks=2)),
        of("full within a window", packed, Attend("full", window=3)),
        of("chunks", rows((0, 15), (1, 9)), Attend(chunk_size=6)),
        of("an image sees itself", one, Attend(images="bidirectional"), images),
        of("window, an image sees itself whole", one, Attend(window=4, images="bidirectional"), images),
        of("window, cut also in an image", one, Attend(window=4, images="bidirectional_windowed"), images),
        of("prefix-LM", rows((0, 14), (1, 10)), prefix_lengths=[6, 4]),
        of("answers to one prompt", rows((0, 8), (1, 8), (2, 8)), parent_ids=[-1, 0, 0]),
        of("padding inside a document", rows((0, 9), (-1, 4), (0, 11))),
        Kind("block diffusion: noised, clean", by_hand, block_diffusion(ROWS // 2, 4), rows((0, 12), (1, 12)), none),
        Kind("two images see each other", by_hand, images_across_text(across), one, across),
    ]


def colors(kind: Kind) -> Tensor:
    """(ROWS,) the color of each row as a key."""
    documents = torch.tensor(DOCUMENTS)[kind.document_ids.clamp(min=0).long()]
    found = torch.where(kind.image_ids >= 0, torch.tensor(IMAGES)[kind.image_ids.clamp(min=0).long()], documents)
    return torch.where(kind.document_ids < 0, PADDING, found)


def draw(kind: Kind, axes) -> None:
    """The mask, and beside it what its rows and its keys are."""
    keys = colors(kind)
    count = len(keys)
    axes.imshow(
        torch.where(kind.mask.dense()[0, 0], keys[None], UNSEEN).numpy(),
        cmap=ListedColormap(COLORS), vmin=0, vmax=len(COLORS) - 1, interpolation="nearest", extent=(0, count, count, 0),
    )  # fmt: skip
    for band, extent in ((keys[None], (0, count, -0.7, -1.7)), (keys[:, None], (-1.7, -0.7, count, 0))):
        axes.imshow(band.numpy(), cmap=ListedColormap(COLORS), vmin=0, vmax=len(COLORS) - 1, interpolation="nearest", extent=extent)
    for line in range(count + 1):
        edge = line in (0, count)
        axes.plot([0, count], [line, line], color="#7b8794" if edge else "#e4e7eb", linewidth=0.8 if edge else 0.4)
        axes.plot([line, line], [0, count], color="#7b8794" if edge else "#e4e7eb", linewidth=0.8 if edge else 0.4)
    axes.set(xlim=(-1.9, count + 0.2), ylim=(count + 0.2, -1.9))
    axes.axis("off")
    axes.text(0, -6.3, kind.name, fontsize=11, fontweight="bold", va="top")
    axes.text(0, -4.7, kind.call, fontsize=8.5, family="monospace", va="top", linespacing=1.1)


def picture(path: Path, drawn: list[Kind]) -> Path:
    """All of them in a grid."""
    lines = -(-len(drawn) // COLUMNS)
    figure, axes = plt.subplots(lines, COLUMNS, figsize=(3.3 * COLUMNS, 3.75 * lines + 0.9))
    for axis, kind in zip(axes.flat, drawn):
        draw(kind, axis)
    handles = [tuple(Patch(facecolor=COLORS[color]) for color in chosen) for chosen in LEGEND.values()]
    from matplotlib.legend_handler import HandlerTuple

    figure.legend(
        handles, LEGEND.keys(), loc="lower center", ncols=len(LEGEND), frameon=False, fontsize=11, handlelength=4,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.2)},
    )  # fmt: skip
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.035, top=0.935, wspace=0.06, hspace=0.24)
    figure.text(0.014, 0.981, "Query rows downwards, keys to the right; the bands say what they are.", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    # without the version of matplotlib, so that two runs are the same to the byte
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.draw_masks", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder of masks.png")
    print(picture(parser.parse_args().out / "masks.png", kinds()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
