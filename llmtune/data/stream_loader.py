"""Batches of a streamed run, of data that are read and tokenised while the model trains.

The rows of the stream are cut into chunks. Each becomes samples and units as a whole data set would, and a step takes
the units that come next, from the following chunk once one is used up. All ranks know all units, and each tokenises its
share of the rows: where a new chunk begins, they exchange what they made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmtune.contract.errors import DataError
from llmtune.data.batch_loader import BatchLoader, UnitBatches, row_lengths
from llmtune.data.making import check_bad_rows
from llmtune.data.order import grouped
from llmtune.data.report import Losses, SourceReport
from llmtune.data.streaming.chunks import PIECE_ROWS, RowPiece, TokenPiece, in_turn, own_pieces
from llmtune.data.streaming.rows import check_size
from llmtune.data.streaming.steps import Reading, StepUnits, StreamChunk, across
from llmtune.data.tokens import TokenSamples
from llmtune.data.units import make_units
from llmtune.data.workers import Ahead, WorkerPool, rank_workers
from llmtune.distributed.ranks import from_all, together

if TYPE_CHECKING:
    from llmtune.contract.examples import ShownText
    from llmtune.contract.stages import Batch
    from llmtune.data.streaming.stream import Stream
    from llmtune.distributed.ranks import Ranks
    from llmtune.media.processor import MediaProcessor
    from llmtune.media.read import ReadMedia


STEP_TOKENS = 1 << 28
"""Most tokens of a step, at 5 to 9 bytes each on every rank; the largest models are trained with a tenth of that."""
READERS = 4
"""Processes that read media ahead and have a micro-batch each, where the recipe names no number; the same on all ranks,
however many processors they have, as they gather steps together."""
EMPTY_ROWS = 1 << 14
"""Rows that follow each other and may give no sample; more are an error, so that no run looks for data for ever."""


@dataclass(frozen=True)
class StreamOrder:
    """What is known of the order of a stream."""

    batch: int
    """Units of a step over all ranks."""
    steps_per_epoch: None = None


@dataclass(frozen=True, kw_only=True)
class StreamLoader(BatchLoader):
    """Batches of a training run. `samples` and `units` are those of the first rows, for estimates."""

    stream: Stream
    order: StreamOrder  # pyrefly: ignore[bad-override]
    padding: float = 0.0  # pyrefly: ignore[bad-override]
    exchange: Callable[[Any], list[Any]] = from_all
    """A picklable object of every rank, in rank order, from each rank's own."""
    _reading: list[Reading] = field(default_factory=list)
    """Of the stream once it is being read; then one."""

    @classmethod
    def over(
        cls, stream: Stream, first: TokenSamples, *, per_device: int, micro_steps: int, ranks: Ranks, flat: bool,
        pad_id: int, reads: int = 1, media: MediaProcessor | None = None,
    ) -> StreamLoader:  # fmt: skip
        """`per_device` units in each of `micro_steps` micro-batches of a rank. DataError if the data are known to have
        fewer rows than a step. With `media`, which reads what rows show, the media of a step are read while the model
        learns from the step before."""
        units = make_units(first, stream.config, stream.seed)
        batch = per_device * micro_steps * ranks.batch_ranks
        if stream.rows is not None:
            check_size(stream.rows, batch)
        tokens = round(batch * float(units.tokens.mean())) if len(units) else 0
        if tokens > STEP_TOKENS:
            raise DataError(
                f"gradient_accumulation_steps: found {micro_steps:,}, which makes steps of {batch:,} rows, about "
                f"{tokens:,} tokens. A stream holds them in memory, allowed are {STEP_TOKENS:,}; lower it or "
                "per_device_train_batch_size, or set streaming: false"
            )
        return cls(
            stream=stream, samples=first, units=units, order=StreamOrder(batch), ranks=ranks, micro_steps=micro_steps,
            flat=flat or units.kind == "pack", pad_id=pad_id, reads=reads, media=media,
        )  # fmt: skip

    def with_rows(self, rows: int, micro_steps: int) -> StreamLoader:
        """The same with `rows` units a step, in `micro_steps` micro-batches on each rank."""
        return replace(self, order=StreamOrder(rows), micro_steps=micro_steps)

    def start_workers(self) -> None:
        """Start the processes that tokenise; best before this one joins others."""
        if not self._reading:
            count = self.stream.config.preprocessing_num_workers or rank_workers()
            reports = [SourceReport(name=dataset.spelling) for dataset in self.stream.datasets]
            self._reading.append(Reading(pool=WorkerPool(self._worked, count), reports=reports))

    def _worked(self, item: RowPiece | list[ShownText]) -> TokenPiece | ReadMedia:
        """What a process makes: rows tokenised, or the media of a micro-batch read."""
        if isinstance(item, RowPiece):
            return self.stream.maker(item)
        assert self.media is not None
        torch.set_num_threads(1)  # others compute at the same time, and threads of a forked process may hang
        return self.media.read(item)

    def start(self, first_step: int = 0, cursor: dict[str, Any] | None = None, bad_rows: Path | None = None) -> None:
        """Begin to read, at the beginning or where `cursor` says. `bad_rows` is cut back to what it held there."""
        self.start_workers()
        reading = self._reading[0]
        rows = self.stream.shuffled(self.order.batch)
        reading.chunk_rows = self.stream.chunk_rows(self.order.batch, self.samples.width)
        reading.step, reading.bad_rows, reading.entered = first_step, bad_rows, cursor
        if cursor is not None:
            rows.restore(cursor["begin"])
            reading.chunk_rows, reading.bad_bytes = cursor["chunk_rows"], cursor["bad_bytes"]
            reading.reports = [SourceReport.restored(spelt) for spelt in cursor["reports"]]
            reading.losses, reading.bare = Losses(**cursor["losses"]), cursor.get("bare", 0)
        if bad_rows is not None and bad_rows.exists():
            os.truncate(bad_rows, min(bad_rows.stat().st_size, reading.bad_bytes))
        ranks = self.ranks
        pieces = own_pieces(rows.runs(reading.chunk_rows), reading.pool, self.stream.seed, ranks.rank, ranks.size)
        reading.ahead = Ahead(pieces)

    def close(self) -> None:
        """Stop reading and end the processes."""
        for reading in self._reading:
            reading.pool.close()
            if reading.ahead is not None:
                reading.ahead.close()
        self._reading.clear()

    def cursor(self) -> dict[str, Any]:
        """Where the stream is, and what became of its rows so far; the same on all ranks, however many they are."""
        reading = self._started()
        return {
            **self._latest().place,
            "chunk_rows": reading.chunk_rows,
            "reports": [report.as_json() for report in reading.reports],
            "losses": deepcopy(vars(reading.losses)),
            "bare": reading.bare,
            "bad_bytes": reading.bad_bytes,
        }

    def step(self, step: int, device: torch.device) -> list[Batch]:
        """This rank's micro-batches of the 0-based optimiser step; always `micro_steps` of them. Collective.

        Steps come one after the other; the latest may be asked for again. DataError, on all ranks, where the data of
        one of them fail.
        """
        reading = self._started()
        if step == reading.step:
            reading.latest = self._next_step(reading)
            reading.step += 1
        if step != reading.step - 1 or reading.latest is None:
            raise ValueError(f"step {step} of a stream whose next one is {reading.step}")
        latest = reading.latest
        made = partial(latest.batches.batches, latest.units, device, latest.read)
        return together(made) if latest.read else made()

    def tokens(self, step: int) -> int:
        """Tokens (without padding) in the latest step, all ranks."""
        latest = self._latest()
        return int(latest.batches.units.tokens[latest.units].sum())

    def epoch(self, step: int) -> float:
        """Epochs that were used by the latest step; told by bytes until the rows of an epoch are known."""
        latest = self._started().latest
        return latest.epoch if latest is not None else 0.0

    def origin(self, sample: int) -> str:
        """Where a sample of the latest step comes from."""
        return self._latest().batches.samples.origin(sample)

    def summary(self) -> str:
        """What became of the rows that were used."""
        reading, lines = self._started(), []
        for report in reading.reports:
            lines.append(f"{report.name}: {report.rows:,} rows read, {report.samples:,} samples")
            if report.bad:
                lines += [f"skipped from {report.name}: {line}" for line in report.bad_lines()]
        losses = reading.losses
        if losses.no_target:
            lines.append(f"dropped: {losses.no_target:,} samples without a trained token")
        if losses.truncated or losses.too_long:
            lines.append(f"cutoff_len: {losses.truncated:,} samples cut, {losses.too_long:,} left out")
        if reading.bare:
            lines.append(f"neat_packing: {reading.bare:,} rows left out, as no token in them trains")
        return "\n".join(lines)

    def _started(self) -> Reading:
        if not self._reading or self._reading[0].ahead is None:
            self.start()
        return self._reading[0]

    def _latest(self) -> StepUnits:
        latest = self._started().latest
        assert latest is not None, "asked after a step"
        return latest

    def _next_step(self, reading: Reading) -> StepUnits:
        """The next step, whose rows are counted now. Where media are read ahead, those after it are begun."""
        self._gather(reading, 1)
        found = reading.following[0]
        if isinstance(found, Exception):
            raise found
        reading.following.popleft()
        for pieces, bare in found.begun:
            reading.bare += bare
            together(partial(self._count, pieces))
        if self.media is not None:
            busy = self.stream.config.preprocessing_num_workers or READERS
            self._gather(reading, min(len(reading.following) + 2, -(-busy // self.micro_steps)))
        return found

    def _gather(self, reading: Reading, steps: int) -> None:
        """Gather the units of the next `steps`, or as far as none fails. Collective, as a new chunk may begin."""
        following = reading.following
        while len(following) < steps and not (following and isinstance(following[-1], Exception)):
            try:
                following.append(self._gathered())
            except Exception as error:
                following.append(error)

    def _gathered(self) -> StepUnits:
        """The units of the step that comes after those that were gathered."""
        reading, parts, begun, wanted = self._started(), [], [], self.order.batch
        chunk, empty = reading.chunk, 0
        while wanted:
            if chunk is None or reading.used == len(chunk.order):
                chunk, pieces = self._next_chunk(self.order.batch - wanted)
                if not reading.used:  # else it was counted before the run was continued
                    begun.append((pieces, chunk.batches.units.bare))
            units = chunk.order[reading.used : reading.used + wanted]
            reading.used += len(units)
            wanted -= len(units)
            if len(units):
                parts.append((chunk.batches, units))
            empty = 0 if len(units) else empty + len(chunk.made.places)
            if empty >= EMPTY_ROWS:
                raise DataError(
                    f"streaming: {empty:,} rows in a row gave no sample with a token to train on; look at them with "
                    "`llmtune data check`, or raise cutoff_len"
                )
        assert chunk is not None, "a step has units"
        batches, units = across(parts)
        shares = [] if self.media is None else batches.shares(units)
        ended = reading.used == len(chunk.order)
        return StepUnits(
            batches=batches, units=units, begun=begun, epoch=round(chunk.epoch(reading.used, self.stream.rows), 4),
            place={
                "begin": chunk.made.end if ended else chunk.made.begin, "used": 0 if ended else reading.used,
                "filled": 0 if ended else chunk.filled,
            },
            read=[reading.pool.begin(batches.shown(units)) for units, _ in shares],
        )  # fmt: skip

    def _next_chunk(self, filled: int) -> tuple[StreamChunk, list[TokenPiece]]:
        """The next chunk, of which `filled` units of a step were there before, and what all ranks made of its rows.
        Collective."""
        reading = self._started()
        assert reading.ahead is not None
        made = together(reading.ahead.next)
        pieces = in_turn(self.exchange(made.own), reading.pieces)
        reading.pieces += len(pieces)
        cursor, reading.entered = reading.entered, None
        reading.used = cursor["used"] if cursor else 0
        filled = cursor["filled"] if cursor else filled
        samples = TokenSamples.concatenated(
            [piece.samples for piece in pieces], range(0, PIECE_ROWS * len(pieces), PIECE_ROWS),
            place=made.places.__getitem__, counts=self.samples.counts, shows=self.samples.media_kinds,
        )  # fmt: skip
        self._check_media(samples)
        units = make_units(samples, self.stream.config, self.stream.seed)
        batches = UnitBatches(
            samples=samples, units=units, ranks=self.ranks, micro_steps=self.micro_steps, flat=self.flat,
            pad_id=self.pad_id, reads=self.reads, media=self.media,
        )  # fmt: skip
        order = self._order(batches, filled, made.begin)
        reading.chunk = StreamChunk(made=made._replace(own=[]), batches=batches, order=order, filled=filled)
        return reading.chunk, pieces

    def _check_media(self, samples: TokenSamples) -> None:
        """DataError for media of a kind that none of the first rows show, by which packed rows were checked."""
        new = [kind for kind in samples.media_kinds if kind not in self.samples.media_kinds]
        if new and (self.flat or self.units.kind != "sample"):
            raise DataError(
                f"packing: a row shows {' and '.join(new)}, as none of the first rows does that packed rows were "
                "checked by; let one of them come early in the data, or set packing: false"
            )

    def _order(self, chunk: UnitBatches, filled: int, begin: dict[str, Any]) -> np.ndarray:
        """(units,) the order of a chunk's units. Those that fill up the step that was begun stay as they are."""
        units = np.arange(len(chunk.units))
        if not self.stream.grouped:
            return units
        batch, first = self.order.batch, -filled % self.order.batch
        place = (begin["mixed"]["epoch"], begin["before"], begin["used"])
        rng = np.random.default_rng([self.stream.seed, 2**31 + 5, *place])
        lengths = row_lengths(chunk.samples, chunk.units)
        return np.concatenate([units[:first], grouped(units[first:], lengths, batch, rng, len(units) // batch)])

    def _count(self, pieces: Sequence[TokenPiece]) -> None:
        """Account for a chunk that is about to be used. DataError for rows that the recipe does not let pass."""
        reading = self._reading[0]
        bad = [each for piece in pieces for each in piece.bad]
        for piece in pieces:
            piece.account(reading.reports)
            reading.losses += piece.losses
        for source in {source for source, _ in bad}:
            check_bad_rows(self.stream.config, reading.reports[source])
        lines = b"".join(row.json_line() for _, row in bad)
        reading.bad_bytes += len(lines)
        if lines and reading.bad_rows is not None:
            with reading.bad_rows.open("ab") as file:
                file.write(lines)
