"""How results and progress look where they are printed: on a terminal, in a notebook, in a file."""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Container, Iterable, Sequence
from html import escape
from typing import ClassVar, TextIO

NOTEBOOK_COLUMNS = 80
"""Columns of text in a notebook; in the page that is exported from one, longer lines are broken inside of words."""

FROM_NOTEBOOK = "LLMTUNE_FROM_NOTEBOOK"
"""The variable by which the ranks that a notebook starts know that their lines are shown there."""

doing = logging.getLogger("llmtune.doing")
"""Whatever takes more than a moment is announced here. Nothing is shown before `show_doing`."""


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


def shown_in_notebook() -> bool:
    """Whether what this process prints stands in a notebook: it is the kernel, or a rank that one has started."""
    return in_notebook() or FROM_NOTEBOOK in os.environ


def columns(stream: TextIO) -> int | None:
    """The width of a terminal or a notebook. Files and pipes have none: their lines stay whole, for other programs."""
    if shown_in_notebook():
        return NOTEBOOK_COLUMNS
    return shutil.get_terminal_size().columns if stream.isatty() else None


def fit(text: str, width: int | None) -> str:
    """`text` in lines of at most `width` columns, broken at spaces only.

    What is broken off stands below the text that follows the line's first gap of two spaces, or below its beginning.
    """
    return text if width is None else "\n".join(_fold(line, width) for line in text.split("\n"))


def _fold(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    gap = re.match(r" *\S.*? {2,}", line)
    indent = gap.end() if gap and gap.end() <= width // 2 else len(line) - len(line.lstrip())
    # Words longer than a line, such as paths, stay whole, so that they can be copied.
    return textwrap.fill(line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def table_text(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, left: Container[int] = (), width: int = NOTEBOOK_COLUMNS
) -> str:
    """A table whose columns stand at the right, but for those numbered in `left`. Where it is wider than `width`,
    headings are broken at spaces; cells never are."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table

    columns = list(zip(head, *rows, strict=True))
    table = Table(box=None, pad_edge=False, header_style="")
    broken = sum(max(map(cell_len, column)) + 2 for column in columns) - 2 > width
    for number, (heading, *cells) in enumerate(columns):
        room = max(1, *map(cell_len, cells)) if broken else width
        lines = textwrap.wrap(heading, room, break_long_words=False, break_on_hyphens=False)
        table.add_column("\n".join(lines), justify="left" if number in left else "right")
    for row in zip(*(cells for _, *cells in columns), strict=True):
        table.add_row(*row)
    endless = Console(width=10_000, file=io.StringIO(), force_jupyter=False, markup=False, emoji=False, highlight=False)
    with endless.capture() as captured:
        endless.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def say(text: str, stream: TextIO | None = None) -> None:
    """Print `text` so that it fits the terminal or notebook at hand."""
    stream = stream or sys.stdout
    print(fit(text, columns(stream)), file=stream, flush=True)


class DoingLines(logging.Handler):
    """Prints each announcement as a line on standard error, in a notebook, where that looks like an error, on standard
    output, with the seconds since the handler was made."""

    def __init__(self) -> None:
        super().__init__()
        self.start = time.time()

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line; the stream is the present one, which a progress bar may have replaced by its own."""
        stream = sys.stdout if shown_in_notebook() else sys.stderr
        say(f"{record.created - self.start:6.1f} s  {record.getMessage()}", stream)


def show_doing() -> None:
    """From now on, say what is being done."""
    doing.handlers[:] = [DoingLines()]
    doing.setLevel(logging.INFO)
    doing.propagate = False


def quiet_imports() -> None:
    """Keep what libraries say while they are imported, and what nobody can act on, from a user's screen."""
    # PEFT imports bitsandbytes, which on a CPU reports each kernel package that is not installed.
    logger = logging.getLogger("bitsandbytes")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.ERROR)
    # tqdm asks for ipywidgets, without which it works as well.
    warnings.filterwarnings("ignore", message="IProgress not found")


class Shown:
    """A result that is shown as its text: in the interpreter, too, and in a notebook with its columns kept."""

    folds: ClassVar[bool] = False
    """Whether its lines are sentences, which a notebook may break, and not those of a table."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return preformatted(fit(str(self), NOTEBOOK_COLUMNS if self.folds else None))


def preformatted(text: str) -> str:
    """HTML whose lines are not broken, as Jupyter does with long ones: columns would no longer be any."""
    style = "font-family: monospace; white-space: pre; word-break: normal; overflow-x: auto"
    return f'<pre style="{style}">{escape(text)}</pre>'
