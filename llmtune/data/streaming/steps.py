"""Steps of a stream: units that follow each other, some from one chunk of its rows and some from the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.data.batch_loader import UnitBatches
from llmtune.data.report import Losses, SourceReport
from llmtune.data.streaming.chunks import OwnPieces, TokenPiece
from llmtune.data.tokens import TokenSamples
from llmtune.data.units import Units
from llmtune.data.workers import Ahead, WorkerPool

if TYPE_CHECKING:
    from llmtune.media.read import ReadMedia


@dataclass(frozen=True, kw_only=True)
class StreamChunk:
    """Consecutive rows of one epoch, tokenised."""

    made: OwnPieces
    batches: UnitBatches
    """Of the samples and units of the rows."""
    order: np.ndarray
    """(units,) the order in which the units are used."""
    filled: int
    """Units that a step had when the chunk began."""

    def epoch(self, used: int, known: int | None) -> float:
        """Epochs of the stream after `used` units; told by bytes until the rows of an epoch are `known`."""
        begin, share = self.made.begin, used / max(1, len(self.order))
        if size := begin["epoch_rows"] or known:
            rows = begin["before"] + begin["used"] + share * len(self.made.places)
            return begin["mixed"]["epoch"] + rows / size
        first, last = self.made.progress
        return begin["mixed"]["epoch"] + first + share * (last - first)


@dataclass(frozen=True, kw_only=True)
class StepUnits:
    """The units of a step."""

    batches: UnitBatches
    """What has these units, maybe besides others."""
    units: list[int]
    begun: list[tuple[list[TokenPiece], int]]
    """What all ranks made of each chunk that begins with the step and was not counted before, and the packed rows of it
    that were left out."""
    place: dict[str, Any]
    """Where the stream is after them, for a cursor."""
    epoch: float
    read: list[Callable[[], ReadMedia]]
    """What is read of the media of each of this rank's micro-batches."""


@dataclass(kw_only=True)
class Reading:
    """A stream that is being read."""

    pool: WorkerPool
    reports: list[SourceReport]
    losses: Losses = field(default_factory=Losses)
    ahead: Ahead | None = None
    chunk_rows: int = 0
    bad_rows: Path | None = None
    bad_bytes: int = 0
    """Bytes of `bad_rows`."""
    pieces: int = 0
    """Pieces that all ranks have tokenised."""
    chunk: StreamChunk | None = None
    used: int = 0
    """Units of the chunk that were used."""
    entered: dict[str, Any] | None = None
    """The cursor that a continued run begins at, until its first chunk is there."""
    step: int = 0
    latest: StepUnits | None = None
    """The step before `step`."""
    following: deque[StepUnits | Exception] = field(default_factory=deque)
    """The step `step` and those after it, where media are read ahead; at the end maybe what kept one from being made,
    which is raised in its turn."""
    bare: int = 0
    """Packed rows that were left out, as no token in them trains."""


def across(parts: Sequence[tuple[UnitBatches, np.ndarray]]) -> tuple[UnitBatches, list[int]]:
    """Units of several chunks as those of one."""
    chunks = [chunk for chunk, _ in parts]
    if len(parts) == 1:
        return chunks[0], parts[0][1].tolist()
    samples = [chunk.samples for chunk in chunks]
    rows = np.cumsum([0, *(int(each.rows.max(initial=-1)) + 1 for each in samples)])
    units_before = np.cumsum([0, *(len(chunk.units) for chunk in chunks)])

    def place(row: int) -> str:
        part = int(np.searchsorted(rows, row, "right")) - 1
        return samples[part].place(row - int(rows[part]))  # type: ignore[misc]

    samples_before = np.cumsum([0, *map(len, samples)])[:-1].tolist()
    whole = replace(
        chunks[0],
        samples=TokenSamples.concatenated(samples, rows[:-1].tolist(), place=place),
        units=Units.concatenated([chunk.units for chunk in chunks], samples_before),
    )
    return whole, [int(unit + n) for (_, units), n in zip(parts, units_before, strict=False) for unit in units]
