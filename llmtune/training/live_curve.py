"""The loss as a picture that grows in a notebook's cell."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from llmtune.data.plot import new_figure
from llmtune.training.plot import draw_panel

SHARE = 0.02
"""Of the time of training, what drawing may take."""


class LiveCurve:
    """Shows the loss below the progress bar, and draws it anew while training goes on."""

    def __init__(self, metrics: Sequence[Mapping[str, Any]]) -> None:
        self.metrics: list[Mapping[str, Any]] = list(metrics)
        self._display: Any = None
        self._next = 0.0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add what was logged; draw where it is time to."""
        self.metrics.append({"step": step, **metrics})
        if self.due() and len(self.metrics) > 1:
            self.draw()

    def due(self) -> bool:
        """Whether drawing again would take no more than its share of the time."""
        return time.monotonic() >= self._next

    def draw(self) -> None:
        """Draw all that there is, in the place of the last picture."""
        from IPython.display import display

        started = time.monotonic()
        figure = new_figure(7, 2.6)
        draw_panel(figure.subplots(), {"": self.metrics}, "loss", "Loss")
        if self._display is None:
            self._display = display(figure, display_id=True)
        else:
            self._display.update(figure)
        now = time.monotonic()
        self._next = now + (now - started) / SHARE
