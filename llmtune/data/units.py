"""What an epoch shuffles: whole samples, packs of samples, or rows cut from all samples laid end to end.

Flat arrays only: a million samples take well under a second and 8 to 24 bytes each.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from llmtune.contract.errors import DataError

if TYPE_CHECKING:
    from llmtune.data.config import DataConfig
    from llmtune.data.tokens import TokenSamples


class SampleSlice(NamedTuple):
    """Tokens `first` to `stop` of a sample; the whole sample where `stop` is None."""

    sample: int
    first: int = 0
    stop: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Units:
    """Units of an epoch. Unit u is made of the pieces `bounds[u]` to `bounds[u + 1]`."""

    kind: Literal["sample", "pack", "row"]
    """`sample`: one sample each. `pack`: whole samples that do not see each other. `row`: consecutive tokens, documents
    end where they end."""
    samples: np.ndarray
    """(pieces,) int64, the sample that each piece is of."""
    bounds: np.ndarray
    """(units + 1,) int64."""
    tokens: np.ndarray
    """(units,) int64, tokens of each unit."""
    first: np.ndarray | None = None
    """(pieces,) int64, where a piece begins in its sample; None: all pieces are whole samples."""
    stops: np.ndarray | None = None
    """(pieces,) int64, where it ends."""
    room: int = 0
    """Most tokens of a pack or row."""
    bare: int = 0
    """Rows that were left out, as no token in them trains."""

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, unit: int) -> list[int]:
        """Samples that the unit has pieces of, in order."""
        return self.samples[self.bounds[unit] : self.bounds[unit + 1]].tolist()

    def pieces(self, unit: int) -> list[SampleSlice]:
        """The unit's pieces in order."""
        part = slice(int(self.bounds[unit]), int(self.bounds[unit + 1]))
        if self.first is None or self.stops is None:
            return [SampleSlice(sample) for sample in self.samples[part].tolist()]
        return [
            SampleSlice(*each)
            for each in np.stack([self.samples[part], self.first[part], self.stops[part]], 1).tolist()
        ]

    @staticmethod
    def concatenated(parts: Sequence[Units], samples_before: Sequence[int]) -> Units:
        """All units of some parts of one kind; `samples_before[i]` samples stand before those of part i."""
        counts = [len(part.samples) for part in parts]
        pieces_before = np.cumsum(counts) - counts
        split = parts[0].first is not None
        return replace(
            parts[0],
            samples=np.concatenate([part.samples + n for part, n in zip(parts, samples_before, strict=True)]),
            bounds=np.concatenate([[0], *(part.bounds[1:] + n for part, n in zip(parts, pieces_before, strict=True))]),
            tokens=np.concatenate([part.tokens for part in parts]),
            first=np.concatenate([part.first for part in parts if part.first is not None]) if split else None,
            stops=np.concatenate([part.stops for part in parts if part.stops is not None]) if split else None,
        )

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(units,) what the units' samples have together of `values` (samples,); a piece of a sample counts whole."""
        return np.add.reduceat(values[self.samples], self.bounds[:-1]) if len(self) else np.zeros(0, values.dtype)

    @property
    def fill(self) -> float:
        """Share of the room in packs or rows that holds tokens."""
        return float(self.tokens.sum()) / max(1, len(self) * self.room) if self.room else 1.0


def make_units(samples: TokenSamples, config: DataConfig, seed: int) -> Units:
    """The units that `packing` and `neat_packing` ask for, in the order of the samples where `disable_shuffling` does.
    A pair's pack has room for two `cutoff_len`."""
    if not config.packing:
        return whole(samples.lengths)
    if config.neat_packing:
        return (pack_in_order if config.disable_shuffling else pack)(samples.lengths, config.cutoff_len * samples.width)
    if samples.width > 1:
        raise DataError(
            "neat_packing: found false, but the two answers of a preference must not be joined; set it true"
        )
    return without_bare(samples, concatenate(samples, config.cutoff_len, None if config.disable_shuffling else seed))


def whole(lengths: np.ndarray) -> Units:
    """Every sample is a unit."""
    count = len(lengths)
    return Units(
        kind="sample", samples=np.arange(count), bounds=np.arange(count + 1), tokens=np.asarray(lengths, np.int64)
    )


def pack(lengths: Sequence[int] | np.ndarray, room: int) -> Units:
    """Put whole samples into packs of at most `room` tokens: best-fit decreasing.

    Longest samples go first, each into the fullest pack that still has room (Johnson 1973). Samples of one length are
    placed together, which gives the same packs: 1,000,000 samples take about 0.3 s.

    Returns:
        Packs ordered by their first sample, and samples ascending within each.
    """
    lengths = _fitting(lengths, room)
    order = np.argsort(-lengths, kind="stable")
    packs, count = _best_fit(lengths[order], room)
    # The first sample of each pack decides the pack's number.
    first = np.full(count, len(lengths), dtype=np.int64)
    np.minimum.at(first, packs, order)
    number = np.empty(count, dtype=np.int64)
    number[np.argsort(first)] = np.arange(count)
    of_sample = np.empty(len(lengths), dtype=np.int64)
    of_sample[order] = number[packs]
    samples = np.argsort(of_sample, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(of_sample, minlength=count))])
    tokens = np.bincount(of_sample, weights=lengths, minlength=count).astype(np.int64)
    return Units(kind="pack", samples=samples, bounds=bounds, tokens=tokens, room=room)


def pack_in_order(lengths: Sequence[int] | np.ndarray, room: int) -> Units:
    """Put whole samples into packs of at most `room` tokens, each pack as many as fit of those that come next."""
    lengths = _fitting(lengths, room)
    ends = np.cumsum(lengths)
    bounds = [0]
    while bounds[-1] < len(lengths):
        before = ends[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(int(np.searchsorted(ends, before + room, side="right")))
    return Units(
        kind="pack", samples=np.arange(len(lengths)), bounds=np.array(bounds), room=room,
        tokens=np.diff(np.append(0, ends)[bounds]),
    )  # fmt: skip


def _fitting(lengths: Sequence[int] | np.ndarray, room: int) -> np.ndarray:
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and int(lengths.max()) > room:
        raise DataError(f"packing: a sample of {int(lengths.max())} tokens does not fit into {room}; raise cutoff_len")
    return lengths


def _best_fit(falling: np.ndarray, room: int) -> tuple[np.ndarray, int]:
    """The pack of each of `falling` lengths, and how many packs there are."""
    packs = np.empty(len(falling), dtype=np.int64)
    count = 0
    open_packs: dict[int, np.ndarray] = {}  # by room left
    rooms: list[int] = []  # its keys, sorted
    bounds = np.append(np.flatnonzero(np.diff(falling, prepend=-1)), len(falling))
    for start, stop in pairwise(bounds.tolist()):
        length = int(falling[start])
        while start < stop:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                left = rooms.pop(at)
                found = open_packs.pop(left)
            else:
                left = room
                found = np.arange(count, count + -(-(stop - start) // max(1, room // max(1, length))))
                count += len(found)
            each = left // max(1, length)  # once a pack takes one, it is the fullest with room for the next
            full = min(len(found), (stop - start) // each)
            packs[start : start + full * each] = np.repeat(found[:full], each)
            start += full * each
            _open(open_packs, rooms, left - each * length, found[:full])
            if start < stop and full < len(found):
                packs[start:stop] = found[full]
                _open(open_packs, rooms, left - (stop - start) * length, found[full : full + 1])
                start, full = stop, full + 1
            _open(open_packs, rooms, left, found[full:])
    return packs, count


def _open(open_packs: dict[int, np.ndarray], rooms: list[int], left: int, packs: np.ndarray) -> None:
    if not left or not len(packs):
        return
    if left in open_packs:
        open_packs[left] = np.concatenate([open_packs[left], packs])
    else:
        open_packs[left] = packs
        insort(rooms, left)


def concatenate(samples: TokenSamples, room: int, seed: int | None) -> Units:
    """Lay all samples end to end, in an order drawn by `seed`, and cut rows of exactly `room` tokens; the last may have
    fewer. Samples of one row of data (a long text in parts) stay together. None keeps the order of the samples."""
    lengths = samples.lengths
    order = np.arange(len(lengths)) if seed is None else _by_document(samples.rows, seed)
    ends = np.cumsum(lengths[order])
    total = int(ends[-1]) if len(ends) else 0
    begins = np.unique(np.concatenate([[0], ends, np.arange(0, total, room)]))[:-1]
    sizes = np.diff(np.append(begins, total))
    place = np.searchsorted(ends, begins, side="right")
    first = begins - (ends - lengths[order])[place]
    rows = -(-total // room)
    return Units(
        kind="row", samples=order[place], first=first, stops=first + sizes, room=room,
        bounds=np.append(np.searchsorted(begins, np.arange(rows) * room), len(begins)),
        tokens=np.minimum(room, total - np.arange(rows) * room),
    )  # fmt: skip


def without_bare(samples: TokenSamples, units: Units) -> Units:
    """The rows in which a token trains. Where prompts are longer than a row, rows of nothing but a prompt would make
    steps that learn nothing and log a loss of 0."""
    if units.first is None or units.stops is None:
        return units
    at_start = np.zeros(len(units.samples), bool)
    at_start[units.bounds[:-1]] = True
    # Of a piece that begins a row the first token is predicted by nothing; of a whole sample `trained` tells at once.
    whole = (units.first == 0) & (units.stops == samples.lengths[units.samples])
    trains = whole & (samples.trained[units.samples] > 0)
    for piece in np.flatnonzero(~whole).tolist():
        begin = int(samples.starts[units.samples[piece]])
        part = slice(begin + int(units.first[piece]) + int(at_start[piece]), begin + int(units.stops[piece]))
        trains[piece] = samples.mask[part].any()
    keep = np.add.reduceat(trains, units.bounds[:-1], dtype=np.int64) > 0 if len(units) else np.zeros(0, bool)
    pieces = np.repeat(keep, np.diff(units.bounds))
    return replace(
        units, samples=units.samples[pieces], first=units.first[pieces], stops=units.stops[pieces],
        bounds=np.append(0, np.cumsum(np.diff(units.bounds)[keep])), tokens=units.tokens[keep],
        bare=int(len(keep) - keep.sum()),
    )  # fmt: skip


def _by_document(rows: np.ndarray, seed: int) -> np.ndarray:
    """A random order of samples in which neighbours that come from one row stay neighbours."""
    document = np.cumsum(np.diff(rows, prepend=rows[:1]) != 0)
    # The second word keeps this draw apart from the order of any epoch.
    drawn = np.random.default_rng([seed, 2**31 + 2]).permutation(int(document[-1]) + 1 if len(rows) else 0)
    return np.argsort(drawn[document], kind="stable")
