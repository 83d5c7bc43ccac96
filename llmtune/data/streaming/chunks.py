"""Chunks of a stream: consecutive rows, tokenised and made into units together, ahead of the training loop."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np

from llmtune.data.config import DataConfig
from llmtune.data.formats import Chosen
from llmtune.data.piece import Packed
from llmtune.data.report import Bad, Losses, SourceReport
from llmtune.data.streaming.rows import RowRun, StreamRow
from llmtune.data.tokenise import Tokeniser
from llmtune.data.tokens import TokenSamples
from llmtune.data.workers import WorkerPool

PIECE_ROWS = 16
"""Rows that a process tokenises at a time."""


@dataclass(frozen=True, kw_only=True)
class RowPiece:
    """Rows to tokenise together."""

    words: tuple[int, ...]
    """What random numbers that are drawn for them are seeded with: a function of the place in the stream alone."""
    rows: list[StreamRow]


@dataclass(kw_only=True, eq=False)
class TokenPiece:
    """What rows became. Travels between processes and ranks."""

    samples: TokenSamples
    """`rows` are places among the rows of the piece."""
    read: Counter[int] = field(default_factory=Counter)
    """Rows of each data set, bad ones included."""
    kept: Counter[int] = field(default_factory=Counter)
    """Samples of each data set."""
    bad: list[tuple[int, Bad]] = field(default_factory=list)
    """(number of the data set, row) of those that cannot be used."""
    losses: Losses = field(default_factory=Losses)
    ends: Counter[int] = field(default_factory=Counter)

    def account(self, reports: Sequence[SourceReport]) -> None:
        """Count the rows in the reports of their data sets."""
        for source, report in enumerate(reports):
            report.rows += self.read[source]
            report.samples += self.kept[source]
        for source, bad in self.bad:
            reports[source].add_bad(bad)


class PieceMaker:
    """Tokenises rows of all data sets as a recipe's data keys say."""

    def __init__(self, config: DataConfig, tokeniser: Tokeniser, chosen: Sequence[Chosen], kind: str) -> None:
        self.config, self.tokeniser, self.chosen, self.kind = config, tokeniser, chosen, kind

    def __call__(self, piece: RowPiece) -> TokenPiece:
        """The samples of the rows, in their order."""
        alike: dict[tuple[int, int, str], list[int]] = {}  # a row's number comes once in a pass through a file
        for place, row in enumerate(piece.rows):
            alike.setdefault((row.source, row.passed, row.origin), []).append(place)
        made, parts = TokenPiece(samples=TokenSamples.concatenated([])), []
        with seeded(piece.words):
            for (source, _, origin), places in alike.items():
                rows = [piece.rows[place].row for place in places]
                packed = self.tokeniser.encode(self.chosen[source], rows, origin).packed()
                numbers = {row.number: place for row, place in zip(rows, places, strict=True)}
                parts.append(self._samples(packed, source, numbers))
                made.read[source] += packed.read
                made.kept[source] += len(packed.rows)
                made.bad += [(source, bad) for bad in packed.bad]
                made.losses += packed.losses
                made.ends += packed.ends
        whole = TokenSamples.concatenated(parts, kind=self.kind)
        made.samples = whole.select(np.argsort(whole.rows, kind="stable"))
        return made

    def _samples(self, packed: Packed, source: int, places: dict[int, int]) -> TokenSamples:
        starts = np.cumsum(packed.lengths) - packed.lengths
        numbers = packed.numbers[packed.rows].tolist()
        columns = {} if packed.columns is None else packed.columns._asdict()
        return TokenSamples(
            ids=packed.ids, mask=packed.mask, weights=packed.weights, starts=starts, stops=starts + packed.lengths,
            trained=packed.trained, labels=packed.labels, rows=np.array([places[each] for each in numbers], np.int64),
            sets=np.full(len(numbers), source, np.int32), width=packed.width, kind=self.kind, **columns,
        )  # fmt: skip


@contextmanager
def seeded(words: Sequence[int]) -> Iterator[None]:
    """Python's and numpy's random numbers follow from `words`, as a format may draw some; then as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    seeds = np.random.SeedSequence(words).generate_state(2)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class OwnPieces(NamedTuple):
    """A run of rows, and what this rank made of its share of them."""

    begin: dict[str, Any]
    end: dict[str, Any]
    progress: tuple[float, float]
    places: list[str]
    """Where each row stands."""
    own: list[TokenPiece]


def own_pieces(runs: Iterator[RowRun], pool: WorkerPool, seed: int, rank: int, ranks: int) -> Iterator[OwnPieces]:
    """Every run, with what this rank tokenises of it: every `ranks`-th piece of all there are."""
    waiting: deque[tuple[OwnPieces, int]] = deque()
    share = cycle(range(ranks))

    def pieces() -> Iterator[RowPiece]:
        for run in runs:
            mine = [piece for piece in _cut(run, seed) if next(share) == rank]
            places = [row.place for row in run.rows]
            waiting.append((OwnPieces(run.begin, run.end, run.progress, places, []), len(mine)))
            yield from mine

    made: list[TokenPiece] = []
    results = pool.in_order(pieces())
    while True:
        while not waiting or len(made) < waiting[0][1]:
            made.append(next(results))
        run, count = waiting.popleft()
        yield run._replace(own=made[:count])
        del made[:count]


def _cut(run: RowRun, seed: int) -> Iterator[RowPiece]:
    begin = run.begin
    for first in range(0, len(run.rows), PIECE_ROWS):
        words = (seed, begin["mixed"]["epoch"], begin["before"] + begin["used"] + first)
        yield RowPiece(words=words, rows=run.rows[first : first + PIECE_ROWS])


def in_turn(everyone: Sequence[Sequence[TokenPiece]], before: int) -> list[TokenPiece]:
    """All ranks' pieces of a run in the order of its rows; `before` pieces were dealt out before."""
    hands = [iter(pieces) for pieces in everyone]
    count = sum(map(len, everyone))
    return [next(hands[number % len(hands)]) for number in range(before, before + count)]
