"""A terminal of a given size, for tests that look at what a person sees."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyte

ERASES = b"\r\x1b[2K"
"""How rich begins to draw over its last picture."""


@dataclass
class Screen:
    """What a command has shown."""

    lines: list[str]
    """Everything that can be scrolled back to, and the screen itself, at the end."""
    bottoms: list[str] = field(default_factory=list)
    """The last line of the screen, whenever it changed."""
    code: int = 0
    unbroken: list[str] = field(default_factory=list)
    """What `lines` would be on a terminal of endless width: the same, unless the terminal had to break lines."""

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def on_terminal(
    arguments: list[str], columns: int = 80, rows: int = 24, folder: Path | None = None,
    typed: Sequence[tuple[str, str]] = (),
) -> Screen:  # fmt: skip
    """Run `python ARGUMENTS` in `folder`, on a terminal of `columns` x `rows` characters, and wait for its end.

    `typed` has what is typed, in its order, each with a pattern of the line at the bottom that it waits for. A command
    that says nothing for two minutes is killed.
    """
    screen, wide = (pyte.HistoryScreen(width, rows, history=10_000) for width in (columns, 10_000))
    streams = pyte.ByteStream(screen), pyte.ByteStream(wide)
    bottoms: list[str] = []
    waiting = list(typed)
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder or ".")
        plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        os.execve(sys.executable, [sys.executable, *arguments], {**plain, "TERM": "xterm-256color"})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def look() -> None:
        shown = [line.rstrip() for line in screen.display if line.strip()]
        if shown and shown[-1] not in bottoms[-1:]:
            bottoms.append(shown[-1])

    def answer() -> None:
        shown = [line.rstrip() for line in screen.display if line.strip()]
        if shown and waiting and re.search(waiting[0][0], shown[-1]):
            os.write(terminal, waiting.pop(0)[1].encode())

    while data := _read(terminal):
        # However much is read at once: a picture is whole where the next one begins to erase it, and in a pause.
        for number, part in enumerate(data.split(ERASES)):
            if number:
                look()
            for stream in streams:
                stream.feed(part if not number else ERASES + part)
        answer()  # without waiting for a pause, which a model that goes on and on does not make
        if not select.select([terminal], [], [], 0.005)[0]:
            look()
        if not select.select([terminal], [], [], 120)[0]:
            os.kill(child, signal.SIGKILL)
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Screen(_lines(screen), bottoms, code, _lines(wide))


def _lines(screen: pyte.HistoryScreen) -> list[str]:
    past = ["".join(line[column].data for column in range(max(line, default=-1) + 1)) for line in screen.history.top]
    lines = [line.rstrip() for line in [*past, *screen.display]]
    return lines[: max((number for number, line in enumerate(lines, 1) if line), default=0)]


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux's way to say that the other end is closed
        return b""
