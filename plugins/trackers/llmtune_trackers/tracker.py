"""What all trackers share: names of metrics, and going on with the run that an interrupted one has begun."""

from __future__ import annotations

import json
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtune import LoggerStart, RunStatus, SampleAnswer

STATE = "tracker.json"


class TrackerRun(ABC):
    """A `Logger` that is one run of a tracker, in as many parts as the training has.

    The logger's folder holds `tracker.json`: the run's id at the tracker, and for each metric the last step that was
    sent. Trackers cannot take back what they were sent: of steps that are done again after a kill, the first value
    stays, and none appears twice.
    """

    def __init__(self) -> None:
        self.folder = Path()
        self.id = ""
        self.sent: dict[str, int] = {}
        self._sent_before: Mapping[str, int] = {}
        self._open = False

    @abstractmethod
    def open_run(self, start: LoggerStart, known: bool) -> str:
        """Begin the run `self.id`, or go on with it where it is `known`; the id that it has at the tracker."""

    @abstractmethod
    def send(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers, under their names at the tracker."""

    @abstractmethod
    def close_run(self) -> None:
        """End this part of the run."""

    def begin(self, start: LoggerStart) -> None:
        """Open the run."""
        self.folder = start.folder
        path = self.folder / STATE
        state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.sent = dict(state.get("sent", {}))
        self._sent_before = dict(self.sent)
        self.id = state.get("id") or secrets.token_hex(4)
        self.id = self.open_run(start, known="id" in state)
        self._open = True
        self._remember()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send what was not sent before: training metrics under `train/`, those called `eval_...` under `eval/`."""
        new = {
            name_of(name): value
            for name, value in metrics.items()
            if isinstance(value, (int, float)) and step > self._sent_before.get(name_of(name), -1)
        }
        if new:
            self.send(step, new)
            self.sent |= dict.fromkeys(new, step)
            self._remember()

    def finish(self) -> None:
        """End this part of the run, if it was opened."""
        if self._open:
            self._open = False
            self.close_run()

    def _remember(self) -> None:
        partial = self.folder / f"{STATE}.partial"
        partial.write_text(json.dumps({"id": self.id, "sent": self.sent}), encoding="utf-8")
        os.replace(partial, self.folder / STATE)

    def saved_picture(self, step: int, name: str, png: bytes) -> Path:
        """The picture as a file in the logger's folder."""
        path = self.folder / f"{name}_{step}.png"
        path.write_bytes(png)
        return path


def name_of(metric: str) -> str:
    """The name of a metric at a tracker."""
    return f"eval/{metric.removeprefix('eval_')}" if metric.startswith("eval_") else f"train/{metric}"


def flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as one level, `peft_config.r`; lists of blocks are numbered."""
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def as_text(samples: Sequence[SampleAnswer]) -> str:
    """Questions and answers as Markdown."""
    return "\n\n".join(f"**{sample.question}**\n\n{sample.answer}" for sample in samples)


EXIT_CODES: Mapping[RunStatus, int] = {"done": 0, "interrupted": 130, "failed": 1}
"""What a process would end with."""
