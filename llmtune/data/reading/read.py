"""Chunks of rows of a data set, whatever holds it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from llmtune.contract.errors import DataError
from llmtune.data.reading.arrays import array_rows
from llmtune.data.reading.dataset import Dataset
from llmtune.data.reading.files import COMPRESSED, check_encoding, kind_of, opened
from llmtune.data.reading.hub import hub_rows
from llmtune.data.reading.lines import line_chunks
from llmtune.data.reading.rows import Chunk, Parsed, Position, Row
from llmtune.data.reading.tables import SEPARATORS, arrow_chunks, csv_rows, parquet_chunks, separator_of

CHUNK_ROWS = 1000
_HEAD_BYTES = 2**16
"""The beginning of a file that tells what it holds."""
_ONE_OBJECT_BYTES = 2**28
"""A larger file is taken for lines."""


def chunks(
    dataset: Dataset, start: Position | None = None, rows: int = CHUNK_ROWS, *, streaming: bool = False
) -> Iterator[Chunk]:
    """Rows of a data set from `start` on, files in their order, at most `rows` in a chunk.

    Raises:
        DataError: a whole file cannot be read. A row that cannot be read is a `Row` with a problem.
    """
    start = start or Position()
    if dataset.hub is not None:
        if not start.file:
            each = hub_rows(dataset, start.before, streaming=streaming)
            yield from _in_chunks(f"hub:{dataset.hub}:row ", each, start, rows)
        return
    for number, path in enumerate(dataset.files):
        if number < start.file:
            continue
        place = start if number == start.file else Position(number)
        try:
            yield from _file_chunks(path, place, rows)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}); check its rights") from None


def first_rows(all_chunks: Iterator[Chunk], limit: int | None) -> Iterator[Chunk]:
    """The chunks up to `limit` rows in all (None: all of them). How many rows are in one, only reading it tells."""
    if limit is None:
        yield from all_chunks
        return
    for chunk in all_chunks:
        rows = list(islice(chunk.rows(), limit))
        yield Parsed(chunk.origin, chunk.next, rows)
        limit -= len(rows)
        if not limit:
            return


def separated(dataset: Dataset) -> str:
    """What separates columns, in words to follow others, where it is not what the ending of a file says."""
    for path in dataset.files:
        if kind_of(path) == "csv":
            with opened(path) as file:
                sign = separator_of(path, file.read(_HEAD_BYTES))
            if sign != ("\t" if ".tsv" in path.suffixes else ","):
                return f"; columns are separated by {SEPARATORS[sign]}"
    return ""


def _file_chunks(path: Path, start: Position, rows: int) -> Iterator[Chunk]:
    kind = kind_of(path)
    if kind == "parquet":
        yield from parquet_chunks(path, start, rows)
        return
    if kind == "arrow":
        yield from arrow_chunks(path, start, rows)
        return
    with opened(path) as file:
        head = file.read(_HEAD_BYTES)
    check_encoding(path, head)
    with opened(path) as file:
        if kind == "csv":
            yield from _in_chunks(f"{path}:", csv_rows(path, file, separator_of(path, head)), start, rows)
            return
        begin = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        # A file may hold an array or lines, whatever its ending says.
        if kind != "text" and begin.startswith(b"["):
            yield from _in_chunks(f"{path}:row ", array_rows(path, file), start, rows)
            return
        if kind == "json" and begin.startswith(b"{") and _is_one_object(path, begin):
            raise DataError(
                f"{path}: holds one JSON object, allowed is an array of rows or one row a line; wrap it in [ ]"
            )
        plain = path.suffix not in COMPRESSED
        yield from line_chunks(path, file, start, rows, seekable=plain, text=kind == "text")


def _in_chunks(origin: str, parsed: Iterator[Row], start: Position, rows: int) -> Iterator[Parsed]:
    kept: list[Row] = []
    for row in parsed:
        if row.number > start.before:
            kept.append(row)
        if len(kept) == rows:
            yield Parsed(origin, start._replace(before=row.number), kept)
            kept = []
    if kept:
        yield Parsed(origin, Position(start.file + 1), kept)


def _is_one_object(path: Path, head: bytes) -> bool:
    """Whether the file, which begins with `head`, is one JSON object over several lines."""
    if _is_json(head.partition(b"\n")[0]):
        return False
    with opened(path) as file:
        return _is_json(file.read(_ONE_OBJECT_BYTES))


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
