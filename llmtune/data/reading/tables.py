"""Tables: Parquet, Arrow and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llmtune.contract.errors import DataError
from llmtune.data.reading.files import COMPRESSED, opened
from llmtune.data.reading.rows import Position, Row, excerpt


@dataclass(frozen=True)
class ArrowChunk:
    """Rows of an Arrow table, which become Python objects where they are used."""

    origin: str
    next: Position
    table: Any
    """pyarrow.RecordBatch."""
    first: int

    @property
    def count(self) -> int:
        return self.table.num_rows

    def rows(self) -> Iterator[Row]:
        return table_rows(self.table, range(self.first, self.first + self.count), self.origin)


def table_rows(table: Any, numbers: Sequence[int], origin: str) -> Iterator[Row]:
    """Rows of an Arrow table as Python objects."""
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError as error:
        if len(numbers) == 1:
            what = f"byte 0x{error.object[error.start]:02x} of a text is not UTF-8; write it again as UTF-8"
            yield Row(None, numbers[0], f"{origin}{numbers[0]}: {what}. Found {error.object[:60]!r}")
        else:
            for at, number in enumerate(numbers):
                yield from table_rows(table.slice(at, 1), [number], origin)
        return
    for data, number in zip(rows, numbers, strict=True):
        yield Row(without_nulls(data), number)


def without_nulls(value: Any) -> Any:
    """A table fills columns that a row lacks with null; without them a row reads as it does from JSON."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    return value


def parquet_chunks(path: Path, start: Position, rows: int) -> Iterator[ArrowChunk]:
    """Rows of a Parquet file; row groups before `start` are not read."""
    from pyarrow import parquet

    with _arrow_bytes(path, "a Parquet file") as source, parquet.ParquetFile(source) as file:
        number, groups = 0, []
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if not groups and number + size <= start.before:
                number += size
            else:
                groups.append(group)
        batches = file.iter_batches(batch_size=rows, row_groups=groups) if groups else iter(())
        yield from _batches(path, batches, start, number)


def arrow_chunks(path: Path, start: Position, rows: int) -> Iterator[ArrowChunk]:
    """Rows of an Arrow IPC file or stream, Feather included."""
    from pyarrow import ipc

    with _arrow_bytes(path, "an Arrow file") as source:
        whole = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = ipc.open_file(source) if whole else ipc.open_stream(source)
        batches = (reader.get_batch(at) for at in range(reader.num_record_batches)) if whole else iter(reader)
        pieces = (batch.slice(at, rows) for batch in batches for at in range(0, batch.num_rows, rows))
        yield from _batches(path, pieces, start, 0)


@contextmanager
def _arrow_bytes(path: Path, name: str) -> Iterator[Any]:
    """The file as pyarrow reads it; one that is packed from outside is unpacked into memory. DataError if damaged."""
    import pyarrow

    with opened(path) as file:
        packed = path.suffix in COMPRESSED
        source = pyarrow.BufferReader(file.read()) if packed else pyarrow.memory_map(str(path))
    try:
        with source:
            yield source
    except (pyarrow.ArrowException, OSError) as error:  # OSError is pyarrow's word for data that cannot be unpacked
        what = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"{path}: not {name}, or a damaged one ({what}); copy it again") from None


def _batches(path: Path, batches: Iterator[Any], start: Position, number: int) -> Iterator[ArrowChunk]:
    for batch in batches:
        if number + batch.num_rows > start.before:
            batch = batch.slice(max(0, start.before - number))
            number = max(number, start.before)
            yield ArrowChunk(f"{path}:row ", start._replace(before=number + batch.num_rows), batch, number + 1)
        number += batch.num_rows


SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
"""What may stand between the columns of a CSV file; spreadsheets write semicolons where numbers have decimal commas."""


def separator_of(path: Path, head: bytes) -> str:
    """What separates the columns of the CSV file that begins with `head`: the sign that divides the first line; of
    several, the one by which most lines after it have as many values.

    Raises:
        DataError: several fit alike.
    """
    usual = "\t" if ".tsv" in path.suffixes else ","
    text = head.decode("utf-8-sig", "replace")
    fits = {sign: share for sign in SEPARATORS if (share := _share_that_fits(text, sign))}
    best = [sign for sign, share in fits.items() if share == max(fits.values())]
    if len(best) > 1:
        names = " and ".join(SEPARATORS[sign] for sign in best)
        raise DataError(
            f"{path}:1: {names} may separate these columns, and the first lines do not tell which; put names and "
            "values that hold either in quotes, or save it with tabs as .tsv"
        )
    return best[0] if best else usual


def _share_that_fits(text: str, sign: str) -> float:
    """Share of the first records that have as many values as the first line, where `sign` divides that; else 0."""
    sizes: list[int] = []
    with suppress(csv.Error):
        sizes += (
            len(values) for values in csv.reader(io.StringIO(text, newline=""), delimiter=sign, strict=True) if values
        )
    if not sizes or sizes[0] < 2:
        return 0.0
    return sizes.count(sizes[0]) / len(sizes)


_ESCAPED = re.compile("[\udc80-\udcff]")
"""What `surrogateescape` makes of bytes that are no UTF-8."""


def csv_rows(path: Path, file: BinaryIO, separator: str) -> Iterator[Row]:
    """Rows of a CSV file with a line of column names. All values are text; empty stays empty."""
    csv.field_size_limit(2**31 - 1)  # the default, 128 kB, is less than a long document
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=separator, strict=True)
    columns = _column_names(path, _values(path, reader) or [])
    line = reader.line_num + 1
    while (values := _values(path, reader)) is not None:
        if values:  # a blank line has none
            yield _csv_row(path, line, columns, values)
        line = reader.line_num + 1


def _values(path: Path, reader: Any) -> list[str] | None:
    """The values of the next row; None at the end."""
    line = reader.line_num + 1
    try:
        return next(reader, None)
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not CSV ({error}); is a quote not closed?") from None


def _column_names(path: Path, columns: list[str]) -> list[str]:
    if len(set(columns)) < len(columns) or not all(name.strip() for name in columns):
        raise DataError(f"{path}:1: column names are empty or come twice ({', '.join(columns)}); mend the first line")
    if len(columns) == 1 and "|" in columns[0]:
        allowed = ", ".join(SEPARATORS.values())
        raise DataError(f"{path}:1: columns seem to be separated by '|', allowed are {allowed}; save it so")
    return columns


def _csv_row(path: Path, line: int, columns: list[str], values: list[str]) -> Row:
    if len(values) != len(columns):
        what = f"has {len(values)} values, the first line names {len(columns)} columns ({', '.join(columns)})"
        return Row(None, line, f"{path}:{line}: {what}")
    for column, value in zip(columns, values, strict=True):
        if escaped := _ESCAPED.search(value):
            byte = f'byte 0x{ord(escaped[0]) - 0xDC00:02x} in the column "{column}"'
            shown = excerpt(_ESCAPED.sub("\ufffd", value), escaped.start())
            return Row(None, line, f"{path}:{line}: {byte} is not UTF-8; save the file as UTF-8. Found {shown}")
    return Row(dict(zip(columns, values, strict=True)), line)
