"""Units for the lanes of a rank, made ahead of the training loop."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from llmtune.contract.errors import DataError
from llmtune.data.streaming.blocks import Beginning, Block, BlockReader
from llmtune.data.streaming.cells import Cell, CellRows, Unit
from llmtune.data.streaming.crew import WorkerPool

EMPTY_ROWS = 1 << 14
"""Rows of a lane in a row that may give no sample; more are an error, so that no run looks for data for ever."""


_PATIENCE_S = 5.0
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(kw_only=True, eq=False)
class Lane:
    """A lane's place: `place` units of its cell number `cell` are used."""

    number: int
    cell: int = 0
    place: int = 0
    current: Cell | None = None
    order: np.ndarray | None = None
    """(units,) of the current cell, the order in which they are used."""
    sent: int = 0
    """Cells that were given to the crew."""
    waiting: deque[Future[Cell]] = field(default_factory=deque)
    row: int = 0
    """About the stream's row that its latest unit comes from."""
    empty: int = 0
    """Cells without a sample since the last one."""


class Supply:
    """Units of some lanes, in the order of the stream.

    A thread reads blocks and gives each lane's next cells to the crew, `ahead` of them.
    """

    def __init__(
        self, reader: BlockReader, crew: WorkerPool, lanes: Sequence[int], cell_rows: int, ahead: int,
        on_cell: Callable[[Cell], None], grouped: bool = False,
    ) -> None:  # fmt: skip
        """`grouped`: in each step all lanes give a short unit, or all a long one, as far as their cells have them."""
        self.reader, self.crew, self.cell_rows, self.ahead, self.grouped = reader, crew, cell_rows, ahead, grouped
        self.on_cell = on_cell
        self.stride = reader.batch
        self.lanes = {number: Lane(number=number) for number in lanes}
        self._blocks: deque[Block] = deque()
        self._begins: list[Beginning] = [reader.at]
        """Of the blocks from the oldest one on that a lane still uses."""
        self._changed = threading.Condition()
        self._closed = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._produce, name="llmtune-stream-reader", daemon=True)

    def start(self, cursor: dict[str, Any] | None = None) -> None:
        """Begin, or go on where `cursor` says."""
        if cursor is not None:
            begin = Beginning(**cursor["begin"])
            self.reader.restore(begin)
            self._begins = [begin]
            for number, cell, place in cursor["lanes"]:
                if lane := self.lanes.get(number):
                    lane.cell, lane.sent, lane.place = cell, cell, place
        self._thread.start()

    def close(self) -> None:
        """Stop reading. The crew is left to its owner."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE_S)  # it may wait for a network

    def cursor(self) -> dict[str, Any]:
        """Plain numbers from which a run goes on with the units that follow, whichever lanes it has."""
        with self._changed:
            oldest = min((self._first(lane, lane.cell) for lane in self.lanes.values()), default=None)
            begin = self._begins[-1 if oldest is None else self._index(oldest)]
            lanes = [[lane.number, lane.cell, lane.place] for lane in self.lanes.values()]
        return {"lanes": lanes, "begin": asdict(begin)}

    def epoch(self, known: int | None) -> float:
        """Epochs of the stream that the first lane has used; told by bytes until the rows of an epoch are `known`."""
        if not self.lanes:
            return 0.0
        row = next(iter(self.lanes.values())).row
        with self._changed:
            begin = self._begins[self._index(row)]
        size = begin.epoch_rows or known
        if size is None:
            return begin.epoch + begin.progress
        return begin.epoch + (row + self.stride - begin.epoch_first) / size

    def next(self, number: int, step: int) -> Unit:
        """A lane's unit for the 0-based `step`, the one after the last. Raises what reading or tokenising it raised."""
        lane = self.lanes[number]
        while lane.current is None or lane.place >= len(lane.current.units):
            if lane.current is not None:
                self._leave(lane)
            lane.current = self._cell(lane)
            lane.order = order_of(lane.current, step - lane.place, self.grouped)
            if lane.place == 0:  # else it was counted before the run was continued
                self.on_cell(lane.current)
        lane.empty = 0
        assert lane.order is not None
        unit = Unit(lane.current, int(lane.order[lane.place]), self._first(lane, lane.cell), self.stride)
        lane.row = unit.first + lane.place * self.cell_rows // len(lane.current.units) * self.stride
        lane.place += 1
        return unit

    def _leave(self, lane: Lane) -> None:
        assert lane.current is not None
        lane.empty = lane.empty + 1 if not len(lane.current.units) else 0
        if lane.empty * self.cell_rows >= EMPTY_ROWS:
            raise DataError(
                f"streaming: {lane.empty * self.cell_rows:,} rows in a row gave no sample with a token to train on; "
                "look at them with `llmtune data check`, or raise cutoff_len"
            )
        with self._changed:
            lane.cell, lane.place, lane.current = lane.cell + 1, 0, None
            oldest = min(self._first(each, each.cell) for each in self.lanes.values())
            del self._begins[: self._index(oldest)]

    def _cell(self, lane: Lane) -> Cell:
        with self._changed:
            while not lane.waiting:
                if self._error is not None:
                    raise self._error
                self._changed.wait()
            future = lane.waiting.popleft()
            self._changed.notify_all()
        return future.result()

    def _first(self, lane: Lane, cell: int) -> int:
        """The stream's row at place 0 of a lane's cell."""
        return cell * self.cell_rows * self.stride + lane.number

    def _index(self, row: int) -> int:
        """Which of `_begins` a row of the stream belongs to."""
        return max(0, bisect_right(self._begins, row, key=lambda begin: begin.first) - 1)

    def _produce(self) -> None:
        try:
            while (lane := self._next_lane()) is not None:
                parts = self._parts(lane)
                with self._changed:
                    if self._closed:
                        return
                    lane.waiting.append(self.crew.submit(parts))
                    lane.sent += 1
                    self._changed.notify_all()
        except Exception as error:  # raised on the training thread, once it needs what could not be read
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next_lane(self) -> Lane | None:
        """The lane whose next cell comes first, once one wants any; None when all is over."""
        with self._changed:
            while not self._closed:
                wanting = [lane for lane in self.lanes.values() if len(lane.waiting) < self.ahead]
                if wanting:
                    return min(wanting, key=lambda lane: self._first(lane, lane.sent))
                self._changed.wait()
        return None

    def _parts(self, lane: Lane) -> list[CellRows]:
        """The rows of a lane's next cell, by the chunks they come from."""
        rows = self._first(lane, lane.sent) + np.arange(self.cell_rows) * self.stride
        self._read_to(int(rows[-1]), int(min(self._first(each, each.sent) for each in self.lanes.values())))
        found: list[CellRows] = []
        for block in self._blocks:
            (places,) = np.nonzero((rows >= block.begin.first) & (rows < block.stop))
            if not len(places):
                continue
            held = np.searchsorted(block.own, rows[places])
            for part in np.unique(block.part[held]):
                chosen = np.flatnonzero(block.part[held] == part)
                source, picked = block.parts[part]
                found.append(CellRows(source, picked.pick(block.place[held][chosen].tolist()), places[chosen].tolist()))
        return found

    def _read_to(self, row: int, oldest: int) -> None:
        """Have all blocks up to the one with `row`; those before `oldest` are forgotten."""
        while self._blocks and self._blocks[0].stop <= oldest:
            self._blocks.popleft()
        while not self._blocks or self._blocks[-1].stop <= row:
            block = self.reader.next()
            with self._changed:
                if block.begin.first == self._begins[-1].first:  # the same place, said as the next epoch's
                    self._begins.pop()
                self._begins.append(block.begin)
            if block.stop > oldest:
                self._blocks.append(block)


def order_of(cell: Cell, step: int, grouped: bool) -> np.ndarray:
    """(units,) the order in which a cell's units are used from `step` on.

    `grouped`: each step has a wanted length, the same for all lanes, as a place among the units sorted by length. The
    places are multiples of the golden ratio, of which any few that follow each other are spread evenly over [0, 1), so
    each unit has a step that wants one like it.
    """
    count = len(cell.units)
    if not grouped:
        return np.arange(count)
    wanted = (step + np.arange(count)) * _GOLDEN % 1.0
    by_length = np.argsort([Unit(cell, number, 0, 0).length for number in range(count)], kind="stable")
    return by_length[np.argsort(np.argsort(wanted, kind="stable"))]
