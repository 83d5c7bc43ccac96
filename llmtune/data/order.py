"""Which samples make up which step: packing, the order of an epoch, and its split over ranks.

Everything here is a pure function of numbers, so a run's data cursor is one integer: the step.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from llmtune.errors import DataError


def pack(lengths: Sequence[int] | np.ndarray, cutoff_len: int) -> list[tuple[int, ...]]:
    """Put whole samples into rows of at most `cutoff_len` tokens: best-fit decreasing.

    Longest samples go first, each into the fullest row that still has room. 100,000 samples take about 0.2 s.

    Returns:
        Sample indices of each row, ascending; rows ordered by their first sample.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and int(lengths.max()) > cutoff_len:
        raise DataError(f"a sample of {int(lengths.max())} tokens does not fit into cutoff_len={cutoff_len}")
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(cutoff_len + 1)]  # by tokens left
    rooms: list[int] = []  # sorted values of `tokens left` for which a row is open
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sample])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), cutoff_len
            rows.append([])
        else:
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del rooms[at]
        rows[row].append(sample)
        left = room - length
        if left:
            if not open_rows[left]:
                insort(rooms, left)
            open_rows[left].append(row)
    return sorted(tuple(sorted(row)) for row in rows)


class Order:
    """The units (samples, or packed rows) of every step, as a function of the seed and the step alone."""

    def __init__(self, units: int, batch: int, seed: int, shuffle: bool = True) -> None:
        """`units` in an epoch, `batch` units a step over all ranks and micro-batches."""
        if units < 1:
            raise DataError("dataset: found 0 samples to train on, allowed is at least 1; see the data report")
        if batch < 1:
            raise DataError(f"the global batch has {batch} samples, allowed is at least 1")
        self.units, self.batch, self.seed, self.shuffle = units, batch, seed, shuffle
        self.steps_per_epoch = -(-units // batch)
        self._latest: tuple[int, np.ndarray] | None = None

    def step_units(self, step: int) -> list[int]:
        """Units of the 0-based optimiser step. The last step of an epoch may have fewer than `batch`."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[place * self.batch : (place + 1) * self.batch].tolist()

    def _epoch(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            epoch = 0
        if self._latest is None or self._latest[0] != epoch:
            shuffled = np.random.default_rng([self.seed, epoch]).permutation
            self._latest = (epoch, shuffled(self.units) if self.shuffle else np.arange(self.units))
        return self._latest[1]


def split(units: Sequence[int], rank: int, ranks: int, micro_steps: int) -> list[list[int]]:
    """This rank's part of a global batch, one list a micro-step.

    The batch is cut into `micro_steps * ranks` contiguous pieces whose sizes differ by at most one; a piece is empty
    where the batch has fewer units than there are pieces.
    """
    pieces = micro_steps * ranks
    bounds = [piece * len(units) // pieces for piece in range(pieces + 1)]
    mine = range(rank, pieces, ranks)
    return [list(units[bounds[piece] : bounds[piece + 1]]) for piece in mine]
