"""Draw what a terminal shows amid a command: `python benchmarks/terminal_picture.py OUT.svg UNTIL llmtune ...`.

The picture is taken when the screen first matches the regular expression UNTIL; the command then is interrupted.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import signal
import struct
import sys
import termios
from pathlib import Path
from typing import Any

import pyte
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

COLUMNS, ROWS = 80, 26
LIGHT = TerminalTheme(
    (255, 255, 255), (36, 41, 47),
    [(36, 41, 47), (207, 34, 46), (17, 99, 41), (77, 45, 0), (9, 105, 218), (130, 80, 223), (27, 124, 131),
     (110, 119, 129)],
    [(140, 149, 159), (164, 14, 38), (26, 127, 55), (99, 60, 1), (33, 139, 255), (164, 117, 249), (49, 146, 170),
     (140, 149, 159)],
)  # fmt: skip


def screen_at(until: str, command: list[str]) -> list[list[Any]]:
    """The screen of a command when it first matched `until`; its last one where it never did."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream, taken = pyte.ByteStream(screen), None
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe(command[0], command, {**os.environ, "TERM": "xterm-256color"})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    while True:
        try:
            data = os.read(terminal, 4096)
        except OSError:
            break
        stream.feed(data)
        if taken is None and re.search(until, "\n".join(screen.display)):
            taken = [[screen.buffer[row][column] for column in range(COLUMNS)] for row in range(ROWS)]
            os.kill(child, signal.SIGINT)
    os.waitpid(child, 0)
    return taken or [[screen.buffer[row][column] for column in range(COLUMNS)] for row in range(ROWS)]


def main(target: str, until: str, *command: str) -> None:
    """Run the command and write the picture."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    rows = screen_at(until, list(command))
    while rows and not any(cell.data.strip() for cell in rows[-1]):
        rows.pop()
    for row in rows:
        line = Text()
        for cell in row:
            colour = {"brown": "yellow", "brightblack": "bright_black"}.get(cell.fg, cell.fg)
            line.append(cell.data, f"{'bold ' * cell.bold}{'' if colour == 'default' else colour}".strip())
        console.print(line, soft_wrap=True)
    shown = " ".join(["llmtune", *command[1:]])
    picture = console.export_svg(title=shown, theme=LIGHT)
    # Without its fonts, which a page would fetch from elsewhere: any of fixed width will do.
    Path(target).write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.S), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
