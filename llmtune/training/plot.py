"""Curves of runs, drawn with matplotlib (`pip install llmtune[plot]`) and without its global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from llmtune.contract.errors import PlanError, did_you_mean, listed
from llmtune.data.plot import EVALUATION, LOG_FROM, TRAIN, label_axes, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Sequence[Mapping[str, Any]]
"""The lines of a run's metrics.jsonl."""

PANELS = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
}
"""Metric to title, in reading order. Where a metric was evaluated too (`eval_loss`), its panel shows both."""
EXACT = {"learning_rate", "epoch", "tokens"}
"""Metrics without noise, which are not smoothed."""
FORMATS = (".png", ".svg", ".pdf")
ACROSS = {"step": "step", "epoch": "epoch", "tokens": "tokens"}
"""What may run across a picture."""


def plot_metrics(metrics: Metrics, path: str | Path | BinaryIO | None = None) -> Figure:
    """Loss, learning rate, gradient norm and speed against the step, as a Figure; saved to `path` if given.

    The ending of `path` chooses the format (png, svg, pdf); an open file gets a PNG. Raises PlanError for another
    ending, and without matplotlib.
    """
    if isinstance(path, (str, Path)):
        require_format(path)
    figure = new_figure(10, 6)
    for axes, (metric, title) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        draw_panel(axes, {"": metrics}, metric, title)
    if path is not None:
        figure.savefig(path)
    return figure


def plot_runs(
    runs: Mapping[str, Metrics], path: str | Path | None = None, metrics: Sequence[str] = ("loss",),
    smoothing: float = 0.0, across: str = "step",
) -> Figure:  # fmt: skip
    """Curves of several runs, by their names, in one picture: a panel for each of `metrics`; saved to `path` if given.

    `smoothing` from 0 up to, and without, 1 is the weight of what was before in a running mean, as TensorBoard has it;
    the curves as logged stay, faintly. `across` is `step`, `epoch` or `tokens`. Raises PlanError for a metric that no
    run has logged, and without matplotlib.
    """
    known = {name for rows in runs.values() for row in rows for name in row} - {"step"}
    if not metrics:
        raise PlanError(f"metrics: none is given; name one or several, with commas between. {_logged(known)}")
    for metric in metrics:
        if not known & {metric, f"eval_{metric}"}:
            raise PlanError(f'metrics: no run has logged "{metric}".{did_you_mean(metric, known)} {_logged(known)}')
    if not 0 <= smoothing < 1:
        raise PlanError(f"smoothing: found {smoothing}, allowed is 0 <= smoothing < 1")
    if across not in ACROSS:
        raise PlanError(f'across: found "{across}", allowed is one of {listed(ACROSS)}')
    if path is not None:
        require_format(path)
    columns = min(2, len(metrics))
    lines = -(-len(metrics) // columns)
    figure = new_figure(5 * columns + 2, 3.6 * lines + 0.4)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, metric in zip(panels, metrics, strict=False):
        draw_panel(axes, runs, metric, PANELS.get(metric, metric), smoothing, across)
    for axes in panels[len(metrics) :]:
        axes.remove()
    if path is not None:
        figure.savefig(path)
    return figure


def require_format(path: str | Path) -> None:
    """PlanError for a picture whose ending names none of the formats that are written."""
    if (ending := Path(path).suffix) not in FORMATS:
        raise PlanError(f'{path}: found the ending "{ending}", allowed is one of {listed(FORMATS)}')


def _logged(known: set[str]) -> str:
    return f"Logged are {listed(sorted(known), 30)}." if known else "Nothing is logged."


def draw_panel(
    axes: Axes, runs: Mapping[str, Metrics], metric: str, title: str, smoothing: float = 0.0, across: str = "step"
) -> None:
    """One metric of one run or of several against what runs `across`; evaluations of it as dots on a line of their own.

    A single run without a name has one colour for training and one for evaluation; of several, each has its own.
    """
    from matplotlib.ticker import MaxNLocator

    seen: list[float] = []
    for at, (name, rows) in enumerate(runs.items()):
        train, evaluation = (TRAIN, EVALUATION) if not name else (_colour(at, len(runs)),) * 2
        places, values = series(rows, metric, across)
        dots = "o" if len(places) == 1 else None
        if smoothing and metric not in EXACT:
            axes.plot(places, values, color=train, linewidth=0.8, alpha=0.3)
            values = smooth(values, smoothing)
        axes.plot(places, values, color=train, linewidth=1.4, marker=dots, label=name or "training")
        eval_places, eval_values = series(rows, f"eval_{metric}", across)
        if eval_places:
            style = dict(linewidth=1.4, marker="o", markersize=4, linestyle="--" if name else "-")
            axes.plot(eval_places, eval_values, color=evaluation, label=f"{name} evaluation".strip(), **style)
        seen += values + (eval_values if not values else [])
        if name or eval_places:
            axes.legend(frameon=False, fontsize=8 if len(runs) > 4 else None)
    if seen and min(seen) > 0 and max(seen) > LOG_FROM * min(seen) and metric == "grad_norm":
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
    if metric == "tokens_per_second":
        axes.set_ylim(bottom=0)
    label_axes(axes, title, across)
    axes.xaxis.set_major_locator(MaxNLocator(integer=across != "epoch"))
    if not seen:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color="gray")


def _colour(at: int, of: int) -> Any:
    from matplotlib import colormaps

    # Ten that can be told apart; of more runs, an even walk through a scale.
    return colormaps["tab10"](at) if of <= 10 else colormaps["turbo"](0.05 + 0.9 * at / (of - 1))


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """The running mean of values in which each earlier one weighs `weight` times as much as the one after it."""
    found, total, weights = [], 0.0, 0.0
    for value in values:
        total, weights = total * weight + value, weights * weight + 1
        found.append(total / weights)
    return found


def series(metrics: Metrics, metric: str, across: str = "step") -> tuple[list[float], list[float]]:
    """Places and values of one metric. Values that are not finite are left out: they have no place on an axis.

    Lines without the place, as evaluations have no tokens, are where the last line with one was.
    """
    places: list[float] = []
    values: list[float] = []
    place: float | None = None
    for row in metrics:
        place = row.get(across, place)
        value = row.get(metric)
        if place is not None and isinstance(value, (int, float)) and math.isfinite(value):
            places.append(place)
            values.append(value)
    return places, values
