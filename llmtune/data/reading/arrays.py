"""JSON arrays, read row by row: a file of any size takes the memory of a few rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from encodings import utf_8_sig
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from llmtune.contract.errors import DataError
from llmtune.data.reading.rows import Row, excerpt, half_pair, not_utf8, too_much

_BLOCK_BYTES = 2**20
_NEAR_END = 64
"""Longer than any word or escape of JSON: an error so near the end may be no error once more is read."""
_SPACES = re.compile(r"[ \t\r\n]*")


def array_rows(path: Path, file: BinaryIO) -> Iterator[Row]:
    """Rows of a JSON array. Raises DataError where it is no JSON: what follows cannot be told from what is wrong."""
    window = _Window(path, file)
    window.expect("[")
    number = 0
    while window.peek() != "]":
        if number:
            window.expect(",")
        number += 1
        value, spelled = window.value()
        bad = half_pair(f"{path}:row {number}", spelled, value)
        yield Row(None if bad else value, number, bad)
    window.expect("]")
    if window.peek():
        window.fail("Extra data")


class _Window:
    """The part of a file's text that is being read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.text, self.at, self.ended = "", 0, False
        self.line, self.column = 1, 1  # of the first character of `text`
        self.bytes_read = 0
        self.utf8, self.json = utf_8_sig.IncrementalDecoder(), json.JSONDecoder()

    def more(self, size: int = _BLOCK_BYTES) -> bool:
        """Read on; what was used is forgotten. False at the end."""
        self.line, self.column = self.place(self.at)
        self.text, self.at = self.text[self.at :], 0
        block = self.file.read(size)
        self.ended, self.bytes_read = not block, self.bytes_read + len(block)
        try:
            self.text += self.utf8.decode(block, self.ended)
        except UnicodeDecodeError as error:
            at = len(self.text) + len(error.object[: error.start].decode())
            self.text += error.object.decode("utf-8", "replace")
            offset = self.bytes_read - len(error.object) + error.start
            self.refuse(not_utf8(error.object[error.start], offset), at)
        return not self.ended

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            self.at = _SPACES.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def expect(self, sign: str) -> None:
        if self.peek() != sign:
            self.fail(f"Expecting '{sign}' delimiter")
        self.at += 1

    def value(self) -> tuple[Any, str]:
        """The next value and how it is spelt; more is read until it is whole."""
        size = _BLOCK_BYTES
        self.peek()
        while True:
            try:
                value, end = self.json.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                near_end = error.msg.startswith("Unterminated") or error.pos + _NEAR_END > len(self.text)
                if self.ended or not near_end:
                    self.fail(error.msg, error.pos)
                self.more(size)  # what looks wrong may be the end of what was read
                size *= 2
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.path}:{self.place(self.at)[0]}: a row {too_much(error)}") from None
            else:
                if end < len(self.text) or self.ended:
                    spelled, self.at = self.text[self.at : end], end
                    return value, spelled
                self.more()  # a number may go on

    def fail(self, message: str, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        cut = self.ended and (not self.text[at:].strip() or message.startswith("Unterminated"))
        self.refuse("the array is cut off, was the file copied whole?" if cut else f"not JSON: {message}.", at)

    def refuse(self, cause: str, at: int) -> NoReturn:
        line, column = self.place(at)
        raise DataError(f"{self.path}:{line}:{column}: {cause} Found {excerpt(self.text, at)}")

    def place(self, at: int) -> tuple[int, int]:
        """Line and column, from 1, of a character of `text`."""
        line_end = self.text.rfind("\n", 0, at)
        return self.line + self.text.count("\n", 0, at), at - line_end if line_end >= 0 else self.column + at
