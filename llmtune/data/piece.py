"""What becomes of some rows of a data set: their samples in flat arrays, and what was left out. Travels between
processes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from llmtune.contract.examples import MEDIA_KINDS, ShownText
from llmtune.data.report import Bad, Losses
from llmtune.data.sequence import TokenSequence
from llmtune.data.tokens import MEDIA_COLUMN


class KeptColumns(NamedTuple):
    """The columns that a sample keeps."""

    told: bytes
    """A JSON object."""
    hashed: int
    """A hash of 64 bits of the object, in which media are what their files hold, wherever those lie."""
    media: tuple[int, ...]
    """How many media of each of `MEDIA_KINDS` its sequences show."""

    @staticmethod
    def of(extra: Mapping[str, Any], shown: Sequence[ShownText | None]) -> KeptColumns:
        """Of some columns, and what each sequence shows."""
        if not any(shown):
            told = as_json(extra)
            return KeptColumns(told, _hash(told), (0,) * len(MEDIA_KINDS))
        held = [each and each.as_json() for each in shown]
        held_anywhere = [
            each and [each.text, *((medium.kind, medium.content) for medium in each.media)] for each in shown
        ]
        kinds = [medium.kind for each in shown if each for medium in each.media]
        return KeptColumns(
            as_json({**extra, MEDIA_COLUMN: held}),
            _hash(as_json({**extra, MEDIA_COLUMN: held_anywhere})),
            tuple(map(kinds.count, MEDIA_KINDS)),
        )


def _hash(told: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest())


def as_json(columns: Mapping[str, Any]) -> bytes:
    """The columns of a row, what JSON does not know as text."""
    return json.dumps(columns, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")


class PackedColumns(NamedTuple):
    """`KeptColumns` of some samples in arrays, as `TokenSamples` has them."""

    columns: np.ndarray
    """(bytes,) uint8, the objects end to end."""
    column_stops: np.ndarray
    """(samples, 2) int64, where the object of each sample begins and ends."""
    column_hashes: np.ndarray
    """(samples,) uint64."""
    media: np.ndarray
    """(samples, kinds) int32."""

    @staticmethod
    def of(columns: Sequence[KeptColumns]) -> PackedColumns:
        """Those of each sample, in their order."""
        sizes = np.array([len(each.told) for each in columns], np.int64)
        ends = np.cumsum(sizes)
        return PackedColumns(
            np.frombuffer(b"".join(each.told for each in columns), np.uint8), np.stack([ends - sizes, ends], 1),
            np.array([each.hashed for each in columns], np.uint64),
            np.array([each.media for each in columns], np.int32),
        )  # fmt: skip


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
    columns: list[KeptColumns] = field(default_factory=list)
    """One a sample, where rows have columns that are kept."""
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
            columns=PackedColumns.of(self.columns) if self.columns else None,
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
    columns: PackedColumns | None
    rows: np.ndarray
    numbers: np.ndarray
    read: int
    bad: Sequence[Bad]
    losses: Losses
    ends: Counter[int]
