"""Progress for people: lines of figures, and on a terminal or in a notebook a bar below them.

Lines are all there is in a file or a pipe. A terminal keeps the last state of a run in sight above its bar.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from llmtune.terminal import NOTEBOOK_COLUMNS, columns, fit, in_notebook, preformatted
from llmtune.training.status import Milestones, Status

if TYPE_CHECKING:
    from rich.console import Group

Clock = Callable[[], float]

HIDDEN = {"epoch", "tokens", "peak_memory_bytes"}
"""In metrics.jsonl, but not worth the width of a terminal."""


class Console:
    """Shows progress on `stream` (standard output by default) in the way that suits it."""

    def __init__(
        self, total_steps: int, resume_step: int = 0, *, stream: TextIO | None = None,
        clock: Clock = time.perf_counter, milestones: Milestones | None = None,
    ) -> None:  # fmt: skip
        self.total = total_steps
        self.first = resume_step
        self.clock = clock
        self.view = choose_view(stream or sys.stdout, milestones)
        self.started = 0.0

    def start(self) -> None:
        """Begin to show progress and to measure time."""
        self.started = self.clock()
        self.view.start(self.first, self.total)

    def at(self, step: int) -> None:
        """Show that `step` is done."""
        self.view.move(step, self.eta(step))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of `step`; those without a `loss` are an evaluation's."""
        evaluation = "loss" not in metrics
        self.view.watch(metrics)
        self.view.report(step, figures_text(metrics), "" if evaluation else self.eta(step), evaluation)

    def eta(self, step: int) -> str:
        """The time left at the mean speed so far; empty before anything is done."""
        done = step - self.first
        return duration((self.clock() - self.started) / done * (self.total - step)) if done > 0 else ""

    def finish(self) -> None:
        """End the display."""
        self.view.finish()


def choose_view(stream: TextIO, milestones: Milestones | None = None) -> PlainLines:
    """Notebook, terminal or plain. A stream that is no terminal never gets control characters."""
    if in_notebook():
        return NotebookBar()
    terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
    return TerminalBar(stream, milestones or Milestones()) if terminal else PlainLines(stream)


class PlainLines:
    """`step 10/120  loss 1.2345  lr 1.0e-04  grad 0.53  412 tok/s  eta 0:40`: a line for each log, and no more."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.total = 0

    def start(self, done: int, total: int) -> None:
        """Begin at `done` of `total` steps."""
        self.total = total

    def move(self, step: int, eta: str) -> None:
        """Show that `step` is done, and how long the rest takes."""

    def watch(self, metrics: Mapping[str, float]) -> None:
        """Take what is about to be reported, for what stays in sight."""

    def report(self, step: int, figures: str, eta: str, evaluation: bool) -> None:
        """Show the figures of `step`, separated by two spaces."""
        more = f"  eta {eta}" if eta else ""
        # Flushed, or a log file would lag by the 8 KiB of a pipe's buffer, some 100 steps.
        print(f"{step_text(step, self.total)}  {figures}{more}", file=self.stream, flush=True)

    def finish(self) -> None:
        """Leave the stream as it was found."""


class TerminalBar(PlainLines):
    """The last state of the run, and a bar, below the lines, which stay to scroll back to. rich honours NO_COLOR.

    All that stands beside the bar has a fixed width, so that the bar keeps its place.
    """

    def __init__(self, stream: TextIO, milestones: Milestones) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        super().__init__(stream)
        self.console = RichConsole(file=stream, highlight=False)
        self.status = Status(0, milestones, draws=self.console.encoding.startswith("utf"))
        self.step = 0
        # Colours that each terminal chooses to suit its background, light or dark.
        bar = BarColumn(bar_width=None, style="bright_black", complete_style="green", finished_style="green")
        self.progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), bar, TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("eta {task.fields[eta]:>7}"), console=self.console, expand=True,
        )  # fmt: skip
        self.live = Live(console=self.console, get_renderable=self._picture, refresh_per_second=4)
        self.task: Any = None

    def start(self, done: int, total: int) -> None:
        """Draw the bar."""
        super().start(done, total)
        self.status.total, self.step = total, done
        self.task = self.progress.add_task("", total=total, completed=done, eta="")
        self.live.start()

    def move(self, step: int, eta: str) -> None:
        """Move the bar."""
        self.step = step
        self.progress.update(self.task, completed=step, eta=eta)

    def watch(self, metrics: Mapping[str, float]) -> None:
        """Keep the numbers in sight."""
        self.status.watch(metrics)

    def report(self, step: int, figures: str, eta: str, evaluation: bool) -> None:
        """Print a line above the bar."""
        if not evaluation:
            self.move(step, eta)
        self.live.refresh()  # first, as printing draws again what was last in sight
        line = fit_figures(step_text(step, self.total), figures, columns(self.stream) or 80)
        self.console.print(line, markup=False, soft_wrap=True)

    def finish(self) -> None:
        """Leave the last state in sight."""
        self.live.stop()

    def _picture(self) -> Group:
        """The numbers in as many lines as the width asks for, and the bar."""
        from rich.console import Group
        from rich.text import Text

        parts = [Text.assemble((f"{name} ".lstrip(), "dim"), text) for name, text in self.status.parts(self.step)]
        lines = [Text()] if parts else []  # keeps the state apart from the lines above
        for part in parts:
            if lines[-1] and lines[-1].cell_len + 2 + part.cell_len <= self.console.width:
                lines[-1] = Text("  ").join([lines[-1], part])
            else:
                lines.append(part)
        return Group(*lines, self.progress)


class NotebookBar(PlainLines):
    """A bar that the browser draws, in one place of the cell: an exported page has its last state, without widgets."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.figures, self.eta = 0, "", ""
        self.display: Any = None
        self.drawn = 0.0

    def start(self, done: int, total: int) -> None:
        """Draw the bar."""
        self.step, self.total = done, total
        self._draw()

    def move(self, step: int, eta: str) -> None:
        """Move the bar."""
        self.step, self.eta = step, eta
        if time.monotonic() - self.drawn > 0.1:  # fast steps would flood the browser
            self._draw()

    def report(self, step: int, figures: str, eta: str, evaluation: bool) -> None:
        """Show figures beside the bar; those of an evaluation become a line of their own."""
        if evaluation:
            print(fit_figures(step_text(step, self.total), figures, NOTEBOOK_COLUMNS), file=self.stream, flush=True)
        else:
            self.figures = figures
            self.move(step, eta)

    def finish(self) -> None:
        """Leave the last state of the bar in sight."""
        if self.display is not None:
            self.eta = ""
            self._draw()

    def _draw(self) -> None:
        from IPython.display import display

        figures = self.figures + (f"  eta {self.eta}" if self.eta else "")
        text = fit_figures(step_text(self.step, self.total), figures, NOTEBOOK_COLUMNS)
        bar = f'<progress style="width: 40em; max-width: 100%" value="{self.step}" max="{self.total}"></progress>'
        shown = {"text/plain": text, "text/html": bar + preformatted(text)}
        if self.display is None:
            self.display = display(shown, raw=True, display_id=True)
        else:
            self.display.update(shown, raw=True)
        self.drawn = time.monotonic()


def step_text(step: int, total: int) -> str:
    """`step  10/120`, as wide for every step."""
    return f"step {step:>{len(str(total))}}/{total}"


def fit_figures(head: str, figures: str, width: int) -> str:
    """Figures after `head` in lines of at most `width` columns; no figure is parted from its name."""
    tied = head.replace(" ", "\u00a0") + "  " + re.sub(r"(?<! ) (?! )", "\u00a0", figures)
    return fit(tied, width).replace("\u00a0", " ")


def figures_text(metrics: Mapping[str, float]) -> str:
    """Metrics for a narrow line, in the order given: `loss 1.2345  lr 1.0e-04  grad 0.53`."""
    return "  ".join(figure(name, value) for name, value in metrics.items() if name not in HIDDEN)


def figure(name: str, value: float) -> str:
    """One metric with a short name and as many digits as mean something."""
    match name:
        case "learning_rate":
            return f"lr {value:.1e}"
        case "grad_norm":
            return f"grad {value:.3g}"
        case "tokens_per_second":
            return f"{value:,.0f} tok/s"
        case "mfu":
            return f"MFU {value:.1%}"
    return f"{name} {round(value, 4) + 0.0:.4f}" if "loss" in name else f"{name} {value:.4g}"


def duration(seconds: float) -> str:
    """`0:40`, `12:05`, `1:02:03`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
