"""Runs below a folder: a table of them, compared, drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from llmtune.history.cells import best_text, labels, loss_text, moment_text, steps_text, time_text
from llmtune.history.compare import RunComparison
from llmtune.history.read import find_runs
from llmtune.history.summary import RunSummary
from llmtune.terminal import Shown, table_text
from llmtune.training.plot import plot_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS: dict[str, Callable[[RunSummary], str]] = {
    "status": lambda run: run.status,
    "model": lambda run: (run.model or "").rstrip("/").rpartition("/")[2],
    "stage": lambda run: run.stage or "",
    "method": lambda run: run.method if run.stage and run.method else "",
    "steps": steps_text,
    "loss": lambda run: loss_text(run.loss),
    "lowest": lambda run: best_text(run.best_loss),
    "eval loss": lambda run: loss_text(run.eval_loss),
    "lowest eval": lambda run: best_text(run.best_eval_loss),
    "time": time_text,
    "updated": lambda run: moment_text(run.updated),
}
"""Heading to the text of a run's cell; `time` is that in steps."""
SPARED = ("lowest", "updated", "model", "method", "lowest eval", "time", "stage", "eval loss")
"""Columns that are left out, in this order, where the width does not suffice."""
LEFT = {"status", "model", "stage", "method"}


@dataclass(frozen=True)
class RunList(Shown):
    """Runs, those written to last at the end."""

    runs: Sequence[RunSummary]
    width: int = 120
    """Columns that the table takes at most, unless its shortest form is wider."""

    @classmethod
    def below(cls, *places: str | Path, **more: Any) -> Self:
        """The runs that are, or lie below, these folders."""
        found = [RunSummary.of(folder) for folder in find_runs(places)]
        return cls(sorted(found, key=lambda run: (run.updated or "", str(run.folder))), **more)

    def __iter__(self) -> Iterator[RunSummary]:
        return iter(self.runs)

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, at: int) -> RunSummary:
        return self.runs[at]

    def compare(self) -> RunComparison:
        """The settings in which they differ, and their results."""
        return RunComparison(self.runs, self.width)

    def plot(
        self, path: str | Path | None = None, metrics: Sequence[str] = ("loss",), smoothing: float = 0.0,
        across: str = "step",
    ) -> Figure:  # fmt: skip
        """The curves of all in one picture, see `plot_runs`."""
        names = labels([run.folder for run in self.runs])
        curves = {name: run.files.metrics for name, run in zip(names, self.runs, strict=True)}
        return plot_runs(curves, path, metrics, smoothing, across)

    def as_dicts(self) -> list[dict[str, Any]]:
        """All of them, for JSON."""
        return [run.as_dict() for run in self.runs]

    def __str__(self) -> str:
        if not self.runs:
            return "No runs."
        cells = {name: [text(run) for run in self.runs] for name, text in COLUMNS.items()}
        cells = {"run": labels([run.folder for run in self.runs])} | {
            name: column for name, column in cells.items() if any(column)
        }
        for name in SPARED:
            if sum(max(map(len, [heading, *column])) + 2 for heading, column in cells.items()) - 2 <= self.width:
                break
            cells.pop(name, None)
        left = {at for at, name in enumerate(cells) if name in LEFT or name == "run"}
        return table_text(list(cells), list(zip(*cells.values(), strict=True)), left=left, width=10_000)


def runs(*folders: str | Path) -> RunList:
    """The runs that are, or lie below, `folders` (by default `runs`), read as far as they can be: a list that shows as
    a table, with `compare()` and `plot()`. Loads no torch."""
    return RunList.below(*(folders or ("runs",)))
