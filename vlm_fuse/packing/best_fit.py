"""Best fit: every sample into the row in which the fewest tokens stay free. The definition in Python, and the C++ of it.

Source: best-fit-decreasing bin packing (Johnson, "Near-optimal bin packing algorithms", 1973), with further budgets beside
the one that decides.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from ..backend import choose, name_from


def best_fit(needs: np.ndarray, order: np.ndarray, budgets: tuple[int, ...]) -> np.ndarray:
    """Row of every sample.

    Args:
        needs: ``(samples, budgets)`` int64, at least 0: what a sample takes of each budget. The first one decides.
        order: ``(samples,)`` int64, the samples in the order in which they are placed.
        budgets: what a row has of each; no sample needs more.

    Returns:
        ndarray: ``(samples,)`` int64. Rows are numbered as they are opened. A sample goes to the row that has the least of the
        first budget left among those where everything fits, of equal ones to that opened first; where none fits, a row is opened.
    """
    backend = name_from("auto")
    # lengths are on the host: a backend that is a GPU's alone does not count
    kernels = choose("auto" if backend in ("cuda", "triton") else backend, "cpu")
    return getattr(kernels, "best_fit", by_hand)(np.ascontiguousarray(needs), np.ascontiguousarray(order), budgets)


def by_hand(needs: np.ndarray, order: np.ndarray, budgets: tuple[int, ...]) -> np.ndarray:
    rows = np.empty(len(needs), dtype=np.int64)
    free: list[list[int]] = []  # of each row, what is left of each budget
    by_room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    table = needs.tolist()
    for sample in order.tolist():
        need = table[sample]
        for place in range(bisect_left(by_room, (need[0], -1)), len(by_room)):
            row = by_room[place][1]
            if all(left >= wanted for left, wanted in zip(free[row], need)):
                del by_room[place]
                break
        else:
            row = len(free)
            free.append(list(budgets))
        free[row] = [left - wanted for left, wanted in zip(free[row], need)]
        insort(by_room, (free[row][0], row))
        rows[sample] = row
    return rows
