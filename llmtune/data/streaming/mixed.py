"""The raw rows of all data sets as one sequence, epoch after epoch. Its place is a few numbers, to read on from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from llmtune.contract.errors import DataError
from llmtune.data.reading import Chunk, Found, Position, chunks
from llmtune.data.streaming.picked import usable

CHUNK_ROWS = 256
_DRAWS = 1 << 12
"""Turns of an interleaving that are drawn at a time."""


class Spot:
    """A chunk that is being read, and its data set."""

    def __init__(self, source: int, chunk: Chunk) -> None:
        self.source, self.chunk = source, chunk
        self.places = usable(chunk)


class RowReader:
    """Rows of one data set, one pass after the other. The first `held` rows of each pass are left out."""

    def __init__(self, number: int, found: Found, held: int = 0, limit: int | None = None) -> None:
        self.number, self.found, self.held, self.limit = number, found, held, limit
        self.restore([0, 0, 0, 0, 0, 0])

    def state(self) -> list[int]:
        """(begun passes, position of the current chunk, its rows that were taken, rows of the pass so far)."""
        return [self.passes, *self._position, self._used, self.taken]

    def restore(self, state: Sequence[int]) -> None:
        """Go to where `state` was asked for; the file is opened when a row is."""
        self.passes, *position, self._used, self.taken = state
        self._position = Position(*position)
        self._spot: Spot | None = None
        self._after: Position = self._position
        self._chunks: Iterator[Chunk] | None = None

    def progress(self) -> tuple[int, int]:
        """(bytes of the pass that were read, bytes of all files); whole files where these are compressed or tables."""
        return sum(self._sizes[: self._position.file]) + self._position.offset, sum(self._sizes)

    @cached_property
    def _sizes(self) -> list[int]:
        return [path.stat().st_size for path in self.found.files]

    def rewind(self) -> None:
        """Begin the next pass."""
        self.restore([self.passes + 1, 0, 0, 0, 0, 0])

    def ended(self) -> bool:
        """Whether no row is left in this pass."""
        while self.taken < self.held:
            if self._next() is None:
                return True
        return self._full() or not self._fill()

    def take(self) -> tuple[Spot, int]:
        """The next row: its chunk and place in it. Only where the pass has not `ended`."""
        row = self._next()
        assert row is not None
        return row

    def _full(self) -> bool:
        return self.limit is not None and self.taken >= self.limit

    def _next(self) -> tuple[Spot, int] | None:
        if self._full() or not self._fill():
            return None
        assert self._spot is not None
        place = self._spot.places[self._used]
        self._used += 1
        self.taken += 1
        return self._spot, place

    def _fill(self) -> bool:
        """Have a chunk with a row left; False at the end."""
        while self._spot is None or self._used >= len(self._spot.places):
            if self._chunks is None:
                self._chunks = chunks(self.found, self._position, CHUNK_ROWS, streaming=True)
            if self._spot is not None:
                self._position, self._used, self._spot = self._after, 0, None
            chunk = next(self._chunks, None)
            if chunk is None:
                return False
            self._spot, self._after = Spot(self.number, chunk), chunk.next
        return True


@dataclass
class Mixed:
    """Rows of several data sets as `mix_strategy` has them: one after the other, or drawn in turn until the first of
    them is used up (`interleave_under`) or until all are, those used up starting again (`interleave_over`)."""

    readers: list[RowReader]
    strategy: str
    probabilities: Sequence[float] | None
    seed: int
    epoch: int = 0
    drawn: int = 0
    """Rows of the epoch so far."""

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "epoch": self.epoch, "drawn": self.drawn, "done": sorted(self._done),
            "readers": [reader.state() for reader in self.readers],
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was asked for."""
        self.epoch, self.drawn, self._done = state["epoch"], state["drawn"], set(state["done"])
        self._moved = set(range(len(self.readers)))
        for reader, values in zip(self.readers, state["readers"], strict=True):
            reader.restore(values)

    def __post_init__(self) -> None:
        self._done: set[int] = set()
        self._moved: set[int]  # data sets whose end may have come since it was looked for
        self._turns: tuple[int, int, list[int]] | None = None
        self._moved = set(range(len(self.readers)))

    def progress(self) -> float:
        """About the share of the epoch that was read, by bytes; 0 for data that are not in files."""
        read, sizes = zip(*(reader.progress() for reader in self.readers), strict=True)
        return sum(read) / max(1, sum(sizes))

    def next_epoch(self) -> None:
        """Begin again with every data set."""
        self.epoch, self.drawn, self._done = self.epoch + 1, 0, set()
        self._moved = set(range(len(self.readers)))
        for reader in self.readers:
            reader.rewind()

    def rows(self, most: int) -> list[tuple[Spot, int]]:
        """The next rows of the epoch; fewer than `most` where it ends."""
        found = list(islice(self._one_by_one(), most))
        return found

    def _one_by_one(self) -> Iterator[tuple[Spot, int]]:
        if self.strategy == "concat" or len(self.readers) == 1:
            yield from self._concatenated()
            return
        while (number := self._turn()) is not None:
            self.drawn += 1
            yield self.readers[number].take()

    def _concatenated(self) -> Iterator[tuple[Spot, int]]:
        for reader in self.readers:
            while not reader.ended():
                self.drawn += 1
                yield reader.take()

    def _turn(self) -> int | None:
        """The data set of the next row; None at the end of the epoch."""
        over = self.strategy == "interleave_over"
        for number in self._moved - self._done:
            if self.readers[number].ended():
                self._require_drawn(self.readers[number])
                self._done.add(number)
        self._moved.clear()
        count = len(self.readers)
        # Without probabilities an epoch is whole rounds.
        if (self.probabilities is not None or self.drawn % count == 0) and (
            len(self._done) == count if over else self._done
        ):
            return None
        number = self.drawn % count if self.probabilities is None else self._draw()
        if self.readers[number].ended():
            self.readers[number].rewind()
        self._moved.add(number)
        return number

    def _require_drawn(self, reader: RowReader) -> None:
        """DataError if a data set that has ended gave no row."""
        if not self.drawn:
            raise DataError(f'mix_strategy: "{reader.found.name}" has no rows to draw; leave it out, or set concat')

    def _draw(self) -> int:
        """The data set of row `drawn`: a function of seed, epoch and place alone."""
        part, place = divmod(self.drawn, _DRAWS)
        if self._turns is None or self._turns[:2] != (self.epoch, part):
            rng = np.random.default_rng([self.seed, 2**31 + 4, self.epoch, part])
            shares = np.asarray(self.probabilities, dtype=np.float64)
            drawn = rng.choice(len(self.readers), size=_DRAWS, p=shares / shares.sum())
            self._turns = (self.epoch, part, drawn.tolist())
        return self._turns[2][place]
