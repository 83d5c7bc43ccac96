"""Curves of a run, drawn with matplotlib (`pip install llmtune[plot]`) and without its global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.data.plot import EVALUATION, LOG_FROM, TRAIN, label_axes, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
}
"""Metric to title, in reading order. Where a metric was evaluated too (`eval_loss`), its panel shows both."""


def plot_metrics(metrics: Sequence[Mapping[str, Any]], path: str | Path | None = None) -> Figure:
    """Loss, learning rate, gradient norm and speed against the step, as a Figure; saved to `path` if given.

    The ending of `path` chooses the format (png, svg, pdf). Raises PlanError without matplotlib.
    """
    figure = new_figure(10, 6)
    for axes, (metric, title) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        draw_panel(axes, metrics, metric, title)
    if path is not None:
        figure.savefig(path)
    return figure


def draw_panel(axes: Axes, metrics: Sequence[Mapping[str, Any]], metric: str, title: str) -> None:
    """One metric against the step; evaluations of it as dots on a line of their own."""
    from matplotlib.ticker import MaxNLocator

    steps, values = series(metrics, metric)
    axes.plot(steps, values, color=TRAIN, linewidth=1.4, marker="o" if len(steps) == 1 else None, label="training")
    eval_steps, eval_values = series(metrics, f"eval_{metric}")
    if eval_steps:
        axes.plot(
            eval_steps, eval_values, color=EVALUATION, linewidth=1.4, marker="o", markersize=4, label="evaluation"
        )
        axes.legend(frameon=False)
    if values and min(values) > 0 and max(values) > LOG_FROM * min(values) and metric == "grad_norm":
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
    if metric == "tokens_per_second":
        axes.set_ylim(bottom=0)
    label_axes(axes, title, "step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not steps and not eval_steps:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color="gray")


def series(metrics: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric. Values that are not finite are left out: they have no place on an axis."""
    found = [(row["step"], row[metric]) for row in metrics if isinstance(row.get(metric), (int, float))]
    finite = [(step, value) for step, value in found if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]
