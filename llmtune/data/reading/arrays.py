"""JSON arrays, read row by row: a file of any size takes the memory of a few rows."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from llmtune.contract.errors import DataError
from llmtune.data.reading.rows import Row, excerpt, half_pair, not_utf8, too_much

_BLOCK_BYTES = 2**20
_NEAR_END = 64
"""Longer than any word or escape of JSON: an error so near the end may be no error once more is read."""
_SPACE = " \t\r\n"


def array_rows(path: Path, file: BinaryIO) -> Iterator[Row]:
    """Rows of a JSON array. Raises DataError where it is no JSON: what follows cannot be told from what is wrong."""
    window = _Window(path, file)
    window.expect("[")
    number = 0
    while window.peek() != "]":
        number += 1
        value, spelled = window.value()
        bad = half_pair(f"{path}:row {number}", spelled, value)
        yield Row(None if bad else value, number, bad)
        if window.peek() == ",":
            window.expect(",")
            if window.peek() == "]":
                window.fail("Illegal trailing comma before end of array")
        elif window.peek() != "]":
            window.fail("Expecting ',' delimiter")
    window.expect("]")
    if window.peek():
        window.fail("Extra data")


class _Window:
    """The part of a file's text that is being read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.text, self.at, self.ended = "", 0, False
        self.lines, self.column = 0, 0  # line ends, and characters after the last one, before the window
        self.raw_before, self.rest = 0, b""
        self.decoder = json.JSONDecoder()

    def more(self, size: int = _BLOCK_BYTES) -> bool:
        """Read on; what was used is forgotten. False at the end."""
        self._forget()
        block = self.file.read(size)
        self.ended = not block
        raw = self.rest + block
        if not self.raw_before and raw.startswith(codecs.BOM_UTF8):
            raw, self.raw_before = raw[3:], 3
        try:
            decoded, used = codecs.utf_8_decode(raw, "strict", self.ended)
        except UnicodeDecodeError as error:
            self._not_utf8(raw, error)
        self.text += decoded
        self.raw_before += used
        self.rest = raw[used:]
        return not self.ended

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def expect(self, sign: str) -> None:
        if self.peek() != sign:
            self.fail(f"Expecting '{sign}'")
        self.at += 1

    def value(self) -> tuple[Any, str]:
        """The next value and how it is spelt; more is read until it is whole."""
        if not self.peek():
            self.fail("Expecting value")
        size = _BLOCK_BYTES
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                near_end = error.msg.startswith("Unterminated") or error.pos + _NEAR_END > len(self.text)
                if near_end and not self.ended:  # what looks wrong may be the end of what was read
                    self.more(size)
                    size *= 2
                    continue
                self.fail(error.msg, error.pos)
            except (ValueError, RecursionError) as error:
                line = self.lines + self.text.count("\n", 0, self.at) + 1
                raise DataError(f"{self.path}:{line}: a row {too_much(error)}") from None
            if end < len(self.text) or self.ended:  # a number may go on
                spelled, self.at = self.text[self.at : end], end
                return value, spelled
            self.more()

    def fail(self, message: str, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        cut = not self.text[at:].strip() or message.startswith("Unterminated")
        cause = "the array is cut off, was the file copied whole?" if cut and self.ended else f"not JSON: {message}."
        before = self.text[:at]
        line = self.lines + before.count("\n") + 1
        column = len(before) - before.rfind("\n") if "\n" in before else self.column + len(before) + 1
        raise DataError(f"{self.path}:{line}:{column}: {cause} Found {excerpt(self.text, at)}")

    def _forget(self) -> None:
        used, self.text, self.at = self.text[: self.at], self.text[self.at :], 0
        self.column = len(used) - used.rfind("\n") - 1 if "\n" in used else self.column + len(used)
        self.lines += used.count("\n")

    def _not_utf8(self, raw: bytes, error: UnicodeDecodeError) -> NoReturn:
        good = raw[: error.start].decode()
        line = self.lines + self.text.count("\n") + good.count("\n") + 1
        line_start = raw.rfind(b"\n", 0, error.start) + 1
        part = raw[line_start : error.start + 200]
        inner = UnicodeDecodeError("utf-8", part, error.start - line_start, error.start - line_start + 1, error.reason)
        # The line may begin in what was decoded before, or in what was forgotten.
        tail = self.text[self.text.rfind("\n") + 1 :] if not line_start else ""
        shift = len(tail) + (self.column if not line_start and "\n" not in self.text else 0)
        place = f"{self.path}:{line}"
        raise DataError(not_utf8(place, part, inner, self.raw_before + line_start, shift)) from None
