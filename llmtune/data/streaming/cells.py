"""Cells: a run of rows of one lane, tokenised and made into units together. Done by any process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from llmtune.data.config import DataConfig
from llmtune.data.formats import Chosen
from llmtune.data.piece import Bad, Packed
from llmtune.data.report import Losses
from llmtune.data.streaming.picked import Picked
from llmtune.data.tokenise import Tokeniser
from llmtune.data.tokens import TokenSamples
from llmtune.data.units import SampleSlice, Units, make_units


class CellRows(NamedTuple):
    """Rows of a cell that come from one chunk."""

    source: int
    rows: Picked
    places: list[int]
    """Where each row stands in the cell."""


class Done(NamedTuple):
    """A part that is tokenised."""

    source: int
    packed: Packed
    places: dict[int, int]
    """The place in the cell of each row, by its number."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """What the rows of a cell became."""

    samples: TokenSamples
    """`rows` are places in the cell."""
    units: Units
    read: Counter[int]
    """Rows of each data set, bad ones included."""
    kept: Counter[int]
    """Samples of each data set."""
    bad: list[tuple[int, Bad]] = field(default_factory=list)
    losses: Losses = field(default_factory=Losses)
    ends: Counter[int] = field(default_factory=Counter)


class Unit(NamedTuple):
    """What a lane gives to a step."""

    cell: Cell
    number: int
    first: int
    """The stream's row at place 0 of the cell."""
    stride: int
    """Rows of the stream from one place of the cell to the next."""

    @property
    def pieces(self) -> list[SampleSlice]:
        return self.cell.units.pieces(self.number)

    @property
    def tokens(self) -> int:
        return int(self.cell.units.tokens[self.number])

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        if self.cell.units.kind == "row":
            return self.tokens
        parts = [part for piece in self.pieces for part in self.cell.samples.sequences(piece.sample)]
        return max(part.stop - part.start for part in parts)

    def row(self, sample: int) -> int:
        """The stream's row that a sample of the cell comes from."""
        return self.first + int(self.cell.samples.rows[sample]) * self.stride


class CellMaker:
    """Makes cells as a recipe's data keys say."""

    def __init__(self, config: DataConfig, tokeniser: Tokeniser, chosen: Sequence[Chosen], kind: str) -> None:
        self.config, self.tokeniser, self.chosen, self.kind = config, tokeniser, chosen, kind

    def __call__(self, parts: Sequence[CellRows]) -> Cell:
        """Tokenise the rows of a cell and make units of its samples."""
        done = [self.tokenised(part) for part in parts]
        samples, config = joined(done, self.kind), self.config
        read, kept = Counter[int](), Counter[int]()
        for part in done:
            read[part.source] += part.packed.read
            kept[part.source] += len(part.packed.rows)
        return Cell(
            samples=samples,
            units=make_units(
                samples, packing=config.packing, neat=config.neat_packing, cutoff_len=config.cutoff_len, seed=0,
                shuffle=False,
            ),
            read=read,
            kept=kept,
            bad=[(part.source, bad) for part in done for bad in part.packed.bad],
            losses=sum((part.packed.losses for part in done), Losses()),
            ends=sum((part.packed.ends for part in done), Counter[int]()),
        )  # fmt: skip

    def tokenised(self, part: CellRows) -> Done:
        rows = part.rows.rows()
        packed = self.tokeniser.encode(self.chosen[part.source], rows, part.rows.origin).packed()
        return Done(part.source, packed, dict(zip((row.number for row in rows), part.places, strict=True)))


def joined(done: Sequence[Done], kind: str) -> TokenSamples:
    """The samples of all parts in the order of their rows in the cell."""
    packed = [part.packed for part in done]
    places: list[int] = []
    origins: dict[int, str] = {}
    for part in done:
        numbers = part.packed.numbers[part.packed.rows].tolist()
        places += [part.places[number] for number in numbers]
        origins |= {part.places[number]: f"{part.packed.origin}{number}" for number in numbers}
    lengths = np.concatenate([np.zeros(0, np.int64), *(each.lengths for each in packed)])
    starts = np.cumsum(lengths) - lengths
    weights = labels = None
    if any(each.weights is not None for each in packed):
        weights = np.concatenate([_weights(each) for each in packed])
    if any(each.labels is not None for each in packed):
        labels = np.concatenate([each.labels for each in packed if each.labels is not None])
    samples = TokenSamples(
        ids=np.concatenate([np.zeros(0, np.int32), *(each.ids for each in packed)]),
        mask=np.concatenate([np.zeros(0, bool), *(each.mask for each in packed)]),
        weights=weights,
        starts=starts,
        stops=starts + lengths,
        trained=np.concatenate([np.zeros(0, np.int64), *(each.trained for each in packed)]),
        labels=labels,
        rows=np.array(places, np.int64),
        sets=np.repeat([part.source for part in done], [len(each.rows) for each in packed]).astype(np.int32),
        width=max((each.width for each in packed if len(each.rows)), default=1),
        kind=kind,
        place=origins.__getitem__,
    )
    return samples.select(np.argsort(samples.rows, kind="stable"))


def _weights(packed: Packed) -> np.ndarray:
    return np.ones(len(packed.ids), np.float32) if packed.weights is None else packed.weights
