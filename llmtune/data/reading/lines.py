"""Files of lines: JSON Lines and plain text. A chunk holds bytes; parsing is left to whoever asks for its rows."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llmtune.contract.errors import DataError
from llmtune.data.reading.rows import Position, Row, excerpt, half_pair, not_utf8, too_much

LONGEST_LINE_BYTES = 256 * 2**20
"""A longer line is an error: more likely a file without line ends than one sample."""
_BLOCK_BYTES = 4 * 2**20
_CUT = "the last line is cut off, was the file copied whole?"


@dataclass(frozen=True)
class Lines:
    """Consecutive lines of a file, without their line ends."""

    origin: str
    next: Position
    lines: Sequence[bytes]
    first: int
    """Number of the first line, from 1."""
    offset: int
    """Bytes before it."""
    text: bool
    """Whether lines are text rather than JSON."""
    ended: bool = True
    """Whether the last line had a line end."""

    @property
    def count(self) -> int:
        return len(self.lines)

    def rows(self) -> Iterator[Row]:
        last = self.first + len(self.lines) - 1
        for number, line in enumerate(self.lines, start=self.first):
            raw = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if raw.strip():
                yield self._row(raw, number, self.ended or number < last)

    def _row(self, raw: bytes, number: int, ended: bool) -> Row:
        place = f"{self.origin}{number}"
        try:
            text = raw.decode()
            data = {"text": text.removesuffix("\r")} if self.text else json.loads(text)
        except UnicodeDecodeError as error:
            if not ended and error.end == len(raw) and error.reason == "unexpected end of data":
                return Row(None, number, f"{place}: {_CUT} Found {excerpt(raw.decode('utf-8', 'replace'), len(raw))}")
            cause = not_utf8(raw[error.start], self._offset(number, raw) + error.start)
            at = len(raw[: error.start].decode())
            return Row(None, number, f"{place}:{at + 1}: {cause} Found {excerpt(raw.decode('utf-8', 'replace'), at)}")
        except json.JSONDecodeError as error:
            return Row(
                None, number, f"{place}:{error.colno}: {_cause(error, ended)} Found {excerpt(error.doc, error.pos)}"
            )
        except (ValueError, RecursionError) as error:
            return Row(None, number, f"{place}:1: {too_much(error)}")
        bad = None if self.text else half_pair(place, text, data)
        return Row(None if bad else data, number, bad)

    def _offset(self, number: int, raw: bytes) -> int:
        before = self.lines[: number - self.first]
        mark = len(self.lines[number - self.first]) - len(raw)
        return self.offset + sum(len(line) + 1 for line in before) + mark


def _cause(error: json.JSONDecodeError, ended: bool) -> str:
    text = error.doc.rstrip()
    if not ended and not text.endswith(("}", "]")):
        return _CUT
    if "\r" in text and error.msg == "Extra data":
        return "not JSON: lines end in a carriage return alone; convert it with `tr '\\r' '\\n'`."
    return f"not JSON: {error.msg}."


def line_chunks(
    path: Path, file: BinaryIO, start: Position, rows: int, *, seekable: bool, text: bool = False
) -> Iterator[Lines]:
    """Lines of an open file from `start` on, `rows` at a time."""
    offset = number = 0  # bytes and lines before the next chunk
    if seekable:
        file.seek(start.offset)
        offset, number = start.offset, start.before
    rest: list[bytes] = []  # a line that is not whole yet
    lines: list[bytes] = []
    while block := file.read(_BLOCK_BYTES):
        first, *more = block.split(b"\n")
        rest.append(first)
        if more:
            lines += [b"".join(rest), *more[:-1]]
            rest = [more[-1]]
        elif sum(map(len, rest)) > LONGEST_LINE_BYTES:
            at = number + len(lines) + 1
            raise DataError(f"{path}:{at}: longer than {LONGEST_LINE_BYTES >> 20} MiB; is it one row a line?")
        begin = 0
        if number < start.before:  # what cannot be entered in the middle is read from its beginning
            begin = min(start.before - number, len(lines))
            offset, number = offset + sum(map(len, lines[:begin])) + begin, number + begin
        while len(lines) - begin >= rows:
            chunk = lines[begin : begin + rows]
            size = sum(map(len, chunk)) + rows
            yield Lines(f"{path}:", Position(start.file, offset + size, number + rows), chunk, number + 1, offset, text)
            offset, number, begin = offset + size, number + rows, begin + rows
        lines = lines[begin:]
    last = b"".join(rest)
    if number >= start.before and (last or lines):
        chunk = [*lines, last] if last else lines
        yield Lines(f"{path}:", Position(start.file + 1), chunk, number + 1, offset, text, ended=not last)
