"""What a streamed run knows of its data before it begins: where they are, what their first rows look like."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtune.contract.errors import DataError, raise_all
from llmtune.data.config import DataConfig, sources
from llmtune.data.formats import LOOKED_AT, Chosen, check_kind, kind_for
from llmtune.data.making import Making, check_bad_rows, one_kind, unique
from llmtune.data.reading import Dataset
from llmtune.data.report import Bad, DataReport, PartReport, SourceReport
from llmtune.data.store import Tokenised
from llmtune.data.streaming.chunks import PieceMaker, RowPiece, TokenPiece
from llmtune.data.streaming.rows import Mixed, RowReader, ShuffledRows, StreamRow
from llmtune.data.tokens import TokenSamples

LOOK_ROWS = 256
"""First rows of each data set that are tokenised before the run, for estimates."""
_COUNT_ROWS = 4096
"""Rows of files that are counted before the run: smaller data sets are known whole."""
_EDGE_BYTES = 1 << 16
_CHUNK_PACKS = 64
"""Packs that a chunk's rows are enough for. The last one is half full on average, 0.8 % of 64."""
_CHUNK_STEPS = 32
"""Steps whose rows are a chunk, and sorted by length together, where nothing is packed: the first batch waits for them.
"""
_MOST_CHUNK_ROWS = 4096
_ORDER = 2
"""Counts up when the same stream gives other steps than before."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """Streamed data sets."""

    config: DataConfig
    datasets: Sequence[Dataset]
    limits: Sequence[int | None]
    """Most rows of each data set."""
    held: Sequence[int]
    """First rows of each data set that are evaluated on."""
    maker: PieceMaker
    seed: int
    rows: int | None
    """Rows of an epoch, where the data are so few that they were counted."""
    row_tokens: float
    """Tokens that a row becomes, on average over the first ones."""
    digest: str
    """SHA-256 of names, sizes and edges of the files, of what the first rows show, and of all that tokens depend on
    besides."""

    def shuffled(self, batch: int) -> ShuffledRows:
        """All rows from the beginning, for steps of `batch` units."""
        config = self.config
        readers = [
            RowReader(number, each, held, limit)
            for number, (each, held, limit) in enumerate(zip(self.datasets, self.held, self.limits, strict=True))
        ]
        mixed = Mixed(readers, config.mix_strategy, config.interleave_probs, self.seed)
        return ShuffledRows(
            mixed, buffer_size=config.buffer_size, seed=self.seed, shuffle=not config.disable_shuffling, least=batch
        )

    @property
    def grouped(self) -> bool:
        """Whether rows of similar length meet in a step."""
        config = self.config
        return config.group_by_length and not config.packing and not config.disable_shuffling

    def chunk_rows(self, batch: int, width: int) -> int:
        """Rows that are made into units together, for steps of `batch` units: not more than are worth holding."""
        units, most = _CHUNK_PACKS, _MOST_CHUNK_ROWS
        if not self.config.packing:
            # Few rows make several chunks, or every epoch would have the same steps.
            steps = _CHUNK_STEPS if self.rows is None else min(_CHUNK_STEPS, self.rows // (4 * batch))
            units = most = min(most, batch * max(1, steps))
        fitting = round(units * self.config.cutoff_len * width / max(1.0, self.row_tokens))
        return max(1, min(most, fitting))


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """A stream, its first samples, and what is evaluated on."""

    stream: Stream
    first: TokenSamples
    evaluation: TokenSamples | None
    report: DataReport


def open_stream(make: Making, seed: int) -> Streamed:
    """Look at the first rows of all data sets.

    Raises:
        DataError: something cannot be read or used, or does not go with streaming.
    """
    config, entries = make.config, sources(make.config.dataset)
    raise_all(unstreamable(config))
    datasets = make.find(entries)
    limits = [least(config.row_limit, each.num_samples) for each in datasets]
    held = shares(int(config.val_size), len(datasets), config.interleave_probs)
    looks = [_Look(make, *each) for each in zip(range(len(datasets)), datasets, held, limits, strict=True)]
    reports = [look.report for look in looks]
    maker = PieceMaker(config, make.tokeniser, [look.chosen for look in looks], one_kind("dataset", reports))
    apart, first = (
        _tokenised(maker, reports, [row for look in looks for row in rows(look)], seed)
        for rows in (lambda look: look.held, lambda look: look.train)
    )
    for report in reports:
        check_bad_rows(config, report)
    sizes = [look.rows for look in looks]
    stream = Stream(
        config=config, datasets=datasets, limits=limits, held=held, seed=seed, maker=maker,
        digest=_digest(make, datasets, first.samples),
        rows=None if None in sizes or config.mix_strategy != "concat" else sum(size or 0 for size in sizes),
        row_tokens=first.samples.tokens / max(1, first.read.total()),
    )  # fmt: skip
    losses, ends = first.losses + apart.losses, first.ends + apart.ends
    make.check("dataset", Tokenised(samples=first.samples, sources=reports, losses=losses, ends=ends, bad_rows=Path()))
    names = tuple(unique([each.name for each in datasets]))
    evaluation = replace(apart.samples, set_names=names) if any(held) else None
    if eval_entries := sources(config.eval_dataset, "eval_dataset"):
        whole = make.tokenised("eval_dataset", eval_entries)
        evaluation, losses, reports = whole.samples, losses + whole.losses, [*reports, *whole.sources]
    report = DataReport(
        sources=reports,
        losses=losses,
        cutoff_len=config.cutoff_len,
        train=PartReport.of(first.samples),
        evaluation=PartReport.of(evaluation) if evaluation is not None else None,
        end_of_turn=tuple(make.tokenizer.convert_ids_to_tokens(token) for token, _ in ends.most_common()),
        notes=_notes(stream),
    )
    return Streamed(stream=stream, first=first.samples, evaluation=evaluation, report=report)


class _Look:
    """The first rows of a data set: those that are evaluated on, and some that train."""

    def __init__(self, make: Making, number: int, dataset: Dataset, held: int, limit: int | None) -> None:
        reader = RowReader(number, dataset, 0, limit)
        rows = _taken(reader, held + LOOK_ROWS)
        _taken(reader, _COUNT_ROWS if dataset.hub is None else 0)
        self.rows = reader.taken - held if reader.ended() else None
        """How many there are to train on, where they were counted."""
        if self.rows is not None and self.rows < 1:
            what = f"{len(rows):,} records, and val_size holds {held:,}" if held else "0 records; the file is empty"
            raise DataError(f"{dataset.spelling}: {what}; nothing is left to train on" if held else what)
        self.held, self.train = rows[:held], rows[held:]
        self.report = SourceReport(name=dataset.spelling)
        self.chosen = self._choose(make, dataset, rows[:LOOKED_AT])

    def _choose(self, make: Making, dataset: Dataset, rows: Sequence[StreamRow]) -> Chosen:
        readable = [each.row.data for each in rows if each.row.problem is None]
        if not readable:  # nothing to tell the format by
            self.report.rows = len(rows)
            for each in rows:
                self.report.add_bad(Bad(each.place, "unreadable", each.row.problem or "", None))
            check_bad_rows(make.config, self.report)
        chosen = make.chosen(dataset, readable, make.learns)
        self.report.format, self.report.why, self.report.kind = (
            chosen.name,
            chosen.why,
            kind_for(make.learns, chosen.format.kind),
        )
        check_kind(self.report.kind, make.learns, make.stage, dataset.spelling, make.formats)
        return chosen


def _taken(reader: RowReader, most: int) -> list[StreamRow]:
    rows = []
    while len(rows) < most and not reader.ended():
        rows.append(reader.take())
    return rows


def _tokenised(maker: PieceMaker, reports: Sequence[SourceReport], rows: list[StreamRow], seed: int) -> TokenPiece:
    """Some rows of all data sets, counted in their reports."""
    made = maker(RowPiece(words=(seed,), rows=rows))
    made.account(reports)
    made.samples = replace(made.samples, place=[row.place for row in rows].__getitem__)
    return made


def unstreamable(config: DataConfig, max_steps: int | None = 1, **strategies: str | bool) -> list[DataError]:
    """What of a recipe does not go with data of unknown size, if they are streamed. `strategies` are its keys that may
    name the end of an epoch."""
    sentences = []
    if config.streaming and 0 < config.val_size < 1:
        sentences.append(
            f"val_size: found {config.val_size}, a share of a stream, whose size is not known; allowed are a number of "
            "rows (the first ones), or eval_dataset"
        )
    if config.streaming and config.tokenized_path is not None:
        sentences.append("tokenized_path: streaming keeps no tokens; leave it out, or set streaming: false")
    if config.streaming and config.dataset is None:
        sentences.append("dataset: not given; name a file, a hub:owner/name, or llmtune:quickstart")
    if config.streaming and not max_steps:
        sentences.append("max_steps: not given, but streaming does not know how many rows an epoch has; set max_steps")
    for key in [key for key, value in strategies.items() if config.streaming and value == "epoch"]:
        steps = f"{key.removesuffix('_strategy')}_steps"
        sentences.append(f"{key}: found epoch, whose end streaming does not know; set {key}: steps and {steps}")
    return [DataError(sentence) for sentence in sentences]


def shares(rows: int, sets: int, probabilities: Sequence[float] | None) -> list[int]:
    """How many of `rows` rows to evaluate on come from each data set: alike, or as they are drawn from."""
    parts = [1 / sets] * sets if probabilities is None else list(probabilities)
    counts = [int(rows * part + 1e-9) for part in parts]
    for number in range(rows - sum(counts)):
        counts[number] += 1
    return counts


def least(*limits: int | None) -> int | None:
    """The smallest of some limits, of which None is none."""
    return min((limit for limit in limits if limit is not None), default=None)


def _digest(make: Making, datasets: Sequence[Dataset], first: TokenSamples) -> str:
    content = [
        [each.name, each.format, each.columns, each.tags, describe(each), make.formats.facts(each)] for each in datasets
    ]
    shown = [first.hashed()] if first.media_kinds else []
    facts = json.dumps([_ORDER, make.facts(), content, *shown], sort_keys=True, default=str)
    return hashlib.sha256(facts.encode()).hexdigest()


def describe(dataset: Dataset) -> list[Any]:
    """What tells this data set from another without reading it whole: names, sizes and edges of its files."""
    if dataset.hub is not None:
        return [dataset.hub, dataset.subset, dataset.split, dataset.folder]
    described = []
    for path in dataset.files:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(_EDGE_BYTES))
            file.seek(max(0, size - _EDGE_BYTES))
            digest.update(file.read(_EDGE_BYTES))
        described.append([path.name, size, digest.hexdigest()])
    return described


def _notes(stream: Stream) -> tuple[str, ...]:
    config = stream.config
    order = "in the order of the files" if config.disable_shuffling else f"shuffled {config.buffer_size:,} at a time"
    size = f"{stream.rows:,} in all" if stream.rows is not None else "the numbers above are those of the first rows"
    notes = [f"streaming: rows are read and tokenised while the model trains, {order}; {size}"]
    if any(each.num_samples is not None for each in stream.datasets):
        notes.append("num_samples: streaming takes the first rows of a data set, not drawn ones")
    return tuple(notes)
