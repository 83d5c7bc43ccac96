"""Which units make up which step: the order of an epoch, and how a step is split over micro-batches and ranks.

Everything here is a pure function of numbers, so a run's data cursor is one integer: the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from llmtune.contract.errors import DataError

GROUPED_STEPS = 50
"""Steps whose units are drawn together and then sorted by length; fewer where an epoch has less than four times that,
or every epoch would have the same steps."""


class Order:
    """The units (samples, packs or rows) of every step, as a function of the seed and the step alone."""

    def __init__(
        self, units: int, batch: int, seed: int, shuffle: bool = True, group_by: np.ndarray | None = None
    ) -> None:
        """`units` in an epoch, `batch` units a step over all ranks and micro-batches.

        `group_by` (units,) are lengths: units of similar length meet in a step. Only where units are shuffled.
        """
        if units < 1:
            raise DataError("dataset: found 0 samples to train on, allowed is at least 1; see the data report")
        if batch < 1:
            raise DataError(f"the global batch has {batch} samples, allowed is at least 1")
        self.units, self.batch, self.seed, self.shuffle = units, batch, seed, shuffle
        self.group_by = group_by if shuffle else None
        self.steps_per_epoch = -(-units // batch)
        self._latest: tuple[int, np.ndarray] | None = None

    def with_batch(self, batch: int) -> Order:
        """The same with another number of units a step."""
        return Order(self.units, batch, self.seed, self.shuffle, self.group_by)

    def step_units(self, step: int) -> list[int]:
        """Units of the 0-based optimiser step. The last step of an epoch may have fewer than `batch`."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch)[place * self.batch : (place + 1) * self.batch].tolist()

    def epoch(self, epoch: int) -> np.ndarray:
        """(units,) all units in the order of the 0-based epoch; each once."""
        if not self.shuffle:
            epoch = 0
        if self._latest is None or self._latest[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            units = rng.permutation(self.units) if self.shuffle else np.arange(self.units)
            if self.group_by is not None:
                together = min(GROUPED_STEPS, self.units // self.batch // 4)
                units = grouped(units, self.group_by, self.batch, rng, together)
            self._latest = (epoch, units)
        return self._latest[1]


def grouped(units: np.ndarray, lengths: np.ndarray, batch: int, rng: np.random.Generator, together: int) -> np.ndarray:
    """Sort every `together` steps' worth of units by length, and draw the order of the steps thus made.

    What is left for a last, smaller step stays as it was drawn: it must not be the longest or shortest units.
    """
    whole = len(units) // batch * batch
    groups = np.arange(whole) // (batch * max(1, together))
    drawn = units[:whole][np.lexsort((lengths[units[:whole]], groups))]
    steps = rng.permutation(whole // batch)
    return np.concatenate([drawn.reshape(-1, batch)[steps].reshape(-1), units[whole:]])


def split(units: Sequence[int], rank: int, ranks: int, micro_steps: int) -> list[list[int]]:
    """This rank's part of a global batch, one list a micro-step.

    The batch is cut into `micro_steps * ranks` contiguous pieces whose sizes differ by at most one; a piece is empty
    where the batch has fewer units than there are pieces.
    """
    pieces = cut(units, micro_steps * ranks)
    return [list(piece) for piece in pieces[rank::ranks]]


def cut(units: Sequence[int], pieces: int) -> list[Sequence[int]]:
    """So many contiguous pieces, whose sizes differ by at most one."""
    bounds = _bounds(len(units), pieces)
    return [units[start:stop] for start, stop in pairwise(bounds)]


def deal(units: Sequence[int], lengths: np.ndarray, *, padded: bool, pieces: int) -> list[int]:
    """A step's units in the order in which `split` gives each of `pieces` micro-batches the least to compute.

    Padded rows: by length, so that a micro-batch has rows of similar length. Otherwise micro-batches get about the same
    number of tokens: longest first, dealt forth and back. The loss is a sum over the step, so that what is learnt stays
    the same.
    """
    chosen = np.asarray(units, dtype=np.int64)
    falling = chosen[np.argsort(-lengths[chosen], kind="stable")]
    if padded or pieces == 1:
        return falling.tolist()
    full, forth = len(falling) // pieces, np.arange(pieces)
    hands = [forth if turn % 2 == 0 else forth[::-1] for turn in range(full)]
    larger = np.flatnonzero(np.diff(_bounds(len(falling), pieces)) > full)  # have one unit more, the shortest
    return falling[np.argsort(np.concatenate([*hands, larger]), kind="stable")].tolist()


def padding_share(lengths: np.ndarray, order: Order, pieces: int) -> float:
    """Share of padding in the first epoch's padded micro-batches, each step dealt by length into `pieces`."""
    units = order.epoch(0)
    whole = len(units) // order.batch
    padded = 0
    for part in (units[: whole * order.batch].reshape(whole, order.batch), units[None, whole * order.batch :]):
        if not part.size:
            continue
        falling_SB = -np.sort(-lengths[part], axis=1)
        bounds = _bounds(part.shape[1], pieces)
        sizes = np.diff(bounds)
        padded += int((falling_SB[:, bounds[:-1][sizes > 0]] * sizes[sizes > 0]).sum())
    return 1.0 - float(lengths.sum()) / max(1, padded)


def _bounds(units: int, pieces: int) -> np.ndarray:
    return np.arange(pieces + 1) * units // pieces
