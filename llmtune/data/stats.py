"""How long samples are, what trains, how rows fill, and what a cutoff would cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.data.plot import plot_lengths
from llmtune.terminal import Shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llmtune.data.tokens import TokenSamples

PERCENTILES = (50, 90, 95, 99, 99.9)
CUTOFFS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
_BAR = 40


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Samples of one data set, or of all."""

    name: str
    samples: int
    tokens: int
    supervised_tokens: int
    """Trained tokens."""
    percentiles: Mapping[str, int]
    """Tokens of a sample: `50`, `90`, `95`, `99`, `99.9`; so many percent are no longer."""
    longest: int
    shortest: int

    @staticmethod
    def of(name: str, samples: TokenSamples, chosen: np.ndarray | slice = slice(None)) -> Lengths:
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
    notes: Sequence[str] = ()
    lengths: np.ndarray
    """(samples,) tokens."""

    def as_dict(self) -> dict[str, Any]:
        """For machines; without the single lengths."""
        return {key: value for key, value in asdict(self).items() if key != "lengths"}

    def __str__(self) -> str:
        return "\n\n".join(["\n".join(part) for part in self._parts()])

    def _parts(self) -> list[list[str]]:
        every = self.all
        head = [
            _counted(every),
            "tokens of a sample: "
            + ", ".join(f"{value:,} ({name} %)" for name, value in every.percentiles.items())
            + f", longest {every.longest:,}, shortest {every.shortest:,}",
        ]
        parts = [head, self._bars()]
        if len(self.sets) > 1:
            parts.append(_table([_set_row(each) for each in self.sets], _SET_HEAD))
        # The longer ones cost nothing either.
        enough = next((each.cutoff_len for each in self.cutoffs if not each.samples), CUTOFFS[-1])
        costs = [each for each in self.cutoffs if each.cutoff_len <= max(enough, self.cutoff_len)]
        parts += [self._rows(), _table([_cutoff_row(each, every.tokens) for each in costs], _CUTOFF_HEAD)]
        return [*parts, [f"note: {note}" for note in self.notes]] if self.notes else parts

    def _bars(self) -> list[str]:
        most, total, so_far, lines = max(count for _, count in self.histogram), self.all.samples, 0, []
        for upto, count in self.histogram:
            so_far += count
            bar = "#" * max(round(count / most * _BAR), 1 if count else 0)
            lines.append(f"  up to {upto:>7,} {bar:<{_BAR}} {count:>9,} {so_far / total:>8.2%}")
        return [f"{'tokens of a sample':<{_BAR + 15}} {'samples':>9} {'so far':>8}", *lines]

    def _rows(self) -> list[str]:
        if self.trained is None or self.padded is None:
            return [f"the recipe's cutoff_len: {self.cutoff_len:,}"]
        lines = [f"with the recipe's cutoff_len {self.cutoff_len:,}, to train on: {_counted(self.trained)}"]
        if self.evaluated is not None:
            lines.append(f"to evaluate on: {_counted(self.evaluated)}")
        if self.packed is not None:
            lines.append(
                f"  packed: {self.packed.rows:,} rows of {self.cutoff_len:,} tokens, {self.packed.fill:.2%} full"
            )
        share = f"{1 - self.padded.fill:.1%} padding"
        lines.append(f"  padded in micro-batches of {self.padded.micro_batch:,}: {self.padded.rows:,} rows, {share}")
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
    notes: Sequence[str] = (),
) -> DataStats:
    """Count `whole`, the samples without a cutoff, and what the recipe makes of them."""
    sets = [
        Lengths.of(name, whole, slice(None) if whole.sets is None else whole.sets == number)
        for number, name in enumerate(whole.set_names)
    ]
    lengths = whole.lengths
    longest = (whole.stops - whole.starts).reshape(-1, whole.width).max(1)  # a cutoff holds for each sequence
    return DataStats(
        kind=whole.kind,
        cutoff_len=cutoff_len,
        all=Lengths.of("all", whole),
        sets=sets,
        trained=Lengths.of("train", trained) if trained is not None else None,
        evaluated=Lengths.of("evaluation", evaluated) if evaluated is not None else None,
        packed=packed,
        padded=padded,
        cutoffs=[_cost(whole, longest, cutoff) for cutoff in sorted({*CUTOFFS, cutoff_len})],
        histogram=_histogram(lengths),
        notes=notes,
        lengths=lengths,
    )


def _cost(samples: TokenSamples, longest: np.ndarray, cutoff: int) -> Cutoff:
    """Cut every sequence after `cutoff` tokens; only those that are longer are looked into."""
    (chosen,) = np.nonzero(longest > cutoff)
    (long,) = np.nonzero(samples.stops - samples.starts > cutoff)
    lost = _sums(samples.mask, samples.starts[long] + cutoff, samples.stops[long])
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


def _sums(mask: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Sums of `mask` from each of `starts` to the stop beside it, which lies beyond it."""
    if not len(starts):
        return np.zeros(0, np.int64)
    bounds = np.stack([starts, stops], 1).reshape(-1)
    padded = bounds[:-1] if bounds[-1] == len(mask) else bounds
    if (padded == len(mask)).any():  # samples in another order than their tokens
        return np.array([mask[start:stop].sum() for start, stop in zip(starts, stops, strict=True)], np.int64)
    return np.add.reduceat(mask, padded, dtype=np.int64)[::2]


def _histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Samples by length, in bars up to each power of two."""
    if not len(lengths):
        return [(1, 0)]
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(powers)
    first = int(np.flatnonzero(counts)[0])
    return [(2**power, int(counts[power])) for power in range(first, len(counts))]


_SET_HEAD = ("data set", "samples", "tokens", "50 %", "95 %", "longest", "trained on")
_CUTOFF_HEAD = (
    "cutoff_len",
    "samples longer",
    "tokens beyond",
    "share",
    "trained ones",
    "nothing left",
    "lost if dropped",
)


def _set_row(found: Lengths) -> tuple[str, ...]:
    percent, share = found.percentiles, found.supervised_tokens / max(1, found.tokens)
    counts = (found.samples, found.tokens, percent["50"], percent["95"], found.longest)
    return (found.name, *(f"{count:,}" for count in counts), f"{share:.0%}")


def _cutoff_row(found: Cutoff, total: int) -> tuple[str, ...]:
    counts = (found.supervised_tokens, found.without_target, found.dropped_tokens)
    lost = f"{found.tokens / max(1, total):.2%}"
    return (
        f"{found.cutoff_len:,}",
        f"{found.samples:,}",
        f"{found.tokens:,}",
        lost,
        *(f"{count:,}" for count in counts),
    )


def _table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> list[str]:
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    aligned = ["<", *">" * (len(head) - 1)]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, aligned, widths, strict=True))
        for line in lines
    ]


def _counted(found: Lengths) -> str:
    share = found.supervised_tokens / max(1, found.tokens)
    return f"{found.samples:,} samples, {found.tokens:,} tokens, {found.supervised_tokens:,} trained on ({share:.0%})"
