"""Where media stand in a message: a character for each that Unicode keeps out of all texts (a noncharacter), so that a
content stays one text until a template asks for its parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

from llmtune.contract.examples import MEDIA_KINDS, BadRow, Message

MARKS = {kind: chr(0xFDD0 + number) for number, kind in enumerate(MEDIA_KINDS)}
"""The character that stands for a medium of each kind."""
BOUNDARY = chr(0xFDD3)
"""The character that stands between two parts of a content where no medium does: templates that trim texts, or begin a
line for each, write two parts otherwise than one."""
_KIND = {mark: kind for kind, mark in MARKS.items()}
_ANY = re.compile("([" + "".join(_KIND) + "])")


def joined_parts(parts: Sequence[str]) -> str:
    """One text of a content's parts, each of which is a text or the mark of a medium."""
    text = "".join(parts[:1])
    for before, part in pairwise(parts):
        told_apart = bool(before) and bool(part) and (before in _KIND or part in _KIND)
        text += part if told_apart else BOUNDARY + part
    return text


def check_unmarked(text: str, place: str) -> None:
    """BadRow where a text that somebody wrote holds what would be taken for a mark."""
    if BOUNDARY in text or _ANY.search(text):
        raise BadRow("noncharacters", f"{place} holds U+FDD0 to U+FDD3, which stand for media and are no characters")


def kinds_in(text: str) -> list[str]:
    """The kinds of the media that stand in a text, in their order."""
    return [_KIND[found] for found in _ANY.findall(text)]


def with_marks_as(text: str, written: Callable[[str], str], begin: str = "") -> tuple[str, list[tuple[int, int]]]:
    """`begin` and the text, each mark in it as what is `written` for a medium of its kind; and where these stand."""
    spans = []
    for part in _ANY.split(text):
        more = written(_KIND[part]) if part in _KIND else part
        spans += [(len(begin), len(begin) + len(more))] if part in _KIND else []
        begin += more
    return begin, spans


def texts_between(text: str) -> list[str]:
    """What a text says before, between and after its media, without what is empty."""
    return [part for part in _parts(text) if part and part not in _KIND]


def as_parts(message: Message) -> Message:
    """The message with a list of parts for its content, as transformers' templates of models that read media want it:
    `{type: text, text: ...}`, `{type: image}`."""
    content = [
        {"type": _KIND[part]} if part in _KIND else {"type": "text", "text": part}
        for part in _parts(message["content"])
    ]
    return {**message, "content": content}


def _parts(text: str) -> list[str]:
    found: list[str] = []
    for piece in text.split(BOUNDARY):
        found += [part for part in _ANY.split(piece) if part] or [""]
    return found


def kinds_text(kinds: Sequence[str]) -> str:
    """How many there are of each kind, in words: `2 images and 1 video`."""
    counts = [(kind, kinds.count(kind)) for kind in MEDIA_KINDS if kind in kinds]
    return " and ".join(f"{count} {kind}{'s' if count > 1 and kind != 'audio' else ''}" for kind, count in counts)


def given_text(kinds: Sequence[str]) -> str:
    """The same as a sentence's end: `1 image was given`, `2 images were given`."""
    return f"{kinds_text(kinds)} {'was' if len(kinds) == 1 else 'were'} given"
