"""The lengths of samples, drawn with matplotlib (`pip install llmtune[plot]`) and without its global state."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.contract.errors import PlanError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, EVALUATION = "#2563a8", "#c4501b"

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


def label_axes(axes: Axes, title: str, across: str) -> None:
    """The looks that all pictures share: a title, what runs `across`, a faint grid and no frame."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(across)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


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
    share = np.arange(1, len(rising) + 1) / max(1, len(rising))
    shares.plot(rising, share, color=TRAIN, label="samples")
    shares.plot(rising, np.cumsum(rising) / max(1, rising.sum()), color=EVALUATION, label="their tokens")
    shares.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes, title in ((counts, "Samples by length"), (shares, "Share up to a length")):
        label_axes(axes, title, "tokens of a sample")
        axes.set_xscale("log" if wide else "linear")
        if cutoff_len <= most:
            axes.axvline(cutoff_len, color="gray", linestyle="--", linewidth=1, label=f"cutoff_len {cutoff_len:,}")
    shares.legend(frameon=False)
    if path is not None:
        figure.savefig(path)
    return figure
