"""What becomes of some rows of a data set: their samples in flat arrays, and what was left out. Travels between
processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llmtune.data.report import Bad, Losses
from llmtune.data.sequence import TokenSequence


@dataclass(kw_only=True)
class Piece:
    """The samples of some consecutive rows."""

    origin: str = ""
    """Where the rows stand: their number follows it."""
    width: int = 1
    """Sequences of a sample."""
    sequences: list[TokenSequence] = field(default_factory=list)
    labels: list[bool] = field(default_factory=list)
    """One a sample, where rows are labelled."""
    columns: list[bytes] = field(default_factory=list)
    """One a sample, where rows have columns that are kept: JSON objects."""
    rows: list[int] = field(default_factory=list)
    """For each sample, the place of its row in `numbers`."""
    numbers: list[int] = field(default_factory=list)
    """Lines or row numbers of the rows that gave samples."""
    read: int = 0
    """Rows read, bad ones included."""
    bad: list[Bad] = field(default_factory=list)
    losses: Losses = field(default_factory=Losses)
    ends: Counter[int] = field(default_factory=Counter)
    """Last trained tokens of the turns that end in a special token."""

    def packed(self) -> Packed:
        """The same in flat arrays, which travel quicker."""
        lengths = np.array([len(each.ids) for each in self.sequences], np.int64)
        starts = np.cumsum(lengths) - lengths
        ids = np.concatenate([np.zeros(0, np.int32), *(each.ids for each in self.sequences)]).astype(
            np.int32, copy=False
        )
        mask = np.concatenate([np.zeros(0, bool), *(each.mask for each in self.sequences)])
        mask[starts[lengths > 0]] = False  # nothing stands before a first token that could predict it
        weights = None
        if any(each.weights is not None for each in self.sequences):
            weights = np.concatenate([each.all_weights for each in self.sequences])
        total = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
        return Packed(
            origin=self.origin,
            width=self.width,
            ids=ids,
            mask=mask,
            weights=weights,
            lengths=lengths,
            trained=total[starts + lengths] - total[starts],
            labels=np.array(self.labels, bool) if self.labels else None,
            columns=np.frombuffer(b"".join(self.columns), np.uint8) if self.columns else None,
            column_sizes=np.array([len(each) for each in self.columns], np.int64) if self.columns else None,
            rows=np.array(self.rows, np.int64),
            numbers=np.array(self.numbers, np.int64),
            read=self.read,
            bad=self.bad,
            losses=self.losses,
            ends=self.ends,
        )


@dataclass(frozen=True, kw_only=True)
class Packed:
    """`Piece` in arrays."""

    origin: str
    width: int
    ids: np.ndarray
    mask: np.ndarray
    weights: np.ndarray | None
    lengths: np.ndarray
    """(sequences,) int64."""
    trained: np.ndarray
    """(sequences,) int64."""
    labels: np.ndarray | None
    columns: np.ndarray | None
    """(bytes,) uint8, the objects end to end."""
    column_sizes: np.ndarray | None
    """(samples,) int64."""
    rows: np.ndarray
    numbers: np.ndarray
    read: int
    bad: Sequence[Bad]
    losses: Losses
    ends: Counter[int]

    @property
    def column_stops(self) -> np.ndarray | None:
        """(samples, 2) int64, where the object of each sample begins and ends."""
        if self.column_sizes is None:
            return None
        ends = np.cumsum(self.column_sizes)
        return np.stack([ends - self.column_sizes, ends], 1)
