"""What reading gives: rows, in chunks that are cheap to make and to send to another process."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


class Row(NamedTuple):
    """One row as it was read, or the reason why it could not be."""

    data: Any
    number: int
    """The line of a line-wise file, else the number of the row; both from 1."""
    problem: str | None = None
    """What is wrong with the row's bytes, with its place and an excerpt; then `data` is None."""


class Position(NamedTuple):
    """Where a chunk begins, for reading on from there. Plain numbers."""

    file: int = 0
    """Number of the file in `Dataset.files`."""
    offset: int = 0
    """Bytes before it, where a file can be entered at any byte; else 0."""
    before: int = 0
    """Lines or rows of the file before it."""


class Chunk(Protocol):
    """Some consecutive rows of one file. Picklable; parsed where `rows` is called."""

    @property
    def origin(self) -> str:
        """Where the rows stand: `path:` or `path:row `, which a row's number follows."""
        ...

    @property
    def next(self) -> Position:
        """Where the chunk after it begins."""
        ...

    @property
    def count(self) -> int:
        """Rows in it at most; blank lines count."""
        ...

    def rows(self) -> Iterator[Row]: ...


@dataclass(frozen=True)
class Parsed:
    """Rows that are already parsed."""

    origin: str
    next: Position
    found: Sequence[Row]

    @property
    def count(self) -> int:
        return len(self.found)

    def rows(self) -> Iterator[Row]:
        return iter(self.found)


def excerpt(text: str, at: int, around: int = 30) -> str:
    """The text around a character, which is marked: `..."a": tru>>>e}...`."""
    before, after = text[max(0, at - around) : at], text[at : at + around]
    shown = f"{before}>>>{after}".replace("\n", "\\n").replace("\r", "\\r")
    return f"{'...' if at > around else ''}{shown}{'...' if at + around < len(text.rstrip()) else ''}"


def not_utf8(byte: int, offset: int) -> str:
    """What to say of a byte that is no UTF-8, `offset` bytes into its file; an excerpt follows."""
    return f"byte 0x{byte:02x} at offset {offset} of the file is not UTF-8; save the file as UTF-8."


_HALF = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)


def half_pair(place: str, text: str, data: Any) -> str | None:
    """What to say if the JSON `text`, which says `data`, spells half a character: no tokenizer takes it."""
    if "\\ud" not in text and "\\uD" not in text:
        return None
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        half = _HALF.search(text)
        at = half.start() if half else 0
        what = "half of a surrogate pair, which is no character; was a text cut inside an emoji?"
        return f"{place}:{at + 1}: {what} Found {excerpt(text, at)}"
    return None


def too_much(error: ValueError | RecursionError) -> str:
    """What to say where JSON is right and Python still does not read it."""
    return "is nested too deeply" if isinstance(error, RecursionError) else "holds a number of more than 4,300 digits"
