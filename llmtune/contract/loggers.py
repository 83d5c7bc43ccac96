"""The contract of loggers: where metrics go besides `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

RunStatus: TypeAlias = Literal["done", "interrupted", "failed"]
"""How a run, or a part of one that goes on later, has ended; as `run.json` says it."""


class Logger(Protocol):
    """Receives metrics on rank 0. All calls come from one thread of its own, in order: one that takes long, or never
    returns, holds up nothing, and an error is reported once and never stops a run."""

    def start(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        """Called once before the first step with the run's folder and the resolved recipe, secrets left out. A logger
        that `Continues` gets `begin` instead, and needs no `start`."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers by name after an optimiser step, counted from 1."""
        ...

    def finish(self) -> None:
        """Called at the end of the run, also where it failed before `start`."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoggerStart:
    """What a logger is told when a run begins or goes on."""

    folder: Path
    """A folder of the logger's own. It outlives an interruption, and is emptied where the run starts over."""
    run_folder: Path
    recipe: Mapping[str, Any]
    """The resolved recipe, secrets blanked out."""
    first_step: int
    """Steps that are done already, 0 for a new run. Whatever was logged for later ones is void: they come again."""


@runtime_checkable
class Continues(Protocol):
    """A logger that is told where a run goes on."""

    def begin(self, start: LoggerStart) -> None:
        """Called once, in place of `Logger.start`."""
        ...


@runtime_checkable
class FollowsStatus(Protocol):
    """Optional on a logger that shows how a run has ended."""

    def ended(self, status: RunStatus) -> None:
        """Called once before `finish`, if the logger was begun. An interrupted run, and one that failed, may go on
        later with `begin`."""
        ...


@dataclass(frozen=True, kw_only=True)
class SampleAnswer:
    """What the model answers to one of the recipe's `sample_prompts`."""

    question: str
    answer: str


@runtime_checkable
class TakesSamples(Protocol):
    """Optional on a logger that shows texts."""

    def log_samples(self, step: int, samples: Sequence[SampleAnswer]) -> None:
        """The answers to `sample_prompts` after so many steps: before the first one (0), and at the end."""
        ...


@runtime_checkable
class TakesPictures(Protocol):
    """Optional on a logger that shows pictures."""

    def log_picture(self, step: int, name: str, png: bytes) -> None:
        """A picture, such as `curves` at the end of the run or of a part of it; with the name of an earlier one it
        replaces that, or stands beside it at its own step."""
        ...
