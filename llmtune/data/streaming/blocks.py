"""Blocks of shuffled rows. Row g of the stream, counted over all epochs, is a function of seed, epoch and place alone;
lane l of a step's B lanes has the rows l, l + B, l + 2B, ..."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmtune.contract.errors import DataError
from llmtune.data.streaming.mixed import Mixed, Spot
from llmtune.data.streaming.picked import Picked, pick


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """Where a block begins, and all that is needed to read on from there."""

    first: int
    """Rows of the stream before it."""
    number: int
    """Its number in the epoch."""
    epoch_first: int
    """Rows of the stream before its epoch."""
    mixed: dict[str, Any]
    epoch_rows: int | None = None
    """Rows of the epoch before, the latest that is known whole."""
    progress: float = 0.0
    """About the share of the epoch before it, told by bytes."""

    @property
    def epoch(self) -> int:
        return self.mixed["epoch"]


@dataclass(kw_only=True)
class Block:
    """`rows` consecutive rows of the stream, of which those of this rank's lanes are held."""

    begin: Beginning
    rows: int
    own: np.ndarray
    """(held,) int64 ascending, places in the stream of the rows that are held."""
    part: np.ndarray
    """(held,) int64, the number in `parts` of each."""
    place: np.ndarray
    """(held,) int64, its place in the part."""
    parts: list[tuple[int, Picked]] = field(default_factory=list)
    """(number of the data set, rows) of each chunk."""

    @property
    def stop(self) -> int:
        """Rows of the stream up to its end."""
        return self.begin.first + self.rows


class BlockReader:
    """Reads block after block, epoch after epoch."""

    def __init__(
        self, mixed: Mixed, *, buffer_size: int, seed: int, shuffle: bool, batch: int, lanes: Iterable[int]
    ) -> None:
        self.mixed, self.buffer_size, self.seed, self.shuffle = mixed, buffer_size, seed, shuffle
        self.batch = batch
        self.mine = np.zeros(batch, bool)
        self.mine[list(lanes)] = True
        self.at = Beginning(first=0, number=0, epoch_first=0, mixed=mixed.state())

    def restore(self, begin: Beginning) -> None:
        """Go to the beginning of a block."""
        self.mixed.restore(begin.mixed)
        self.at = begin

    def next(self) -> Block:
        """The next block. DataError if an epoch has fewer rows than a step."""
        found = self.mixed.rows(self.buffer_size)
        if not found:
            self._next_epoch()
            found = self.mixed.rows(self.buffer_size)
        begin = self.at
        block = self._held(begin, found)
        self.at = Beginning(
            first=block.stop, number=begin.number + 1, epoch_first=begin.epoch_first, mixed=self.mixed.state(),
            epoch_rows=begin.epoch_rows, progress=self.mixed.progress(),
        )  # fmt: skip
        return block

    def _next_epoch(self) -> None:
        rows = self.at.first - self.at.epoch_first
        check_size(rows, self.batch)
        self.mixed.next_epoch()
        first = self.at.first
        self.at = Beginning(first=first, number=0, epoch_first=first, mixed=self.mixed.state(), epoch_rows=rows)

    def _held(self, begin: Beginning, found: Sequence[tuple[Spot, int]]) -> Block:
        count = len(found)
        order = np.arange(count)
        if self.shuffle:
            order = np.random.default_rng([self.seed, begin.epoch, begin.number]).permutation(count)
        own = begin.first + np.flatnonzero(self.mine[(begin.first + np.arange(count)) % self.batch])
        chosen = order[own - begin.first]
        numbers: dict[int, int] = {}  # of each chunk, by its identity
        wanted: list[list[int]] = []
        spots: list[Spot] = []
        part, place = np.empty(len(own), np.int64), np.empty(len(own), np.int64)
        for at, row in enumerate(chosen.tolist()):
            spot, inside = found[row]
            number = numbers.setdefault(id(spot), len(numbers))
            if number == len(spots):
                spots.append(spot)
                wanted.append([])
            part[at], place[at] = number, len(wanted[number])
            wanted[number].append(inside)
        parts = [(spot.source, pick(spot.chunk, places)) for spot, places in zip(spots, wanted, strict=True)]
        return Block(begin=begin, rows=count, own=own, part=part, place=place, parts=parts)


def check_size(rows: int, batch: int) -> None:
    """DataError if an epoch of the stream has fewer rows than a step."""
    if rows < batch:
        raise DataError(
            f"streaming: the data have {rows:,} rows, fewer than the {batch:,} of a step; lower "
            "per_device_train_batch_size or gradient_accumulation_steps, or set streaming: false"
        )
