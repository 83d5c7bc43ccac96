"""The loss of a run whose ranks are other processes, drawn in the notebook that has started them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtune.data.plot import plotting_problem
from llmtune.terminal import in_notebook
from llmtune.training.delivery import complain
from llmtune.training.file_names import METRICS
from llmtune.training.live_curve import LiveCurve
from llmtune.training.log import read_metrics

INTERVAL_S = 0.5


@contextmanager
def growing_curve(folder: Path) -> Iterator[None]:
    """In a notebook, draw the loss as the metrics.jsonl of `folder` grows; elsewhere nothing."""
    if not in_notebook() or plotting_problem():
        yield
        return
    ended = threading.Event()
    follower = threading.Thread(target=_follow, args=(folder, ended, _written(folder)), daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()


def _follow(folder: Path, ended: threading.Event, before: object) -> None:
    """Draw whenever lines have been written since `before`, and at the end what there is."""
    curve, over = LiveCurve([]), False
    try:
        while not over:
            over = ended.wait(INTERVAL_S)
            if (now := _written(folder)) != before and (over or curve.due()):
                before = now
                curve.metrics = [*read_metrics(folder)]
                if curve.metrics:
                    curve.draw()
    except Exception as error:
        complain("the curve", f"{type(error).__name__}: {error}")


def _written(folder: Path) -> object:
    """What changes whenever a line is written."""
    file = folder / METRICS
    return (file.stat().st_mtime_ns, file.stat().st_size) if file.exists() else None
