"""The rows of all data sets as one sequence, epoch after epoch, shuffled a buffer at a time. Where it stands is a few
numbers, from which a run reads on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from llmtune.contract.errors import DataError
from llmtune.data.reading import Dataset, Position, Row, chunks

READ_ROWS = 256
"""Rows that are read at a time, and once more where a run goes on among them."""
_DRAWS = 1 << 12
"""Turns of an interleaving that are drawn at a time."""


class StreamRow(NamedTuple):
    """A row, and where it comes from."""

    source: int
    """The number of its data set."""
    passed: int
    """Passes through the data set that were done before."""
    origin: str
    """`path:` or `path:row `, which the row's number follows."""
    row: Row

    @property
    def place(self) -> str:
        return f"{self.origin}{self.row.number}"


class RowReader:
    """Rows of one data set, one pass after the other. The first `held` rows of each pass are left out."""

    def __init__(self, number: int, dataset: Dataset, held: int = 0, limit: int | None = None) -> None:
        self.number, self.dataset, self.held, self.limit = number, dataset, held, limit
        self.restore([0, 0, 0, 0, 0, 0])

    def state(self) -> list[int]:
        """(begun passes, file, offset and row where reading goes on, rows to leave out from there, rows so far)."""
        return [self.passed, *self._position, self._used, self.taken]

    def restore(self, state: Sequence[int]) -> None:
        """Go to where `state` was asked for; the file is opened when a row is."""
        self.passed, *position, self._used, self.taken = state
        self._position = Position(*position)
        self._rows = self._read()
        self._next: tuple[Position, int, StreamRow] | None = None

    def rewind(self) -> None:
        """Begin the next pass."""
        self.restore([self.passed + 1, 0, 0, 0, 0, 0])

    def ended(self) -> bool:
        """Whether no row is left in this pass."""
        while self._next is None:
            if self.limit is not None and self.taken >= self.limit:
                return True
            self._next = next(self._rows, None)
            if self._next is None:
                return True
            if self.taken < self.held:
                self.take()
        return False

    def take(self) -> StreamRow:
        """The next row. Only where the pass has not `ended`."""
        assert self._next is not None
        (self._position, self._used, row), self._next = self._next, None
        self.taken += 1
        return row

    def progress(self) -> tuple[int, int]:
        """(bytes of the pass that were read, bytes of all files); whole files where these are compressed or tables."""
        file = self._position.file
        read = sum(self._sizes[:file]) + min(self._position.offset, sum(self._sizes[file : file + 1]))
        return read, sum(self._sizes)

    @cached_property
    def _sizes(self) -> list[int]:
        return [path.stat().st_size for path in self.dataset.files]

    def _read(self) -> Iterator[tuple[Position, int, StreamRow]]:
        position, used = self._position, self._used
        for chunk in chunks(self.dataset, position, READ_ROWS, streaming=True):
            number = 0
            for number, row in enumerate(chunk.rows(), start=1):
                if number > used:
                    yield position, number, StreamRow(self.number, self.passed, chunk.origin, row)
            position, used = chunk.next, max(0, used - number)  # chunks of a table are cut anew where it is entered


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

    def __post_init__(self) -> None:
        self._done: set[int] = set()
        self._turns: tuple[int, int, list[int]] | None = None

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "epoch": self.epoch, "drawn": self.drawn, "done": sorted(self._done),
            "readers": [reader.state() for reader in self.readers],
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was asked for."""
        self.epoch, self.drawn, self._done = state["epoch"], state["drawn"], set(state["done"])
        for reader, values in zip(self.readers, state["readers"], strict=True):
            reader.restore(values)

    def progress(self) -> float:
        """About the share of the epoch that was read, by bytes; 0 for data that are not in files."""
        read, sizes = zip(*(reader.progress() for reader in self.readers), strict=True)
        return sum(read) / max(1, sum(sizes))

    def next_epoch(self) -> None:
        """Begin again with every data set."""
        self.epoch, self.drawn, self._done = self.epoch + 1, 0, set()
        for reader in self.readers:
            reader.rewind()

    def rows(self, most: int) -> list[StreamRow]:
        """The next rows of the epoch; fewer than `most` where it ends."""
        return list(islice(self._one_by_one(), most))

    def _one_by_one(self) -> Iterator[StreamRow]:
        concatenated = self.strategy == "concat" or len(self.readers) == 1
        while (number := self._unfinished() if concatenated else self._turn()) is not None:
            self.drawn += 1
            yield self.readers[number].take()

    def _unfinished(self) -> int | None:
        """The first data set that has a row left."""
        return next((reader.number for reader in self.readers if not reader.ended()), None)

    def _turn(self) -> int | None:
        """The data set of the next row; None at the end of the epoch."""
        count = len(self.readers)
        for number, reader in enumerate(self.readers):
            if number not in self._done and reader.ended():
                if not self.drawn:
                    raise DataError(
                        f'mix_strategy: "{reader.dataset.name}" has no rows to draw; leave it out, or set concat'
                    )
                self._done.add(number)
        # Without probabilities an epoch is whole rounds.
        if self.probabilities is not None or self.drawn % count == 0:
            over = self.strategy == "interleave_over"
            if len(self._done) == count if over else self._done:
                return None
        number = self.drawn % count if self.probabilities is None else self._draw()
        if self.readers[number].ended():
            self.readers[number].rewind()
            self.readers[number].ended()  # so that its first row is there to take
        return number

    def _draw(self) -> int:
        """The data set of row `drawn`: a function of seed, epoch and place alone."""
        part, place = divmod(self.drawn, _DRAWS)
        if self._turns is None or self._turns[:2] != (self.epoch, part):
            rng = np.random.default_rng([self.seed, 2**31 + 4, self.epoch, part])
            shares = np.asarray(self.probabilities, dtype=np.float64)
            drawn = rng.choice(len(self.readers), size=_DRAWS, p=shares / shares.sum())
            self._turns = (self.epoch, part, drawn.tolist())
        return self._turns[2][place]


class RowRun(NamedTuple):
    """Consecutive rows of one epoch of the stream, in the order in which they train."""

    begin: dict[str, Any]
    """What `ShuffledRows.state` said before them."""
    end: dict[str, Any]
    """What it said after them."""
    progress: tuple[float, float]
    """About the share of the epoch before and after them, told by bytes."""
    rows: list[StreamRow]


class ShuffledRows:
    """All rows, epoch after epoch; each `buffer_size` of them that follow each other are permuted."""

    def __init__(self, mixed: Mixed, *, buffer_size: int, seed: int, shuffle: bool, least: int) -> None:
        """An epoch with fewer rows than `least` is an error."""
        self.mixed, self.buffer_size, self.seed, self.shuffle, self.least = mixed, buffer_size, seed, shuffle, least
        self.restore({"mixed": mixed.state(), "used": 0, "before": 0, "epoch_rows": None})

    def state(self) -> dict[str, Any]:
        """Plain numbers: where the buffer begins, its rows that were taken, the epoch's rows before it, and the rows of
        the epoch before, if one is over."""
        return {"mixed": self._begin, "used": self._used, "before": self._before, "epoch_rows": self._epoch_rows}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was asked for; rows are read when they are asked for."""
        self.mixed.restore(state["mixed"])
        self._begin, self._used = state["mixed"], state["used"]
        self._before, self._epoch_rows = state["before"], state["epoch_rows"]
        self._buffer: list[StreamRow] | None = None

    def runs(self, rows: int) -> Iterator[RowRun]:
        """The stream, `rows` at a time; fewer where an epoch ends. DataError if an epoch has fewer than `least`."""
        while True:
            begin, before, run = self.state(), self._progress(), []
            while len(run) < rows and self._fill():
                assert self._buffer is not None
                more = self._buffer[self._used : self._used + rows - len(run)]
                run += more
                self._used += len(more)
            if run:
                yield RowRun(begin, self.state(), (before, self._progress()), run)
            else:
                self._next_epoch()

    def _fill(self) -> bool:
        """Have a buffer with a row left; False at the end of the epoch."""
        if self._buffer is not None and self._used == len(self._buffer):
            self._begin, self._used, self._before = self.mixed.state(), 0, self._before + len(self._buffer)
            self._buffer = None
        if self._buffer is None:
            self._load()
        assert self._buffer is not None
        return self._used < len(self._buffer)

    def _load(self) -> None:
        self._shares = [self.mixed.progress()]
        loaded = self.mixed.rows(self.buffer_size)
        self._shares.append(self.mixed.progress())
        if self.shuffle:
            words = [self.seed, self.mixed.epoch, self._before // self.buffer_size]
            loaded = [loaded[at] for at in np.random.default_rng(words).permutation(len(loaded))]
        self._buffer = loaded

    def _progress(self) -> float:
        if self._buffer is None:
            self._load()
        assert self._buffer is not None
        first, last = self._shares
        return first + (last - first) * self._used / max(1, len(self._buffer))

    def _next_epoch(self) -> None:
        check_size(self._before, self.least)
        self.mixed.next_epoch()
        self.restore({"mixed": self.mixed.state(), "used": 0, "before": 0, "epoch_rows": self._before})


def check_size(rows: int, batch: int) -> None:
    """DataError if an epoch of the stream has fewer rows than a step."""
    if rows < batch:
        raise DataError(
            f"streaming: the data have {rows:,} rows, fewer than the {batch:,} of a step; lower "
            "per_device_train_batch_size or gradient_accumulation_steps, or set streaming: false"
        )
