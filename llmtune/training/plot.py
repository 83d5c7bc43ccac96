"""Curves of a run, drawn with matplotlib (`pip install llmtune[plot]`) and without its global state."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import PlanError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, EVALUATION = "#2563a8", "#c4501b"

PANELS = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
}
"""Metric to title, in reading order. Where a metric was evaluated too (`eval_loss`), its panel shows both."""

LOG_FROM = 50.0
"""Largest over smallest value from which an axis is logarithmic: gradient norms can spike by factors of 100."""


def plotting_problem() -> str | None:
    """Why curves cannot be drawn here, with the way out; None where they can."""
    if find_spec("matplotlib") is None:
        return (
            "curves are drawn with matplotlib, which is not installed; run `pip install llmtune[plot]`, "
            "or leave the plot out (plot_loss=false)"
        )
    return None


def new_figure(width: float, height: float) -> Figure:
    """An empty Figure of so many inches, which a notebook shows as a picture. Raises PlanError without matplotlib."""
    if problem := plotting_problem():
        raise PlanError(f"plot: {problem}")
    from matplotlib.figure import Figure

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            """matplotlib's own figures are shown only where pyplot, its global state, has been imported."""
            buffer = io.BytesIO()
            self.savefig(buffer, format="png")
            return buffer.getvalue()

    return Picture(figsize=(width, height), dpi=120, layout="constrained")


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
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if not steps and not eval_steps:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", va="center", color="gray")


def series(metrics: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric. Values that are not finite are left out: they have no place on an axis."""
    found = [(row["step"], row[metric]) for row in metrics if isinstance(row.get(metric), (int, float))]
    finite = [(step, value) for step, value in found if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def plot_lengths(lengths: np.ndarray, cutoff_len: int, path: str | Path | None = None) -> Figure:
    """A histogram of (samples,) tokens, and beside it the share of samples and of tokens up to each length; saved to
    `path` if given. Raises PlanError without matplotlib."""
    figure = new_figure(10, 4)
    import numpy as np
    from matplotlib.ticker import PercentFormatter

    rising = np.sort(lengths)
    least, most = (max(1, int(rising[0])), int(rising[-1])) if len(rising) else (1, 1)
    wide = most > LOG_FROM * least
    count = min(60, most - least + 1)
    # Bounds between whole numbers, or some bars would hold one length more than others.
    bounds = np.geomspace(least, most + 1, count + 1) if wide else np.linspace(least - 0.5, most + 0.5, count + 1)
    counts, shares = figure.subplots(1, 2)
    counts.hist(rising, bins=bounds, color=TRAIN)
    counts.set_title("Samples by length", loc="left", fontsize=11)
    share = np.arange(1, len(rising) + 1) / max(1, len(rising))
    shares.plot(rising, share, color=TRAIN, label="samples")
    shares.plot(rising, np.cumsum(rising) / max(1, rising.sum()), color=EVALUATION, label="their tokens")
    shares.set_title("Share up to a length", loc="left", fontsize=11)
    shares.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (counts, shares):
        axes.set_xscale("log" if wide else "linear")
        if cutoff_len <= most:
            axes.axvline(cutoff_len, color="gray", linestyle="--", linewidth=1, label=f"cutoff_len {cutoff_len:,}")
        axes.set_xlabel("tokens of a sample")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    shares.legend(frameon=False)
    if path is not None:
        figure.savefig(path)
    return figure
