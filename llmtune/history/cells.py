"""What stands in the cells of tables of runs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from llmtune.history.summary import GIB, Best, RunSummary
from llmtune.training.console import duration

WIDEST = 28
"""Characters of a value; the rest of a longer one is left out, and JSON has it whole."""


def labels(folders: Sequence[Path]) -> list[str]:
    """The part of each folder's path in which they differ: `a` and `b` for `runs/a` and `runs/b`; of one its name."""
    paths = [str(folder.absolute()) for folder in folders]
    common = os.path.commonpath(paths) if paths else ""
    return [Path(path).name if path == common else os.path.relpath(path, common) for path in paths]


def steps_text(run: RunSummary) -> str:
    """`40/120`; `40` where the run did not write down how many it has."""
    return f"{run.step}/{run.steps}" if run.steps else str(run.step)


def loss_text(loss: float | None) -> str:
    """A loss with four digits."""
    return "" if loss is None else f"{loss:.4f}"


def best_text(best: Best | None) -> str:
    """A best value and its step."""
    return f"{best.value:.4f} at {best.step}" if best else ""


def time_text(run: RunSummary) -> str:
    """The time that a run has spent in steps."""
    return duration(run.training_seconds) if run.training_seconds else ""


def memory_text(run: RunSummary) -> str:
    """The most memory that a rank took."""
    return f"{run.peak_memory_bytes / GIB:.2f} GiB" if run.peak_memory_bytes else ""


def moment_text(moment: str | None) -> str:
    """A moment of run.json in the time of this machine."""
    try:
        return f"{datetime.fromisoformat(moment).astimezone():%Y-%m-%d %H:%M}" if moment else ""
    except ValueError:
        return ""


def value_text(value: Any) -> str:
    """A setting's value."""
    text = value if isinstance(value, str) else "-" if value is None else json.dumps(value, default=str)
    text = " ".join(text.split())
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."
