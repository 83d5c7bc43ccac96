"""Batches of a streamed run: the same steps as `BatchLoader` gives, of data that are read while the model trains.

A step's batch has as many lanes as it has rows; lane l gives its next unit to every step. A rank has the lanes of its
part of the batch, and tokenises no other rows. Where each lane is, a few numbers, stands in every checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.data.batch_loader import joined
from llmtune.data.batches import Document, collate, split_row, to_device
from llmtune.data.making import check_bad_rows
from llmtune.data.order import deal, split
from llmtune.data.report import Losses, SourceReport
from llmtune.data.streaming.blocks import check_size
from llmtune.data.streaming.cells import Cell, Unit
from llmtune.data.streaming.crew import WorkerPool, processors
from llmtune.data.streaming.supply import Supply
from llmtune.data.units import Units, make_units
from llmtune.distributed.ranks import from_all

if TYPE_CHECKING:
    import torch

    from llmtune.contract.stages import Batch
    from llmtune.data.streaming.stream import Stream
    from llmtune.data.tokens import TokenSamples
    from llmtune.distributed.ranks import Ranks


@dataclass(frozen=True)
class StreamOrder:
    """What is known of the order of a stream."""

    batch: int
    """Units of a step over all ranks."""
    steps_per_epoch: None = None


@dataclass
class _Open:
    """A stream that is being read."""

    crew: WorkerPool
    supply: Supply | None = None
    step: int = 0
    """The step whose units were given last, plus one."""
    units: list[Unit] = field(default_factory=list)
    """Of that step."""


@dataclass(kw_only=True)
class StreamLoader:
    """Batches of a training run. `samples` and `units` are those of the first rows, for estimates."""

    stream: Stream
    samples: TokenSamples
    units: Units
    order: StreamOrder
    ranks: Ranks
    micro_steps: int
    flat: bool
    pad_id: int
    error: Exception | None = None
    """Why this rank has no more data; all ranks learn of it in the step, see `share_of_tokens`."""
    padding: float = 0.0
    reports: list[SourceReport] = field(default_factory=list)
    """What became of the rows that this rank has used."""
    losses: Losses = field(default_factory=Losses)
    quarantine: Path | None = None
    _open: _Open | None = None

    @classmethod
    def make(
        cls, stream: Stream, first: TokenSamples, *, per_device: int, micro_steps: int, ranks: Ranks, flat: bool,
        pad_id: int,
    ) -> StreamLoader:  # fmt: skip
        """DataError if the data are known to have fewer rows than a step."""
        config = stream.config
        units = make_units(
            first, packing=config.packing, neat=config.neat_packing, cutoff_len=config.cutoff_len, seed=0, shuffle=False
        )
        batch = per_device * micro_steps * ranks.batch_ranks
        if stream.rows is not None:
            check_size(stream.rows, batch)
        return cls(
            stream=stream, samples=first, units=units, order=StreamOrder(batch), ranks=ranks, micro_steps=micro_steps,
            flat=flat or units.kind == "pack", pad_id=pad_id,
            reports=[SourceReport(name=found.spelling) for found in stream.found],
        )  # fmt: skip

    def with_rows(self, rows: int, micro_steps: int) -> StreamLoader:
        """The same with `rows` units a step, in `micro_steps` micro-batches on each rank."""
        return replace(self, order=StreamOrder(rows), micro_steps=micro_steps)

    def hire(self) -> None:
        """Start the processes that tokenise; best before this one joins others."""
        if self._open is None:
            count = self.stream.config.preprocessing_num_workers or processors()
            self._open = _Open(WorkerPool(self.stream.maker, count))

    def start(self, first_step: int = 0, cursor: dict[str, Any] | None = None, quarantine: Path | None = None) -> None:
        """Begin to read, at first or where `cursor` says; rows that cannot be used go to the file `quarantine`."""
        self.hire()
        self.quarantine = quarantine or self.quarantine
        assert self._open is not None and self._open.supply is None
        lanes, batch = self.lanes, self.order.batch
        rows = cursor["cell_rows"] if cursor else self.stream.cell_rows(batch, self.samples.width)
        # Enough cells wait to keep all processes busy, however few lanes there are.
        ahead = 1 + -(-2 * (self.stream.config.preprocessing_num_workers or processors()) // max(1, len(lanes)))
        self._open.supply = Supply(
            self.stream.reader(batch, lanes), self._open.crew, lanes, rows, ahead, self._count,
            grouped=self.stream.grouped,
        )  # fmt: skip
        self._open.supply.start(cursor)
        self._open.step = first_step

    def close(self) -> None:
        """Stop reading and end the processes."""
        if self._open is not None:
            if self._open.supply is not None:
                self._open.supply.close()
            self._open.crew.close()
            self._open = None

    def cursor(self) -> dict[str, Any]:
        """Where all ranks' lanes are, in plain numbers. Collective."""
        return merged(from_all(self.own_cursor()))

    def own_cursor(self) -> dict[str, Any]:
        """Where this rank's lanes are."""
        supply = self._supply()
        return {**supply.cursor(), "cell_rows": supply.cell_rows}

    def epoch(self, step: int) -> float:
        """Epochs that were used, told by the first lane; by bytes read until the rows of an epoch are known."""
        return round(self._supply().epoch(self.stream.rows), 4)

    def origin(self, sample: int) -> str:
        """Where a sample of the latest step comes from; `sample` is its row of the stream."""
        for unit in self._open.units if self._open is not None else []:
            for piece in unit.pieces:
                if unit.row(piece.sample) == sample:
                    return unit.cell.samples.origin(piece.sample)
        return f"row {sample} of the stream"

    @cached_property
    def lanes(self) -> list[int]:
        """This rank's lanes, in the order in which its micro-batches have them."""
        mine = split(range(self.order.batch), self.ranks.batch_rank, self.ranks.batch_ranks, self.micro_steps)
        return [lane for micro in mine for lane in micro]

    def step(self, step: int, device: torch.device) -> list[Batch]:
        """This rank's micro-batches of the 0-based optimiser step; always `micro_steps` of them.

        Steps come one after the other; the latest may be asked for again. Where this rank's data fail, its batches are
        empty and `error` is set.
        """
        supply = self._supply()
        assert self._open is not None
        if step == self._open.step and self.error is None:
            try:
                self._open.units = [supply.next(lane, step) for lane in self.lanes]
                self._open.step = step + 1
            except Exception as error:  # raised on all ranks, once the others have met this one
                self.error, self._open.units = error, []
        elif step != self._open.step - 1 and self.error is None:
            raise ValueError(f"step {step} of a stream whose next one is {self._open.step}")
        units = self._open.units
        lengths = np.array([unit.tokens if self.flat else unit.length for unit in units], np.int64)
        order = deal(range(len(units)), lengths, padded=not self.flat, pieces=self.micro_steps)
        micros = split(order, 0, 1, self.micro_steps)
        return [to_device(self.batch([units[at] for at in micro]), device) for micro in micros]

    def batch(self, units: Sequence[Unit]) -> Batch:
        """One micro-batch of these units, on the CPU; this rank's piece of it where rows are split."""
        documents: list[Document] = []
        desirable: list[bool] = []
        for unit in units:
            samples, pieces = unit.cell.samples, unit.pieces
            if unit.cell.units.kind == "row":
                documents.append(joined(samples, pieces))
                continue
            for sample in (piece.sample for piece in pieces):
                parts = samples.sequences(sample)
                weights = samples.weights
                documents += [
                    Document(samples.ids[part], samples.mask[part], None if weights is None else weights[part])
                    for part in parts
                ]
                if samples.labels is not None:
                    desirable += [bool(samples.labels[sample])] * len(parts)
        rows = dict.fromkeys(unit.row(piece.sample) for unit in units for piece in unit.pieces)
        labelled = self.samples.labels is not None
        batch = collate(
            documents, flat=self.flat, pad_id=self.pad_id, sample_ids=tuple(rows), width=self.samples.width,
            desirable=desirable if labelled else None, counts_samples=self.samples.counts_samples,
        )  # fmt: skip
        return split_row(batch, self.ranks)

    def share_of_tokens(self, step: int) -> float:
        """What the tokens of this rank's rows add to the step's, once for a tensor group; NaN where its data failed."""
        if self.error is not None:
            return float("nan")
        assert self._open is not None
        return sum(unit.tokens for unit in self._open.units) / self.ranks.layout.context

    def summary(self) -> str:
        """What became of the rows that all ranks have used. Collective."""
        everyone = dict(from_all((self.ranks.batch_rank, (self.reports, self.losses))))
        losses = sum((each for _, each in everyone.values()), Losses())
        lines = []
        for number, own in enumerate(self.reports):
            whole = SourceReport(name=own.name)
            for reports, _ in everyone.values():
                whole.rows += reports[number].rows
                whole.samples += reports[number].samples
                whole.bad += reports[number].bad
                whole.examples = [*whole.examples, *reports[number].examples][:5]
            lines.append(f"{whole.name}: {whole.rows:,} rows read, {whole.samples:,} samples")
            if whole.bad:
                lines += [f"skipped from {whole.name}: {line}" for line in whole.bad_lines()]
        if losses.no_target:
            lines.append(f"dropped: {losses.no_target:,} samples without a trained token")
        if losses.truncated or losses.too_long:
            lines.append(f"cutoff_len: {losses.truncated:,} samples cut, {losses.too_long:,} left out")
        return "\n".join(lines)

    def _supply(self) -> Supply:
        if self._open is None or self._open.supply is None:
            self.start()
        assert self._open is not None and self._open.supply is not None
        return self._open.supply

    def _count(self, cell: Cell) -> None:
        """Account for a cell that is about to be used. DataError for rows that the recipe does not let pass."""
        for source, count in cell.read.items():
            self.reports[source].rows += count
            self.reports[source].samples += cell.kept[source]
        self.losses += cell.losses
        for source, bad in cell.bad:
            self.reports[source].add_bad(bad.origin, bad.reason, bad.detail)
        for source in {source for source, _ in cell.bad}:
            check_bad_rows(self.stream.config, self.reports[source])
        if cell.bad and self.quarantine is not None:
            lines = [
                json.dumps(
                    {"origin": bad.origin, "reason": bad.reason, "detail": bad.detail, "row": bad.row},
                    ensure_ascii=False, default=str,
                )
                for _, bad in cell.bad
            ]  # fmt: skip
            with self.quarantine.open("ab") as file:  # in one piece, as other ranks write there, too
                file.write("".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))


def merged(cursors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The cursor of all lanes, from those of all ranks."""
    found = [each for each in cursors if each["lanes"]]
    lanes = {number: [number, cell, place] for each in found for number, cell, place in each["lanes"]}
    oldest = min((each["begin"] for each in found), key=lambda begin: begin["first"])
    return {"lanes": [lanes[number] for number in sorted(lanes)], "begin": oldest, "cell_rows": found[0]["cell_rows"]}
