"""Which rows make up an optimiser step, and their batches on this rank. A pure function of the step number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch

from llmtune.data.batches import collate, split_row, to_device
from llmtune.data.order import Order, cut, deal, padding_share, split
from llmtune.data.sequence import TokenSequence
from llmtune.data.tokens import shown_in, told_columns
from llmtune.data.units import SampleSlice, Units, make_units
from llmtune.distributed.ranks import together
from llmtune.media.read import ShownTokens

if TYPE_CHECKING:
    from pathlib import Path

    from llmtune.contract.examples import ShownText
    from llmtune.contract.stages import Batch
    from llmtune.data.config import DataConfig
    from llmtune.data.tokens import TokenSamples
    from llmtune.distributed.ranks import Ranks
    from llmtune.media.processor import MediaProcessor
    from llmtune.media.read import ReadMedia, TokenLayout


@dataclass(frozen=True, kw_only=True)
class UnitBatches:
    """Units of some samples (whole samples, packs of them, or rows), and how they become batches."""

    samples: TokenSamples
    units: Units
    ranks: Ranks
    micro_steps: int
    flat: bool
    pad_id: int
    media: MediaProcessor | None = None
    """What reads what samples show; None where the model reads text only, or samples are prompts, which are read when
    they are answered."""
    reads: int = 1
    """Parts of a step that are dealt apart, so that micro-batches of one part have the same units however it is split:
    an update of a stage that `RollsOut` learns from one part."""

    def batches(
        self, units: Sequence[int], device: torch.device, read: Sequence[Callable[[], ReadMedia]] = ()
    ) -> list[Batch]:
        """This rank's micro-batches of the units of a step; `read` gives what was read of the media of each, if it was
        read before."""
        shares = self.shares(units)
        made = [each() for each in read] or [None] * len(shares)
        return [to_device(self.batch(*share, read=each), device) for share, each in zip(shares, made, strict=True)]

    def shown(self, units: Sequence[int]) -> list[ShownText]:
        """What is read of the media of a micro-batch of these units."""
        chosen = [piece.sample for unit in units for piece in self.units.pieces(unit)]
        return ShownRows.of(self.samples, [self.samples.row(sample) for sample in chosen], self.media).all

    def shares(self, units: Sequence[int]) -> list[tuple[list[int], Mapping[int, int]]]:
        """The units of each of this rank's micro-batches of a step, and the `other_answers` of the step."""
        micro_steps, ranks = self.micro_steps // self.reads, self.ranks.batch_ranks
        others = other_answers(self.samples, [sample for unit in units for sample in self.units[unit]])
        mine: list[Any] = []
        for part in cut(units, self.reads):
            part = deal(part, self._lengths, padded=not self.flat, pieces=micro_steps * ranks)
            mine += split(part, self.ranks.batch_rank, ranks, micro_steps)
        return [(list(units), others) for units in mine]

    def batch(
        self, units: Sequence[int], others: Mapping[int, int] | None = None, read: ReadMedia | None = None
    ) -> Batch:
        """One micro-batch of these units, on the CPU; this rank's piece of it where rows are split. `others` are the
        `other_answers` of a step, those of the batch alone if None."""
        pieces = [self.units.pieces(unit) for unit in units]
        if self.units.kind == "row":
            documents = [joined(self.samples, unit) for unit in pieces]
            numbers = dict.fromkeys(piece.sample for unit in pieces for piece in unit)
            return split_row(
                collate(documents, flat=self.flat, pad_id=self.pad_id, sample_ids=tuple(numbers)), self.ranks
            )
        chosen = [piece.sample for unit in pieces for piece in unit]
        others = other_answers(self.samples, chosen) if others is None else others
        return sample_batch(
            self.samples,
            chosen,
            flat=self.flat,
            pad_id=self.pad_id,
            ranks=self.ranks,
            others=others,
            media=self.media,
            read=read,
        )

    def origin(self, sample: int) -> str:
        """Where a sample of a batch comes from."""
        return self.samples.origin(sample)

    @cached_property
    def _lengths(self) -> np.ndarray:
        return row_lengths(self.samples, self.units) if not self.flat else self.units.tokens


@dataclass(frozen=True, kw_only=True)
class BatchLoader(UnitBatches):
    """Batches of a training run."""

    order: Order
    """The order in which the units train."""

    @classmethod
    def make(
        cls, samples: TokenSamples, config: DataConfig, *, per_device: int, micro_steps: int, ranks: Ranks, seed: int,
        flat: bool, pad_id: int, reads: int = 1, media: MediaProcessor | None = None, **more: Any,
    ) -> Self:  # fmt: skip
        """`per_device` units in each of `micro_steps` micro-batches of a rank."""
        units = make_units(samples, config, seed)
        # Whatever the layout: a kernel that needs no padding must not change which rows meet in a step.
        lengths = row_lengths(samples, units) if config.group_by_length and units.kind == "sample" else None
        batch = per_device * micro_steps * ranks.batch_ranks
        return cls(
            samples=samples, units=units, order=Order(len(units), batch, seed, not config.disable_shuffling, lengths),
            ranks=ranks, micro_steps=micro_steps, flat=flat or units.kind == "pack", pad_id=pad_id, reads=reads,
            media=media, **more,
        )  # fmt: skip

    def with_rows(self, rows: int, micro_steps: int) -> BatchLoader:
        """The same with `rows` units a step, in `micro_steps` micro-batches on each rank, but no more than there are
        units: the others would be empty."""
        most = max(1, len(self.units) // self.reads) * self.reads
        return replace(self, order=self.order.with_batch(rows), micro_steps=min(micro_steps, most))

    def start_workers(self) -> None:
        """Nothing to do: all data were tokenised before. A stream starts its processes here."""

    def start(self, first_step: int = 0, cursor: dict[str, Any] | None = None, bad_rows: Path | None = None) -> None:
        """Nothing to do, as the number of a step says where a run goes on. A stream needs the `cursor` of the
        checkpoint, and the file that rows which cannot be used are appended to."""

    def cursor(self) -> dict[str, Any] | None:
        """What a run must know to go on besides the number of the step, in plain numbers and texts."""
        return None

    def summary(self) -> str:
        """What became of data that were read during the run."""
        return ""

    def close(self) -> None:
        """Nothing to do: no data are being read."""

    def step(self, step: int, device: torch.device) -> list[Batch]:
        """This rank's micro-batches of the 0-based optimiser step; always `micro_steps` of them."""
        return self.batches(self.order.step_units(step), device)

    def tokens(self, step: int) -> int:
        """Tokens (without padding) in the whole optimiser step, all ranks."""
        return int(self.units.tokens[self.order.step_units(step)].sum())

    def share_of_tokens(self, step: int) -> float:
        """What this rank adds to the step's tokens, where a tensor group counts once."""
        return self.tokens(step) * self.ranks.dims.tensor / self.ranks.size

    def epoch(self, step: int) -> float:
        """Epochs that are done after `step` steps."""
        return round(step / self.order.steps_per_epoch, 4)

    @property
    def padding(self) -> float:
        """Share of padding in an epoch's micro-batches."""
        if self.flat:
            return 0.0
        return padding_share(self._lengths, self.order, self.micro_steps * self.ranks.batch_ranks)


def row_lengths(samples: TokenSamples, units: Units) -> np.ndarray:
    """(units,) tokens of the padded row, or of the longer of two, that a unit needs."""
    if units.kind != "sample" or samples.width == 1:
        return units.tokens
    return (samples.stops - samples.starts).reshape(-1, samples.width).max(1)


def other_answers(samples: TokenSamples, order: Sequence[int]) -> dict[int, int]:
    """For each of some labelled samples another one, whose answer it is paired with: the next in `order`, and where
    that has one sample alone, the next of all. None of samples that are not labelled."""
    if samples.labels is None:
        return {}
    following = zip(order, [*order[1:], *order[:1]], strict=True)
    return {one: other if other != one else (one + 1) % len(samples) for one, other in following}


class Crossed(NamedTuple):
    """The prompt of one sample with the answer of another."""

    sequence: TokenSequence
    asked: int
    """Tokens of the prompt."""


def mismatched(samples: TokenSamples, sample: int, other: int) -> Crossed:
    """The prompt of one sample with the answer of another, cut to the length of the longest sample."""
    (own,), (theirs,) = samples.sequences(sample), samples.sequences(other)
    asked = int(np.argmax(samples.mask[own]))
    answer = slice(theirs.start + int(np.argmax(samples.mask[theirs])), theirs.stop)
    ids = np.concatenate([samples.ids[own.start : own.start + asked], samples.ids[answer]])[: samples.longest]
    mask = np.concatenate([np.zeros(asked, bool), samples.mask[answer]])[: samples.longest]
    return Crossed(TokenSequence(ids, mask), asked)


class ShownRows(NamedTuple):
    """What the sequences of a batch show; nothing where none of the data shows any media."""

    own: Sequence[ShownText] = ()
    """What each sequence shows."""
    blank: Sequence[ShownTokens] = ()
    """Documents with blank media that the batch has at its end."""

    @staticmethod
    def of(samples: TokenSamples, columns: Sequence[Mapping[str, Any]], media: MediaProcessor | None) -> ShownRows:
        """Of the samples of these `columns`, out of `samples`."""
        if media is None or not samples.media_kinds:
            return ShownRows()
        own = [each for row in columns for each in shown_in(row, samples.width)]
        return ShownRows(own, media.fillers(samples.media_kinds, own))

    @property
    def all(self) -> list[ShownText]:
        """What is read of them."""
        return [*self.own, *(each.shown for each in self.blank)]


def precomputed_for(samples: TokenSamples, chosen: Sequence[int]) -> dict[str, torch.Tensor]:
    """(sequences,) each, what was computed of the chosen samples before training."""
    spots = [sample * samples.width + part for sample in chosen for part in range(samples.width)]
    return {name: torch.tensor(values[spots]) for name, values in samples.precomputed.items()}


def sample_batch(
    samples: TokenSamples, chosen: Sequence[int], *, flat: bool, pad_id: int, ranks: Ranks,
    others: Mapping[int, int] = MappingProxyType({}), media: MediaProcessor | None = None,
    read: ReadMedia | None = None,
) -> Batch:  # fmt: skip
    """Whole samples as one batch; this rank's piece of it where rows are split. Labelled ones come with each prompt's
    `mismatched` answer. `read` is what was read of their `ShownRows` before; None reads it now."""
    ids, mask, weights, labels = samples.ids, samples.mask, samples.weights, samples.labels
    parts = [part for sample in chosen for part in samples.sequences(sample)]
    kept = [] if samples.columns is None else [samples.row(sample) for sample in chosen]
    shown = ShownRows.of(samples, kept, media)
    fillers = [TokenSequence(each.ids, np.zeros(len(each.ids), bool)) for each in shown.blank]
    layout: dict[str, Any] = {"flat": flat, "pad_id": pad_id, "fillers": fillers}
    batch = collate(
        [TokenSequence(ids[part], mask[part], None if weights is None else weights[part]) for part in parts],
        sample_ids=chosen,
        width=samples.width,
        desirable=None if labels is None else [bool(labels[sample]) for sample in chosen for _ in range(samples.width)],
        counts_samples=samples.counts_samples,
        **layout,
    )
    batch.columns = tuple(told_columns(row, samples.media_kinds) for row in kept)
    if samples.media_kinds:
        batch.shown = tuple(each for row in kept for each in shown_in(row, samples.width))
    batch.extra = precomputed_for(samples, chosen)
    crossed = [] if labels is None else [mismatched(samples, sample, others[sample]) for sample in chosen]
    if labels is not None:
        batch.mismatched = collate([each.sequence for each in crossed], counts_samples=True, **layout)
    if media is not None and shown.all:
        read = media.read(shown.all) if read is None else read
        rows_as: TokenLayout = "flat" if flat else "padded"
        own = map(ShownTokens, (ids[part] for part in parts), shown.own)
        batch.media = read.tensors([*own, *shown.blank], rows_as)
        if batch.mismatched is not None:  # the same media, before other answers
            own = (
                ShownTokens(each.sequence.ids, its, each.asked) for each, its in zip(crossed, shown.own, strict=True)
            )
            batch.mismatched.media = read.tensors([*own, *shown.blank], rows_as)
    return split_row(batch, ranks)


def joined(samples: TokenSamples, pieces: Sequence[SampleSlice]) -> TokenSequence:
    """Consecutive tokens of several samples as one document.

    Where all of a sample trains, as of plain text, so does its first token: something stands before it here.
    """
    ids, masks, weights = [], [], []
    for number, first, stop in pieces:
        (whole,) = samples.sequences(number)
        part = slice(whole.start + first, whole.start + stop if stop is not None else whole.stop)
        mask = np.array(samples.mask[part])
        mask[:1] |= not first and int(samples.trained[number]) == whole.stop - whole.start - 1
        ids.append(samples.ids[part])
        masks.append(mask)
        if samples.weights is not None:
            weight = np.array(samples.weights[part])
            if not first and len(weight) > 1:
                weight[0] = weight[1]
            weights.append(weight)
    return TokenSequence(np.concatenate(ids), np.concatenate(masks), np.concatenate(weights) if weights else None)


def evaluation_batches(
    samples: TokenSamples,
    *,
    per_device: int,
    ranks: Ranks,
    flat: bool,
    pad_id: int,
    device: torch.device,
    chosen: np.ndarray | None = None,
    media: MediaProcessor | None = None,
) -> Iterator[Batch]:
    """Every one of the `chosen` samples (all, if None) once, over all ranks, each seen alone; each rank gets the same
    number of batches, the last ones maybe empty. Longest first, so that little is padded. Collective where rows show
    media: all ranks raise what one of them meets in a file."""
    order = np.arange(len(samples)) if chosen is None else chosen
    order = order[np.argsort(-samples.lengths[order], kind="stable")].tolist()
    others = other_answers(samples, order)
    for start in range(0, len(order), per_device * ranks.batch_ranks):
        first = start + ranks.batch_rank * per_device
        part = order[first : first + per_device]
        make = partial(sample_batch, samples, part, flat=flat, pad_id=pad_id, ranks=ranks, others=others, media=media)
        yield to_device(make() if media is None else together(make), device)
