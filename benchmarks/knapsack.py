"""What nanoVLM packs with: a knapsack that puts the longest sample into the emptiest row, buffer by buffer.

Source: huggingface/nanoVLM, ``ConstantLengthDataset``, whose behaviour this follows.
"""

from __future__ import annotations


def greedy_knapsack(lengths: list[int], capacity: int, *, rows: int, spare: int = 5) -> list[list[int]]:
    """Indices into `lengths`, row by row.

    Args:
        rows: as many rows' worth of tokens are buffered and packed at once.
        spare: rows opened beyond what the tokens need at least; those that stay empty are dropped.
    """
    packed: list[list[int]] = []
    buffer: list[int] = []
    tokens = 0
    for index, length in enumerate(lengths):
        buffer.append(index)
        tokens += length
        if tokens >= rows * capacity:
            packed += _pack(buffer, lengths, capacity, spare)
            buffer, tokens = [], 0
    return packed + (_pack(buffer, lengths, capacity, spare) if buffer else [])


def _pack(buffer: list[int], lengths: list[int], capacity: int, spare: int) -> list[list[int]]:
    count = -(-sum(lengths[index] for index in buffer) // capacity) + spare
    loads, groups = [0] * count, [[] for _ in range(count)]
    for index in sorted(buffer, key=lambda index: -lengths[index]):
        row = next((row for row in sorted(range(len(loads)), key=loads.__getitem__) if loads[row] + lengths[index] <= capacity), None)
        if row is None:
            row = len(loads)
            loads.append(0)
            groups.append([])
        loads[row] += lengths[index]
        groups[row].append(index)
    return [group for group in groups if group]
