"""The definition of M-RoPE positions, a token at a time in plain Python."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .batch import BAD_GRID, DOCUMENT_RETURNS, GRID_CUT, GRID_UNUSED, NO_GRID, UNKNOWN_TYPE, report

#: a grid never needs more placeholders than there are tokens.
_MOST = 2**31


class _Grid(NamedTuple):
    """One row of the grids: `parts` images or frames of t x h x w placeholders each, which begin at `first`."""

    first: int
    parts: int
    t: int
    h: int
    w: int
    row: int

    @property
    def part(self) -> int:
        return min(self.t * self.h * self.w, _MOST)

    @property
    def size(self) -> int:
        return min(self.parts * self.part, _MOST)


class _Grids(NamedTuple):
    grids: list[_Grid]
    total: int
    error: tuple[int, ...] | None

    def at(self, ordinal: int) -> tuple[_Grid, int, int] | None:
        """(grid, which part of it, which placeholder of that) of a placeholder, by its number in the batch."""
        if ordinal >= self.total:
            return None
        grid = next(grid for grid in reversed(self.grids) if grid.first <= ordinal)
        return grid, *divmod(ordinal - grid.first, grid.part)


def _read(grid_thw: Tensor | None, kind: int, merge: int, split: bool) -> _Grids:
    grids, total, error = [], 0, None
    for row, (t, h, w) in enumerate([] if grid_thw is None else grid_thw.tolist()):
        if not (0 < t < _MOST and 0 < h < _MOST and 0 < w < _MOST) or h % merge or w % merge:
            error = error or (BAD_GRID, 0, kind, t, h, w, merge, row)
            continue
        grid = _Grid(total, t if split else 1, 1 if split else t, h // merge, w // merge, row)
        grids.append(grid)
        total += grid.size
    return _Grids(grids, total, error)


def _time(frame: int, interval: int | Tensor) -> int:
    """Where a frame of a video stands in time: its number times the interval, in the arithmetic of the interval's dtype, cut off."""
    if isinstance(interval, int):
        return frame * interval
    product = torch.tensor(frame) * interval
    # what no position can be is 0
    return int(product.long()) if abs(product) < 9e18 else 0


def mrope_position_ids(types, image_grid, video_grid, intervals, attention_mask, document_ids, merge: int, interval: int, split: bool, status):
    """``(position_ids, rope_deltas)``: int64 (3, B, L), or (4, B, L) with document_ids, and (B, 1).

    A kept token of text takes the next position in all rows. An image (a video; with `split` a frame of it) of t x h x w
    placeholders begins at the next position p: its placeholder (i, j, k) has p + time(i), p + j, p + k, and the position after
    it is p + max(h, w). Its placeholders are neighbours in one row, document and kind, and all kept or none: else it is cut. The
    first row is with document_ids the number of kept tokens before in the document. Padding has 0; with document_ids the padding
    at the end of a row counts 0, 1, 2, ... in all rows. Placeholders under padding take their place in a grid all the same.
    rope_deltas: the largest position of the row's last document, + 1, less its tokens; 0 where there is none.
    Where something is wrong and not raised: a placeholder without a grid is text, and what is cut goes on where it is.
    """
    samples, length = types.shape
    rows = 3 if document_ids is None else 4
    all_types = types.tolist()
    all_masks = None if attention_mask is None else (attention_mask != 0).tolist()
    all_ids = None if document_ids is None else document_ids.tolist()
    kinds = [_read(image_grid, 0, merge, False), _read(video_grid, 1, merge, split)]
    errors = [kind.error for kind in kinds if kind.error]
    before = [0, 0]  # placeholders of each kind before the token
    total = [sum(line.count(c + 1) for line in all_types) for c in (0, 1)]
    positions = [[[0] * length for _ in range(samples)] for _ in range(rows)]
    deltas = []

    for sample, line in enumerate(all_types):
        mask = [True] * length if all_masks is None else all_masks[sample]
        ids = [0] * length if all_ids is None else [max(given, -1) for given in all_ids[sample]]
        before_sample = list(before)
        seen: set[int] = set()
        document, here, count, highest, last_kept = None, 0, 0, -1, -1
        for column, kind in enumerate(line):
            kept = mask[column] and ids[column] >= 0
            if kept and ids[column] != document:
                document, here, count, highest = ids[column], 0, 0, -1
                if document in seen:
                    errors.append((DOCUMENT_RETURNS, sample, 0, 0, 0, 0, 0, document))
                seen.add(document)
            if kept and kind not in (0, 1, 2):
                errors.append((UNKNOWN_TYPE, sample, 0, column, 0, 0, 0, int(kind)))
            place = None
            if kind in (1, 2):
                c = kind - 1
                place = kinds[c].at(before[c])
                before[c] += 1
                there = (total[c], kinds[c].total)
                if place is None:
                    have = line.count(kind), max(kinds[c].total - before_sample[c], 0)
                    errors.append((NO_GRID, sample, c, *have, *there, 0 if (grid := (image_grid, video_grid)[c]) is None else len(grid)))
                elif place[2] + 1 < place[0].part:
                    after = column + 1
                    joined = after < length and (line[after], mask[after], ids[after]) == (kind, mask[column], ids[column])
                    if not joined:
                        errors.append((GRID_CUT, sample, c, place[2] + 1, place[0].part, *there, place[0].row))
            if not kept:
                continue
            at = (here, here, here)
            if place is None:
                here += 1
            else:
                grid, part, offset = place
                i, j, k = offset // (grid.h * grid.w), offset // grid.w % grid.h, offset % grid.w
                step = 1 if kind == 1 else interval if intervals is None else intervals[grid.row]
                at = (here + _time(i, step), here + j, here + k)
                if offset + 1 == grid.part:
                    here += max(grid.h, grid.w)
            for row, position in enumerate(at if rows == 3 else (count, *at)):
                positions[row][sample][column] = position
            count, highest, last_kept = count + 1, max(highest, *at), column
        if rows == 4:
            for row in positions:
                row[sample][last_kept + 1 :] = range(length - last_kept - 1)
        deltas.append([highest + 1 - count])
    for c, kind in enumerate(kinds):
        if total[c] < kind.total:
            errors.append((GRID_UNUSED, -1, c, total[c], kind.total, total[c], kind.total, kind.at(total[c])[0].row))
    report(errors[0] if errors else None, status)
    device = types.device
    shape = (rows, samples, length)
    return torch.tensor(positions, dtype=torch.int64).view(shape).to(device), torch.tensor(deltas, dtype=torch.int64).view(samples, 1).to(device)
