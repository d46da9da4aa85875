"""The batch before and after as one PNG: which rows are text, image and padding, and which row sees which."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend has to be chosen first)
from matplotlib.colors import ListedColormap  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

PADDING, TEXT, IMAGE, OUTSIDE = range(4)
NAMES = ("padding", "text", "image")
COLORS = ("#dcdcdc", "#3b76af", "#ef8636", "#ffffff")
MASK_PIXELS = 1100


def kinds_of_tokens(batch) -> Tensor:
    """(B, T) PADDING, TEXT or IMAGE of the batch as it came."""
    kinds = torch.where(batch.input_ids == batch.image_token_id, IMAGE, TEXT)
    return torch.where(batch.attention_mask.bool(), kinds, PADDING)


def kinds_of_rows(plan) -> Tensor:
    """(G, W) PADDING, TEXT or IMAGE of the rows that a plan describes (its kinds are -1, 0, and 1 and up)."""
    return plan.kind_ids.clamp(-1, 1).long() + 1


def draw(path: Path, batch, plans: dict[str, object], mask: Tensor, mask_title: str) -> Path:
    """Draws the pictures of the batch, the batch as it came, the rows of each plan, and a mask of the last plan.

    Args:
        path: of the PNG; its folder is made.
        batch: a ChatBatch.
        plans: title -> TokenPlan (or anything with kind_ids and document_ids). A single row is drawn in lines.
        mask: ``(1, 1, W, W)`` bool, dense, of the last plan.
        mask_title: what stands above it.
    """
    length = batch.input_ids.shape[1]
    panels = {f"as it came: {len(batch.input_ids)} x {length}, padded on the left": (kinds_of_tokens(batch), None)}
    for title, plan in plans.items():
        panels[title] = (kinds_of_rows(plan).cpu(), plan.document_ids.cpu())

    figure = plt.figure(figsize=(17, 11), constrained_layout=True)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 6))
    draw_photos(top, batch.photos)
    left, right = bottom.subfigures(1, 2, width_ratios=(8, 9))
    for axes, (title, (kinds, documents)) in zip(left.subplots(len(panels), 1), panels.items()):
        draw_rows(axes, title, kinds, documents, length)
    left.legend(
        handles=[Patch(facecolor=COLORS[kind], label=NAMES[kind]) for kind in (TEXT, IMAGE, PADDING)],
        loc="outside lower center", ncols=3, frameon=False,
    )  # fmt: skip
    draw_mask(right.subplots(), mask_title, mask[0, 0].cpu(), kinds[0], documents[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw_photos(figure, photos: list[np.ndarray]) -> None:
    widths = [photo.shape[1] / photo.shape[0] for photo in photos]
    for axes, photo in zip(figure.subplots(1, len(photos), width_ratios=widths), photos):
        axes.imshow(photo)
        axes.set_title(f"{photo.shape[0] // 16} x {photo.shape[1] // 16}", fontsize=9)
        axes.axis("off")


def draw_rows(axes, title: str, kinds: Tensor, documents: Tensor | None, length: int) -> None:
    lines = kinds
    if len(kinds) == 1:  # packed: one long row, cut into lines for the eye alone
        lines = torch.full((-(-kinds.shape[1] // length) * length,), OUTSIDE)
        lines[: kinds.shape[1]] = kinds[0]
        lines = lines.view(-1, length)
    show(axes, lines.numpy(), aspect="auto")
    if len(kinds) == 1:
        for start in borders(documents[0])[1:]:
            line, column = divmod(start, length)
            axes.plot([column, column], [line - 0.5, line + 0.5], color="black", linewidth=1.2)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_yticks(range(len(lines)))
    axes.set_yticks(np.arange(len(lines) - 1) + 0.5, minor=True)
    axes.grid(axis="y", which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0, labelsize=8)


def draw_mask(axes, title: str, mask: Tensor, kinds: Tensor, documents: Tensor) -> None:
    """Row q sees key k where the pixel has the colour of k's kind."""
    step = max(1, -(-len(mask) // MASK_PIXELS))
    seen = torch.where(mask[::step, ::step], kinds[::step][None], OUTSIDE)
    show(axes, seen.numpy(), extent=(0, len(mask), len(mask), 0))
    for start in borders(documents)[1:]:
        axes.axhline(start, color="black", linewidth=0.4)
        axes.axvline(start, color="black", linewidth=0.4)
    axes.set(title=title, xlabel="key", ylabel="query")


def show(axes, kinds: np.ndarray, **options) -> None:
    axes.imshow(kinds, cmap=ListedColormap(COLORS), vmin=0, vmax=len(COLORS) - 1, interpolation="nearest", **options)


def borders(documents: Tensor) -> list[int]:
    """First row of every document of one output row."""
    before = torch.cat([documents.new_tensor([-2]), documents[:-1]])
    return (documents != before).nonzero().flatten().tolist()
