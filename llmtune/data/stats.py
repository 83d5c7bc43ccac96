"""How long samples are, what trains, how rows fill, and what a cutoff would cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.contract.errors import counted
from llmtune.data.media_stats import MediaStats
from llmtune.data.plot import plot_lengths
from llmtune.data.report import PartReport
from llmtune.terminal import Shown, table_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llmtune.data.tokens import TokenSamples

PERCENTILES = (50, 90, 95, 99, 99.9)
CUTOFFS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
_BAR = 30
"""Columns of the longest bar."""


@dataclass(frozen=True, kw_only=True)
class Lengths(PartReport):
    """Samples of one data set, or of all."""

    name: str
    percentiles: Mapping[str, int]
    """Tokens of a sample: `50`, `90`, `95`, `99`, `99.9`; so many percent are no longer."""
    shortest: int

    @staticmethod
    def count(name: str, samples: TokenSamples, chosen: np.ndarray | slice = slice(None)) -> Lengths:
        """Count the `chosen` samples."""
        lengths = samples.lengths[chosen]
        # The smallest length that enough samples do not exceed, not a number between two lengths.
        found = np.percentile(lengths, PERCENTILES, method="inverted_cdf") if len(lengths) else [0] * len(PERCENTILES)
        return Lengths(
            name=name,
            samples=len(lengths),
            tokens=int(lengths.sum()),
            supervised_tokens=int(samples.supervised[chosen].sum()),
            percentiles={f"{percent:g}": int(value) for percent, value in zip(PERCENTILES, found, strict=True)},
            longest=int(lengths.max(initial=0)),
            shortest=int(lengths.min()) if len(lengths) else 0,
        )


@dataclass(frozen=True, kw_only=True)
class Cutoff:
    """What a `cutoff_len` would cost, had samples their full lengths."""

    cutoff_len: int
    samples: int
    """Samples that are longer: so many `drop` leaves out, and `truncate` cuts."""
    tokens: int
    """Tokens beyond it: at least these are lost where samples are cut; whole turns that do not fit go with them."""
    supervised_tokens: int
    """Trained ones of them."""
    without_target: int
    """Samples of which no trained token is left."""
    dropped_tokens: int
    """Tokens of the samples that are longer: lost where they are dropped."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How samples fill rows."""

    rows: int
    """Rows of an epoch."""
    fill: float
    """Share of their tokens that is not padding."""
    micro_batch: int = 1
    """Rows that are padded to one length."""


@dataclass(frozen=True, kw_only=True, repr=False)
class DataStats(Shown):
    """Lengths of the samples as they come, without a cutoff, and what the recipe makes of them."""

    kind: str
    cutoff_len: int
    all: Lengths
    sets: Sequence[Lengths]
    trained: Lengths | None
    """What is trained on, after the recipe's `cutoff_len`; None where the recipe would not train."""
    evaluated: Lengths | None
    packed: Rows | None
    """Samples in rows of `cutoff_len` tokens; None where they are never packed."""
    padded: Rows | None
    """One sample a row, in the recipe's batches."""
    cutoffs: Sequence[Cutoff]
    histogram: Sequence[tuple[int, int]]
    """(longest length of a bar, samples in it); each bar is twice as wide as the one before."""
    media: MediaStats | None = None
    """What the samples show; None where they are text alone."""
    notes: Sequence[str] = ()
    lengths: np.ndarray
    """(samples,) tokens."""

    def as_dict(self) -> dict[str, Any]:
        """For machines; without the single lengths."""
        return {key: value for key, value in asdict(self).items() if key != "lengths"}

    def __str__(self) -> str:
        percentiles = {f"{name}%": value for name, value in self.all.percentiles.items()}
        lengths = {**percentiles, "longest": self.all.longest, "shortest": self.all.shortest}
        parts = [
            "\n".join([str(self.all), *([str(self.media)] if self.media else [])]),
            table_text(["", *lengths], [["tokens of a sample", *map(_number, lengths.values())]], left=(0,)),
            table_text(["tokens of a sample", "", "samples", "so far"], self._bars(), left=(0, 1)),
        ]
        if len(self.sets) > 1:
            parts.append(table_text(_SET_HEAD, map(_set_row, self.sets), left=(0,)))
        # The longer ones cost nothing either.
        enough = next((each.cutoff_len for each in self.cutoffs if not each.samples), CUTOFFS[-1])
        costs = [each for each in self.cutoffs if each.cutoff_len <= max(enough, self.cutoff_len)]
        parts.append("\n".join(self._rows()))
        parts.append(table_text(_CUTOFF_HEAD, [_cutoff_row(each, self.all.tokens) for each in costs]))
        return "\n\n".join([*parts, *(["\n".join(f"note: {note}" for note in self.notes)] if self.notes else [])])

    def _bars(self) -> Iterator[tuple[str, ...]]:
        most, so_far = max(count for _, count in self.histogram), 0
        for upto, count in self.histogram:
            so_far += count
            bar = "#" * max(round(count / most * _BAR), 1 if count else 0)
            yield f"up to {upto:>7,}", bar, f"{count:,}", f"{so_far / self.all.samples:.2%}"

    def _rows(self) -> list[str]:
        if self.trained is None or self.padded is None:
            return [f"the recipe's cutoff_len: {self.cutoff_len:,}"]
        lines = [f"with the recipe's cutoff_len {self.cutoff_len:,}, to train on: {self.trained}"]
        if self.evaluated is not None:
            lines.append(f"to evaluate on: {self.evaluated}")
        if self.packed is not None:
            packs = counted(self.packed.rows, "row")
            lines.append(f"  packed: {packs} of {self.cutoff_len:,} tokens, {self.packed.fill:.2%} full")
        found = f"{counted(self.padded.rows, 'row')}, {1 - self.padded.fill:.1%} padding"
        lines.append(f"  padded in micro-batches of {self.padded.micro_batch:,}: {found}")
        return lines

    def plot(self, path: str | Path | None = None) -> Figure:
        """A histogram of lengths, and the share of samples and tokens up to each; saved to `path` if given.

        Raises PlanError without matplotlib.
        """
        return plot_lengths(self.lengths, self.cutoff_len, path)


def make_stats(
    whole: TokenSamples,
    trained: TokenSamples | None,
    evaluated: TokenSamples | None,
    *,
    cutoff_len: int,
    packed: Rows | None = None,
    padded: Rows | None = None,
    media: MediaStats | None = None,
    notes: Sequence[str] = (),
) -> DataStats:
    """Count `whole`, the samples without a cutoff, and what the recipe makes of them."""
    sets = [
        Lengths.count(name, whole, slice(None) if whole.sets is None else whole.sets == number)
        for number, name in enumerate(whole.set_names)
    ]
    lengths = whole.lengths
    longest = (whole.stops - whole.starts).reshape(-1, whole.width).max(1)  # a cutoff holds for each sequence
    mask = np.append(whole.mask, False)
    return DataStats(
        kind=whole.kind,
        cutoff_len=cutoff_len,
        all=Lengths.count("all", whole),
        sets=sets,
        trained=Lengths.count("train", trained) if trained is not None else None,
        evaluated=Lengths.count("evaluation", evaluated) if evaluated is not None else None,
        packed=packed,
        padded=padded,
        cutoffs=[_cost(whole, mask, longest, cutoff) for cutoff in sorted({*CUTOFFS, cutoff_len})],
        histogram=_histogram(lengths),
        media=media,
        notes=notes,
        lengths=lengths,
    )


def _cost(samples: TokenSamples, mask: np.ndarray, longest: np.ndarray, cutoff: int) -> Cutoff:
    """Cut every sequence after `cutoff` tokens; only those that are longer are looked into. `mask` has one token more
    than the samples, so that the end of the last is a place in it, too."""
    (chosen,) = np.nonzero(longest > cutoff)
    (long,) = np.nonzero(samples.stops - samples.starts > cutoff)
    bounds = np.stack([samples.starts[long] + cutoff, samples.stops[long]], 1).reshape(-1)
    lost = np.add.reduceat(mask, bounds, dtype=np.int64)[::2] if len(long) else np.zeros(0, np.int64)
    # One sequence of a pair that has nothing left spoils both.
    bare = np.unique(long[(lost > 0) & (lost == samples.trained[long])] // samples.width)
    return Cutoff(
        cutoff_len=cutoff,
        samples=len(chosen),
        tokens=int((samples.stops - samples.starts - cutoff)[long].sum()),
        supervised_tokens=int(lost.sum()),
        without_target=len(bare),
        dropped_tokens=int(samples.lengths[chosen].sum()),
    )


def _histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Samples by length, in bars up to each power of two."""
    if not len(lengths):
        return [(1, 0)]
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(powers)
    first = int(np.flatnonzero(counts)[0])
    return [(2**power, int(counts[power])) for power in range(first, len(counts))]


_SET_HEAD = ("data set", "samples", "tokens", "50%", "95%", "longest", "trained on")
_CUTOFF_HEAD = (
    "cutoff len", "samples longer", "tokens beyond", "share", "trained ones", "nothing left", "lost if dropped"
)  # fmt: skip


def _set_row(found: Lengths) -> tuple[str, ...]:
    counts = (found.samples, found.tokens, found.percentiles["50"], found.percentiles["95"], found.longest)
    return (found.name, *map(_number, counts), f"{found.share:.0%}")


def _cutoff_row(found: Cutoff, total: int) -> tuple[str, ...]:
    longer, lost = (found.cutoff_len, found.samples, found.tokens), f"{found.tokens / max(1, total):.2%}"
    trained = (found.supervised_tokens, found.without_target, found.dropped_tokens)
    return (*map(_number, longer), lost, *map(_number, trained))


def _number(value: int) -> str:
    return f"{value:,}"
