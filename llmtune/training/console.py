"""Progress for people: a bar on a terminal or in a notebook, one plain line per log elsewhere."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

Clock = Callable[[], float]

HIDDEN = {"epoch", "tokens"}
"""In metrics.jsonl, but not worth the width of a terminal."""


class View(Protocol):
    """One way to show progress."""

    def start(self, done: int, total: int) -> None:
        """Begin at `done` of `total` steps."""
        ...

    def update(self, step: int, figures: str, keep: bool) -> None:
        """Show that `step` is done. `keep`: the figures should stay in sight (an evaluation)."""
        ...

    def finish(self) -> None:
        """Leave the stream as it was found."""
        ...


class Console:
    """Shows progress on `stream` (standard output by default) in the way that suits it."""

    def __init__(
        self, total_steps: int, resume_step: int = 0, *, stream: TextIO | None = None, clock: Clock = time.perf_counter
    ) -> None:
        self.total = total_steps
        self.first = resume_step
        self.clock = clock
        self.view = choose_view(stream or sys.stdout)
        self.started = 0.0

    def start(self) -> None:
        """Begin to show progress and to measure time."""
        self.started = self.clock()
        self.view.start(self.first, self.total)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of `step`; those without a `loss` are an evaluation's."""
        evaluated = "loss" not in metrics
        figures = figures_text(metrics)
        if not evaluated and (eta := self.eta_s(step)) is not None:
            figures += f"  eta {duration(eta)}"
        self.view.update(step, figures, evaluated)

    def eta_s(self, step: int) -> float | None:
        """Seconds left at the mean speed so far; None before anything is done."""
        done = step - self.first
        return (self.clock() - self.started) / done * (self.total - step) if done > 0 else None

    def finish(self) -> None:
        """End the display."""
        self.view.finish()


def choose_view(stream: TextIO) -> View:
    """Notebook, terminal or plain. A stream that is no terminal never gets control characters."""
    if in_notebook():
        return NotebookBar()
    terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
    return RichBar(stream) if terminal else PlainLines(stream)


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


class PlainLines:
    """`step 10/120  loss 1.2345  lr 1.0e-04  grad 0.53  412 tok/s  eta 0:40`"""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.total = 0

    def start(self, done: int, total: int) -> None:
        """Nothing is printed before the first log."""
        self.total = total

    def update(self, step: int, figures: str, keep: bool) -> None:
        """Print one line."""
        width = len(str(self.total))
        # Flushed, or a log file would lag by the 8 KiB of a pipe's buffer, some 100 steps.
        print(f"step {step:>{width}}/{self.total}  {figures}", file=self.stream, flush=True)

    def finish(self) -> None:
        """Nothing is left open."""


class RichBar:
    """A bar with the newest figures; evaluations stay above it. rich itself honours NO_COLOR."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), 
            TextColumn("{task.fields[figures]}", markup=False),
            console=RichConsole(file=stream, highlight=False),
        )  # fmt: skip
        self.task: Any = None

    def start(self, done: int, total: int) -> None:
        """Draw the bar."""
        self.progress.start()
        self.task = self.progress.add_task("", total=total, completed=done, figures="")

    def update(self, step: int, figures: str, keep: bool) -> None:
        """Move the bar; kept figures become a line above it."""
        if keep:
            self.progress.console.print(f"step {step}  {figures}", markup=False)
            self.progress.update(self.task, completed=step)
        else:
            self.progress.update(self.task, completed=step, figures=figures)

    def finish(self) -> None:
        """Leave the last state of the bar in sight."""
        self.progress.stop()


class NotebookBar:
    """tqdm's bar: a widget where Jupyter has them, text where not."""

    def __init__(self) -> None:
        self.bar: Any = None

    def start(self, done: int, total: int) -> None:
        """Draw the bar."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tqdm asks for ipywidgets, without which it works as well
            from tqdm.auto import tqdm
        self.bar = tqdm(total=total, initial=done, unit="step")

    def update(self, step: int, figures: str, keep: bool) -> None:
        """Move the bar; kept figures become a line of their own."""
        self.bar.update(step - self.bar.n)
        if keep:
            self.bar.write(f"step {step}  {figures}")
        else:
            self.bar.set_postfix_str(figures.partition("  eta ")[0])  # tqdm shows the time left itself

    def finish(self) -> None:
        """Leave the last state of the bar in sight."""
        if self.bar is not None:
            self.bar.close()


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
    return f"{name} {value:.4f}" if "loss" in name else f"{name} {value:.4g}"


def duration(seconds: float) -> str:
    """`0:40`, `12:05`, `1:02:03`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
