"""What an answer says while it comes: its text is told apart into thoughts, answer and calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from llmtune.data.tool_calls import Call, CallFormat

THINK, THOUGHT = "<think>", "</think>"
"""What most models that think write before and after it."""


def begun(text: str, marks: Sequence[str]) -> int:
    """Where the first of `marks` begins in a text, or may begin at its end; the text's length where none does."""
    found = [text.find(mark) for mark in marks if mark in text]
    ends = (
        len(text) - size
        for mark in marks
        for size in range(min(len(mark) - 1, len(text)), 0, -1)
        if text.endswith(mark[:size])
    )
    return min([*found, *ends, len(text)])


@dataclass
class Stops:
    """Texts that end an answer; neither they nor what follows is told."""

    texts: Sequence[str]
    hit: bool = False
    _held: str = ""

    def push(self, text: str, last: bool = False) -> str:
        """What can be told now: no stop begins in it, or may begin at its end unless this is the `last` text."""
        if self.hit:
            return ""
        self._held += text
        at = min((self._held.find(stop) for stop in self.texts if stop in self._held), default=-1)
        if at >= 0:
            self.hit = True
            told, self._held = self._held[:at], ""
            return told
        at = len(self._held) if last else begun(self._held, self.texts)
        told, self._held = self._held[:at], self._held[at:]
        return told


Kind = Literal["thinking", "text"]


class SaidPiece(NamedTuple):
    """A piece of what is said."""

    kind: Kind
    text: str


@dataclass
class Channels:
    """An answer's text told apart: what is thought between `<think>` and `</think>`, what is said, and calls."""

    format: CallFormat | None = None
    """How calls stand in the text; None where no tools are offered."""
    thinking: bool = False
    """Whether the prompt has already begun a thought."""
    calls: list[Call] = field(default_factory=list)
    """The calls of the answer; known at its end."""
    _held: str = ""
    _state: Literal["start", "thinking", "after", "text"] = field(init=False)

    def __post_init__(self) -> None:
        self._state = "thinking" if self.thinking else "start"

    def push(self, text: str, last: bool = False) -> Iterator[SaidPiece]:
        """The pieces that can be told now; with `last` all that is left, without the calls that it holds."""
        self._held += text
        if self._state == "start":
            ahead = self._held.lstrip()
            if ahead.startswith(THINK):
                self._held, self._state = ahead.removeprefix(THINK), "thinking"
            elif last or not THINK.startswith(ahead):
                self._state = "text"
        if self._state == "thinking":
            yield from self._thought(last)
        if self._state == "after":  # line breaks between a thought and the answer belong to neither
            self._held = self._held.lstrip()
            self._state = "text" if self._held else "after"
        if self._state == "text":
            yield from self._said(last)

    def _thought(self, last: bool) -> Iterator[SaidPiece]:
        whole = THOUGHT in self._held
        at = len(self._held) if last and not whole else begun(self._held, [THOUGHT])
        told, self._held = self._held[:at], self._held[at:]
        if whole:
            self._held, self._state = self._held.removeprefix(THOUGHT), "after"
        if told:
            yield SaidPiece("thinking", told)

    def _said(self, last: bool) -> Iterator[SaidPiece]:
        at = len(self._held)
        if self.format is not None and not last:
            at = begun(self._held, [self.format.mark]) if self.format.mark else 0
            at = len(self._held[:at].rstrip())  # white space before a call belongs to neither
        elif self.format is not None:
            said, self.calls = self.format.parse(self._held)
            self._held = said
            at = len(said)
        told, self._held = self._held[:at], self._held[at:]
        if told:
            yield SaidPiece("text", told)
