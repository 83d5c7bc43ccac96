"""Some rows of a chunk, still as they were read, so that a rank parses no row that is another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

from llmtune.data.reading import Chunk, Row
from llmtune.data.reading.lines import Lines
from llmtune.data.reading.tables import ArrowChunk, table_rows


class Picked(Protocol):
    """Some rows of one file. Picklable."""

    @property
    def origin(self) -> str:
        """Where the rows stand: a row's number follows it."""
        ...

    def pick(self, places: Sequence[int]) -> Picked:
        """Some of these rows again, in the order of `places`."""
        ...

    def rows(self) -> list[Row]:
        """The rows, parsed; as many as were picked."""
        ...


def usable(chunk: Chunk) -> Sequence[int]:
    """Places in `chunk` that hold a row: all but blank lines."""
    if isinstance(chunk, Lines):
        return [place for place, line in enumerate(chunk.found) if line.strip()]
    return range(chunk.count)


def pick(chunk: Chunk, places: Sequence[int]) -> Picked:
    """The rows at some `usable` places of `chunk`."""
    if isinstance(chunk, Lines):
        begins = list(accumulate((len(line) + 1 for line in chunk.found), initial=chunk.offset))
        return PickedLines(
            chunk.origin,
            chunk.text,
            [chunk.found[place] for place in places],
            [chunk.first + place for place in places],
            [begins[place] for place in places],
            None if chunk.ended else chunk.first + len(chunk.found) - 1,
        )
    if isinstance(chunk, ArrowChunk):
        table = chunk.table.take(list(places))
        return PickedTable(chunk.origin, table, [chunk.first + place for place in places])
    found = list(chunk.rows())
    return PickedRows(chunk.origin, [found[place] for place in places])


@dataclass(frozen=True)
class PickedLines:
    """Lines of a file, as bytes."""

    origin: str
    text: bool
    lines: list[bytes]
    numbers: list[int]
    offsets: list[int]
    """Bytes of the file before each line."""
    cut: int | None
    """The line that has no line end, if the chunk had one."""

    def pick(self, places: Sequence[int]) -> PickedLines:
        lines, numbers, offsets = (
            [values[place] for place in places] for values in (self.lines, self.numbers, self.offsets)
        )
        return replace(self, lines=lines, numbers=numbers, offsets=offsets)

    def rows(self) -> list[Row]:
        place: Any = None  # where the next chunk begins, which nobody asks of a single line
        return [
            row
            for line, number, offset in zip(self.lines, self.numbers, self.offsets, strict=True)
            for row in Lines(self.origin, place, [line], number, offset, self.text, number != self.cut).rows()
        ]


@dataclass(frozen=True)
class PickedTable:
    """Rows of an Arrow table."""

    origin: str
    table: Any
    """pyarrow.RecordBatch."""
    numbers: list[int]

    def pick(self, places: Sequence[int]) -> PickedTable:
        return PickedTable(self.origin, self.table.take(list(places)), [self.numbers[place] for place in places])

    def rows(self) -> list[Row]:
        return list(table_rows(self.table, self.numbers, self.origin))


@dataclass(frozen=True)
class PickedRows:
    """Rows that came parsed."""

    origin: str
    found: list[Row]

    def pick(self, places: Sequence[int]) -> PickedRows:
        return PickedRows(self.origin, [self.found[place] for place in places])

    def rows(self) -> list[Row]:
        return self.found
