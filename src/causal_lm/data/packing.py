"""Which documents share a row."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Put the items 0, 1, 2 … in turn each into the fullest bin with room, else into a new one.

    Longest first, it needs at most 11/9 of the fewest bins possible, plus a constant (Johnson
    1973). An item above ``capacity`` has a bin of its own.

    >>> best_fit([6, 3, 2], 8)
    [[0, 2], [1]]
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    for item, size in enumerate(sizes):
        place = bisect_left(rooms, (size, -1))
        room, index = rooms.pop(place) if place < len(rooms) else (capacity, len(bins))
        if index == len(bins):
            bins.append([])
        bins[index].append(item)
        insort(rooms, (room - size, index))
    return bins


def longest_first(lengths: np.ndarray, row_length: int) -> list[np.ndarray]:
    """Pack documents of these lengths, (D,), into rows: the indices of each row's documents."""
    order = np.argsort(-lengths, kind="stable")
    return [order[row] for row in best_fit(lengths[order].tolist(), row_length)]


def filled_batches(
    lengths: np.ndarray, row_length: int, batch_size: int, rng: np.random.Generator
) -> np.ndarray:
    """An order of D documents in which each ``batch_size`` of them fill whole rows, (D,).

    Rows are packed from all D documents, and batches from the rows, which ``rng`` shuffles before.
    What does not fill a batch comes last.
    """
    rows = longest_first(lengths, row_length)
    rows = [rows[i] for i in rng.permutation(len(rows))]
    batches = best_fit([len(row) for row in rows], batch_size)
    ordered = [np.concatenate([rows[i] for i in batch]) for batch in batches]
    ordered.sort(key=lambda batch: len(batch) != batch_size)
    return np.concatenate(ordered)
