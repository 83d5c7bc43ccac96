"""What a streamed run knows of its data before it begins: where they are, what their first rows look like."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import DataError
from llmtune.data.config import DataConfig, sources
from llmtune.data.formats import Chosen, check_kind
from llmtune.data.making import LOOKED_AT, Making, account, check_bad_rows, one_kind, unique
from llmtune.data.reading import Found, find
from llmtune.data.report import DataReport, Losses, PartReport, SourceReport
from llmtune.data.store import Tokenised
from llmtune.data.streaming.blocks import BlockReader
from llmtune.data.streaming.cells import CellMaker, CellRows, Done, joined
from llmtune.data.streaming.mixed import Mixed, RowReader, Spot
from llmtune.data.streaming.picked import pick
from llmtune.data.tokens import TokenSamples

if TYPE_CHECKING:
    from collections.abc import Iterable

LOOK_ROWS = 256
"""First rows of each data set that are tokenised before the run, for estimates."""
_COUNT_ROWS = 4096
"""Rows of files that are counted before the run: smaller data sets are known whole."""
_EDGE_BYTES = 1 << 16
_CELL_ROWS = 64
"""Rows that are tokenised, and sorted by length, together where nothing is packed."""
_CELL_PACKS = 32
"""Packs that rows are enough for where they are packed together: the last one is half full on average, 1.6 % of 32."""
_MOST_CELL_ROWS = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """Streamed data sets."""

    config: DataConfig
    found: Sequence[Found]
    limits: Sequence[int | None]
    """Most rows of each data set."""
    held: Sequence[int]
    """First rows of each data set that are evaluated on."""
    maker: CellMaker
    seed: int
    rows: int | None
    """Rows of an epoch, where the data are so few that they were counted."""
    row_tokens: float
    """Tokens that a row becomes, on average over the first ones."""
    digest: str
    """SHA-256 of names, sizes and edges of the files, and of all that tokens depend on besides."""

    def reader(self, batch: int, lanes: Iterable[int]) -> BlockReader:
        """All rows from the beginning, those of `lanes` of a step's `batch` held."""
        config = self.config
        readers = [
            RowReader(number, each, held, limit)
            for number, (each, held, limit) in enumerate(zip(self.found, self.held, self.limits, strict=True))
        ]
        mixed = Mixed(readers, config.mix_strategy, config.interleave_probs, self.seed)
        return BlockReader(
            mixed, buffer_size=config.buffer_size, seed=self.seed, shuffle=not config.disable_shuffling, batch=batch,
            lanes=lanes,
        )  # fmt: skip

    @property
    def grouped(self) -> bool:
        """Whether rows of similar length meet in a step."""
        config = self.config
        return config.group_by_length and not config.packing and not config.disable_shuffling

    def cell_rows(self, batch: int, width: int) -> int:
        """Rows of a lane that are tokenised, and packed, together: not more than a lane has in an epoch."""
        rows = _CELL_ROWS
        if self.config.packing:
            wanted = _CELL_PACKS * self.config.cutoff_len * width / max(1.0, self.row_tokens)
            rows = min(_MOST_CELL_ROWS, max(1, round(wanted)))
        return rows if self.rows is None else max(1, min(rows, self.rows // batch))


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
    check_keys(config)
    found = [find(entry, make.base_dir, config.dataset_dir) for entry in entries]
    limits = [least(config.row_limit, each.num_samples) for each in found]
    held = shares(int(config.val_size), len(found), config.interleave_probs)
    looks = [_Look(make, each, count, limit) for each, count, limit in zip(found, held, limits, strict=True)]
    kind = one_kind("dataset", [look.report for look in looks])
    maker = CellMaker(config, make.tokeniser, [look.chosen for look in looks], kind)
    apart = _tokenised(maker, looks, [look.held for look in looks])
    parts = _tokenised(maker, looks, [look.train for look in looks])
    for look in looks:
        check_bad_rows(config, look.report)
    first = joined(parts, kind)
    sizes = [look.rows for look in looks]
    stream = Stream(
        config=config, found=found, limits=limits, held=held, seed=seed, maker=maker, digest=_digest(make, found),
        rows=None if None in sizes or config.mix_strategy != "concat" else sum(size or 0 for size in sizes),
        row_tokens=first.tokens / max(1, sum(len(look.train) for look in looks)),
    )  # fmt: skip
    losses = sum((part.packed.losses for part in [*parts, *apart]), Losses())
    ends = sum((part.packed.ends for part in [*parts, *apart]), Counter[int]())
    reports = [look.report for look in looks]
    make.check("dataset", Tokenised(samples=first, sources=reports, losses=losses, ends=ends, bad_rows=Path()))
    names = tuple(unique([each.name for each in found]))
    evaluation = replace(joined(apart, kind), set_names=names) if any(held) else None
    if eval_entries := sources(config.eval_dataset, "eval_dataset"):
        whole = make.tokenised("eval_dataset", eval_entries)
        evaluation, losses, reports = whole.samples, losses + whole.losses, [*reports, *whole.sources]
    report = DataReport(
        sources=reports,
        losses=losses,
        cutoff_len=config.cutoff_len,
        train=PartReport.of(first),
        evaluation=PartReport.of(evaluation) if evaluation is not None else None,
        end_of_turn=tuple(make.tokenizer.convert_ids_to_tokens(token) for token, _ in ends.most_common()),
        notes=_notes(stream),
    )
    return Streamed(stream=stream, first=first, evaluation=evaluation, report=report)


class _Look:
    """The first rows of a data set: those that are evaluated on, and some that train."""

    def __init__(self, make: Making, found: Found, held: int, limit: int | None) -> None:
        reader = RowReader(0, found, 0, limit)
        rows = _taken(reader, held + LOOK_ROWS)
        for _ in range(_COUNT_ROWS if found.hub is None else 0):
            if reader.ended():
                break
            reader.take()
        self.rows = reader.taken - held if reader.ended() else None
        """How many there are to train on, where they were counted."""
        if self.rows is not None and self.rows < 1:
            what = f"{len(rows):,} records, and val_size holds {held:,}" if held else "0 records; the file is empty"
            raise DataError(f"{found.spelling}: {what}; nothing is left to train on" if held else what)
        self.held, self.train = rows[:held], rows[held:]
        self.report = SourceReport(name=found.spelling)
        self.chosen = self._choose(make, found, rows[:LOOKED_AT])

    def _choose(self, make: Making, found: Found, rows: Sequence[tuple[Spot, int]]) -> Chosen:
        parsed = [(part.rows.origin, row) for part in _parts(0, rows, 0) for row in part.rows.rows()]
        readable = [row.data for _, row in parsed if row.problem is None]
        if not readable:  # nothing to tell the format by
            self.report.rows = len(parsed)
            for origin, row in parsed:
                self.report.add_bad(f"{origin}{row.number}", "unreadable", row.problem or "")
            check_bad_rows(make.config, self.report)
        chosen = make.formats.of(found, readable)
        self.report.format, self.report.why, self.report.kind = chosen.name, chosen.why, chosen.format.kind
        check_kind(chosen.format.kind, make.learns, make.stage, found.spelling)
        return chosen


def _taken(reader: RowReader, most: int) -> list[tuple[Spot, int]]:
    rows = []
    while len(rows) < most and not reader.ended():
        rows.append(reader.take())
    return rows


def _tokenised(maker: CellMaker, looks: Sequence[_Look], rows: Sequence[Sequence[tuple[Spot, int]]]) -> list[Done]:
    """Some rows of each data set, counted in its report."""
    done: list[Done] = []
    at = 0
    for number, (look, chosen) in enumerate(zip(looks, rows, strict=True)):
        parts = [maker.tokenised(part) for part in _parts(number, chosen, at)]
        at += len(chosen)
        done += parts
        for part in parts:
            account(look.report, part.packed)
    return done


def _parts(source: int, rows: Sequence[tuple[Spot, int]], first: int) -> list[CellRows]:
    """Rows by the chunks they are of, counted from `first`."""
    wanted: dict[int, tuple[Spot, list[int], list[int]]] = {}
    for at, (spot, place) in enumerate(rows, start=first):
        _, places, order = wanted.setdefault(id(spot), (spot, [], []))
        places.append(place)
        order.append(at)
    return [CellRows(source, pick(spot.chunk, places), order) for spot, places, order in wanted.values()]


def check_keys(config: DataConfig) -> None:
    """DataError for keys that do not go with streaming."""
    if 0 < config.val_size < 1:
        raise DataError(
            f"val_size: found {config.val_size}, a share of a stream, whose size is not known; allowed are a number of "
            "rows (the first ones), or eval_dataset"
        )
    if config.tokenized_path is not None:
        raise DataError("tokenized_path: streaming keeps no tokens; leave it out, or set streaming: false")
    if config.dataset is None:
        raise DataError("dataset: not given; name a file, a hub:owner/name, or llmtune:quickstart")


def shares(rows: int, sets: int, probabilities: Sequence[float] | None) -> list[int]:
    """How many of `rows` rows to evaluate on come from each data set: alike, or as they are drawn from."""
    parts = [1 / sets] * sets if probabilities is None else list(probabilities)
    found = [int(rows * part + 1e-9) for part in parts]
    for number in range(rows - sum(found)):
        found[number] += 1
    return found


def least(*limits: int | None) -> int | None:
    """The smallest of some limits, of which None is none."""
    return min((limit for limit in limits if limit is not None), default=None)


def _digest(make: Making, found: Sequence[Found]) -> str:
    content = [[each.name, each.format, each.columns, each.tags, describe(each)] for each in found]
    facts = json.dumps([make.facts(), content], sort_keys=True, default=str)
    return hashlib.sha256(facts.encode()).hexdigest()


def describe(found: Found) -> list[Any]:
    """What tells this data set from another without reading it whole: names, sizes and edges of its files."""
    if found.hub is not None:
        return [found.hub, found.subset, found.split, found.folder]
    described = []
    for path in found.files:
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
    if any(each.num_samples is not None for each in stream.found):
        notes.append("num_samples: streaming takes the first rows of a data set, not drawn ones")
    return tuple(notes)
