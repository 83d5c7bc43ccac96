"""What the hook `observe` is told between the steps of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of what `observe` receives."""

    step: int
    kind: ClassVar[str] = "event"


@dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """After an optimiser step that logs."""

    metrics: Mapping[str, float]
    kind: ClassVar[str] = "step"


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """After an evaluation."""

    metrics: Mapping[str, float]
    kind: ClassVar[str] = "evaluated"


@dataclass(frozen=True, kw_only=True)
class Saved(Event):
    """After a checkpoint was published."""

    folder: Path
    kind: ClassVar[str] = "saved"
