"""Files of lines: JSON Lines and plain text. A chunk holds bytes; parsing is left to whoever asks for its rows."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llmtune.data.reading.rows import Position, Row, excerpt, not_utf8
from llmtune.errors import DataError

LONGEST_LINE_BYTES = 256 * 2**20
"""A longer line is an error: more likely a file without line ends than one sample."""
_BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Lines:
    """Consecutive lines of a file, without their line ends."""

    origin: str
    next: Position
    found: Sequence[bytes]
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
        return len(self.found)

    def rows(self) -> Iterator[Row]:
        last = self.first + len(self.found) - 1
        for number, line in enumerate(self.found, start=self.first):
            raw = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if raw.strip():
                yield self._row(raw, number, self.ended or number < last)

    def _row(self, raw: bytes, number: int, ended: bool) -> Row:
        place = f"{self.origin}{number}"
        try:
            text = raw.decode().rstrip()
            return Row({"text": text} if self.text else json.loads(text), number)
        except UnicodeDecodeError as error:
            return Row(None, number, not_utf8(place, raw, error, self._offset(number, raw)))
        except json.JSONDecodeError as error:
            cause = "the last line is cut off, was the file copied whole?" if not ended else f"not JSON: {error.msg}"
            return Row(None, number, f"{place}:{error.colno}: {cause} Found {excerpt(error.doc, error.pos)}")
        except RecursionError:
            return Row(None, number, f"{place}:1: nested too deeply")

    def _offset(self, number: int, raw: bytes) -> int:
        before = self.found[: number - self.first]
        mark = len(self.found[number - self.first]) - len(raw)
        return self.offset + sum(len(line) + 1 for line in before) + mark


def line_chunks(
    path: Path, file: BinaryIO, start: Position, rows: int, *, seekable: bool, text: bool = False
) -> Iterator[Lines]:
    """Lines of an open file from `start` on, `rows` at a time."""
    offset = number = 0  # bytes and lines before the next chunk
    if seekable:
        file.seek(start.offset)
        offset, number = start.offset, start.before
    rest, lines = b"", []
    while block := file.read(_BLOCK_BYTES):
        *whole, rest = (rest + block).split(b"\n")
        if len(rest) > LONGEST_LINE_BYTES:
            at = number + len(lines) + len(whole) + 1
            raise DataError(f"{path}:{at}: longer than {LONGEST_LINE_BYTES >> 20} MiB; is it one row a line?")
        lines += whole
        while len(lines) >= rows:
            chunk, lines = lines[:rows], lines[rows:]
            size = sum(map(len, chunk)) + len(chunk)
            if number >= start.before:
                place = Position(start.file, offset + size, number + len(chunk))
                yield Lines(f"{path}:", place, chunk, number + 1, offset, text)
            offset, number = offset + size, number + len(chunk)
    if rest or lines:
        chunk = [*lines, rest] if rest else lines
        place = Position(start.file + 1)
        if number >= start.before:
            yield Lines(f"{path}:", place, chunk, number + 1, offset, text, ended=not rest)
