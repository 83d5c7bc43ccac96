"""What a run reports while it goes on: metrics.jsonl, the console, loggers of plugins."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from llmtune.contract.errors import CheckpointError
from llmtune.contract.loggers import Continues, FollowsStatus, LoggerStart, SampleAnswer, TakesPictures, TakesSamples
from llmtune.data.plot import plotting_problem
from llmtune.terminal import in_notebook
from llmtune.training.console import Console
from llmtune.training.delivery import Delivery, complain, wait_for_all
from llmtune.training.file_names import METRICS
from llmtune.training.live_curve import LiveCurve
from llmtune.training.plot import plot_metrics

if TYPE_CHECKING:
    from llmtune.contract.loggers import Logger, RunStatus
    from llmtune.training.status import Milestones


class MetricsFile:
    """Appends one JSON object per line to `metrics.jsonl` in `folder`, handed to the system at each `write`.

    Opening drops lines after `resume_step` (all of them for 0), so that a continued run has each step once, and a last
    line that a kill left unfinished.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS
        partial = path.with_suffix(".partial")
        kept = [row for row in read_metrics(folder) if row["step"] <= resume_step]
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(_line(row) for row in kept)
        os.replace(partial, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line."""
        self._file.write(_line({"step": step, **metrics}))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line(row: Mapping[str, Any]) -> str:
    # JSON knows no NaN or infinity. As text ("nan", "inf", "-inf") they are neither lost nor mistaken for numbers.
    plain = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` in `folder`, oldest first; none where the file does not exist yet.

    Numbers that are not finite come back as floats. An unfinished last line is left out: a run may be writing it.
    Raises CheckpointError for any other line that is not a JSON object with a step.
    """
    rows, problems = parse_metrics(folder)
    if problems:
        raise CheckpointError(f"{problems[0]}; delete this line")
    return rows


def parse_metrics(folder: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of `metrics.jsonl` that can be read, and a sentence for each that cannot."""
    path = Path(folder) / METRICS
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    rows, problems = [], []
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({"step": row["step"]} | {key: _number(value) for key, value in row.items()})
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines) or line.endswith("\n"):
                problems.append(f"{path}:{number}: not a JSON object with a step ({error})")
    return rows, problems


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


class Loggers:
    """Everything that receives metrics on rank 0: the file, the console, plugins' loggers."""

    def __init__(
        self,
        folder: Path,
        plugins: Sequence[Logger | Continues] = (),
        *,
        names: Sequence[str] = (),
        total_steps: int,
        resume_step: int = 0,
        stream: TextIO | None = None,
        milestones: Milestones | None = None,
    ) -> None:
        self.folder = folder
        self.resume_step = resume_step
        self.console: Console | None = Console(total_steps, resume_step, stream=stream, milestones=milestones)
        self.deliveries = [Delivery(plugin) for plugin in plugins]
        self.last = resume_step
        self.curve: LiveCurve | None = None
        self.file: MetricsFile | None = None
        self._owned = _own_folders(folder / "loggers", names or [type(plugin).__name__ for plugin in plugins])

    def start(self, recipe: Mapping[str, Any]) -> None:
        """Open metrics.jsonl and start every logger. `recipe` is the resolved one."""
        self.file = MetricsFile(self.folder, self.resume_step)
        facts = {"run_folder": self.folder, "recipe": dict(recipe), "first_step": self.resume_step}
        for delivery, folder in zip(self.deliveries, self._owned, strict=True):
            delivery.call(partial(begin, start=LoggerStart(folder=folder, **facts)))
        self._to_console(lambda console: console.start())
        if in_notebook() and not plotting_problem():
            self.curve = LiveCurve(read_metrics(self.folder))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report the metrics of `step` everywhere. Only metrics.jsonl may fail the run (OSError: the disk is full)."""
        assert self.file is not None, "log before start"
        self.last = step
        self.file.write(step, metrics)
        for delivery in self.deliveries:
            delivery.call(lambda plugin, own=dict(metrics): plugin.log(step, own))
        self._to_console(lambda console: console.log(step, metrics))
        self._to_curve(lambda curve: curve.log(step, metrics))

    def samples(self, step: int, samples: Sequence[SampleAnswer]) -> None:
        """Show answers to the recipe's `sample_prompts` where a logger shows texts."""
        for delivery in self.deliveries if samples else ():
            if isinstance(delivery.logger, TakesSamples):
                delivery.call(lambda plugin: plugin.log_samples(step, list(samples)))

    def at(self, step: int) -> None:
        """Show that `step` is done, whether or not it is logged."""
        self._to_console(lambda console: console.at(step))

    def end_display(self) -> None:
        """Close the console: there are no more steps."""
        self._to_console(lambda console: console.finish())
        self._to_curve(lambda curve: curve.draw())
        self.console, self.curve = None, None

    def finish(self, status: RunStatus = "done") -> None:
        """Close all of them; loggers that take pictures get the curves."""
        self.end_display()
        if self.file is not None:
            self.file.close()
            self._send_curves()
        for delivery in self.deliveries:
            if self.file is not None and isinstance(delivery.logger, FollowsStatus):
                delivery.call(lambda plugin: plugin.ended(status))
            delivery.call(lambda plugin: plugin.finish())
        wait_for_all(self.deliveries)

    def _send_curves(self) -> None:
        takers = [delivery for delivery in self.deliveries if isinstance(delivery.logger, TakesPictures)]
        if not takers or plotting_problem():
            return
        try:
            picture = io.BytesIO()
            plot_metrics(read_metrics(self.folder), picture)
        except Exception as error:
            return complain("the picture of the curves", f"{type(error).__name__}: {error}")
        for delivery in takers:
            delivery.call(lambda plugin: plugin.log_picture(self.last, "curves", picture.getvalue()))

    def _to_console(self, call: Callable[[Console], None]) -> None:
        if self.console is None:
            return
        try:
            call(self.console)
        except Exception as error:  # such as a closed pipe: `llmtune train ... | head`
            self.console = None
            complain("progress display", f"{type(error).__name__}: {error}")

    def _to_curve(self, call: Callable[[LiveCurve], None]) -> None:
        if self.curve is None:
            return
        try:
            call(self.curve)
        except Exception as error:
            self.curve = None
            complain("the curve", f"{type(error).__name__}: {error}")


def begin(logger: Logger | Continues, start: LoggerStart) -> None:
    """Tell a logger that a run begins or goes on, in the form that it knows."""
    if isinstance(logger, Continues):
        start.folder.mkdir(parents=True, exist_ok=True)
        logger.begin(start)
    else:  # made before loggers were told where a run goes on
        logger.start(start.run_folder, start.recipe)


def _own_folders(root: Path, names: Sequence[str]) -> list[Path]:
    """`root/NAME` for each logger, numbered where several have one name."""
    return [
        root / (name if names.index(name) == at else f"{name}-{names[:at].count(name) + 1}")
        for at, name in enumerate(names)
    ]
