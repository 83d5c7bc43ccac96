"""The data sets of a recipe become a store of samples: found in the cache, or made now by several processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llmtune.contract.errors import DataError, listed
from llmtune.data.cache import CODE, Place, key_of
from llmtune.data.config import DataConfig, Source
from llmtune.data.formats import LOOKED_AT, Chosen, Formats, answers_prompts, check_kind, kind_for
from llmtune.data.hashes import own_code_hash
from llmtune.data.piece import Packed
from llmtune.data.reading import Chunk, Dataset, HubAccess, chunks, content_key, find, first_rows, separated
from llmtune.data.report import SHOWN, Bad, SourceReport
from llmtune.data.store import StoreWriter, Tokenised, read_about
from llmtune.data.template import missing_tokens
from llmtune.data.tokenise import Tokeniser
from llmtune.data.tokens import TokenSamples
from llmtune.data.tool_format import read_tool_format
from llmtune.data.workers import in_order, progress
from llmtune.folders import cache_root
from llmtune.media.files import MediaFiles
from llmtune.media.processor import MediaProcessor

VERSION = 2
"""Counts up when the same data and keys give other tokens than before, which tests/test_data_version.py notices. A
folder in `tokenized_path` is used as long as it stays."""
LIKE_CONVERSATIONS = {"text": "conversation", "tokens": "conversation"}
"""Kinds whose samples are like those of another: tokens, some of which train."""
_MOST_WITHOUT_TARGET = 0.01
"""Share of samples that may lack trained tokens before it is an error."""
_ALWAYS_SKIPPED = 10
"""Bad rows that `on_bad_record: skip` leaves out however few rows there are."""
_KEYS = (
    "default_system", "cutoff_len", "cutoff_policy", "max_samples", "train_on_prompt", "mask_history",
    "split_special_tokens", "on_bad_record", "max_bad_records", "template_kwargs", "enable_thinking",
)  # fmt: skip
"""Keys that decide which tokens a row becomes."""


@dataclass(frozen=True)
class Making:
    """How rows become tokens in one run."""

    config: DataConfig
    tokenizer: Any
    base_dir: Path
    formats: Formats
    learns: tuple[str, ...]
    stage: str
    seed: int
    writes: bool = True
    """Whether `tokenized_path` may be written to."""
    access: HubAccess | None = None
    media: MediaProcessor | None = None
    """The model's processor of media; None where it reads text only."""

    @cached_property
    def tokeniser(self) -> Tokeniser:
        tool_format = read_tool_format(self.config.tool_format, self.base_dir)
        return Tokeniser(
            self.config, self.tokenizer, tool_format, prompts=answers_prompts(self.learns), media=self.media
        )

    def find(self, entries: Sequence[Source]) -> list[Dataset]:
        """The data sets, wherever they are. Raises DataError where one is not."""
        return [find(entry, self.base_dir, self.config.dataset_dir, self.access) for entry in entries]

    def chosen(self, dataset: Dataset, rows: Sequence[Any], learns: Sequence[str]) -> Chosen:
        """The format of a data set whose first readable rows are `rows`, and where its media are."""
        chosen = self.formats.of(dataset, rows, learns)
        return replace(chosen, media=None if self.media is None else self._files_of(dataset))

    def _files_of(self, dataset: Dataset) -> MediaFiles:
        return media_files(self.config, self.base_dir, dataset)

    def tokenised(self, key: str, entries: Sequence[Source]) -> Tokenised:
        """The data sets of one key, from the cache or made now."""
        config, chosen = self.config, self.config.tokenized_path
        at = self.base_dir / Path(chosen).expanduser() / key if chosen else None
        kept = read_about(at) if at is not None else None
        try:
            datasets = self.find(entries)
            if not datasets:
                raise DataError(f"{key}: not given, and tokenized_path {config.tokenized_path} holds no tokenised data")
            content = [self._content(each) for each in datasets]
        except DataError:
            if kept is None:
                raise
            datasets, content = [], kept["facts"]["data"]  # tokenised elsewhere; the files need not be here
        result = self._place({**self.facts(), CODE: own_code_hash(), "data": content}, at, bool(datasets)).get(
            partial(self._fill, key, datasets)
        )
        for source in result.sources:
            check_kind(source.kind, self.learns, self.stage, source.name, self.formats)
        self.check(key, result)
        # Data that was tokenised elsewhere takes as many rows as were asked for there.
        counts = [each.num_samples for each in datasets or result.sources]
        return replace(result, samples=pick(result.samples, counts, self.seed))

    def _place(self, facts: dict[str, Any], chosen: Path | None, anew: bool) -> Place:
        """Where the tokens are kept: in the folder that the recipe has `chosen`, else in the cache. Who only looks
        leaves the recipe's folder as it is. Only where they can be made `anew` may they be overwritten."""
        config = self.config
        folder, overwrite = cache_root() / "data" / key_of(facts), config.overwrite_cache and anew
        place = Place(
            folder=folder, facts=facts, chosen=False, shared=config.data_shared_file_system, overwrite=overwrite
        )
        if chosen is None:
            return place
        own = replace(place, folder=chosen, chosen=True, copy_of=place)
        own.check_ours()
        return own if self.writes or own.has() else place

    def _content(self, dataset: Dataset) -> dict[str, Any]:
        files = [str(path) for path in dataset.files]
        named = {"format": dataset.format, "columns": dataset.columns, "tags": dataset.tags, "ranking": dataset.ranking}
        return {
            "content": content_key(dataset),
            "by": self.formats.facts(dataset),
            "name": dataset.name,
            "files": files,
            "hub": dataset.hub,
            **named,
            **({} if self.media is None else {"media_dir": str(self._files_of(dataset).folder)}),
        }

    def facts(self) -> dict[str, Any]:
        """What tokens depend on, besides the data."""
        config, tokenizer = self.config, self.tokenizer
        template = tokenizer.chat_template
        dated = "strftime_now" in str(template)
        spelled = (type(tokenizer).__name__, tokenizer.special_tokens_map, tokenizer.backend_tokenizer.to_str())
        from datetime import date

        return {
            "version": VERSION,
            "tokenizer": hashlib.sha256(" ".join(map(str, spelled)).encode()).hexdigest(),
            "template": template,
            "tool_format": self.tokeniser.renderer.tool_format,
            "concatenated": self.tokeniser.cutoff is None,
            "prompts": self.tokeniser.prompts,
            "day": date.today().isoformat() if dated else None,
            "media": None if self.media is None else self.media.facts(),
            **{key: vars(config)[key] for key in _KEYS},
        }

    def _fill(self, key: str, datasets: Sequence[Dataset], writer: StoreWriter) -> None:
        """Tokenise all data sets into a new store."""
        reports = []
        for number, each in enumerate(datasets):
            report = SourceReport(name=each.spelling, num_samples=each.num_samples)
            with progress(f"Tokenising {each.name}", " rows") as bar:
                for piece in self._pieces(each, report):
                    account(report, piece)
                    writer.add(piece, number)
                    bar.update(piece.read)
            if not report.rows:
                raise DataError(f"{each.spelling}: 0 records; the file is empty")
            check_bad_rows(self.config, report)
            reports.append(report)
        writer.kind = one_kind(key, reports)
        writer.finish(reports, unique([each.name for each in datasets]))

    def _pieces(self, dataset: Dataset, report: SourceReport) -> Iterator[Packed]:
        first = list(islice(self._chunks(dataset), 1))
        rows = [row for chunk in first for row in islice(chunk.rows(), LOOKED_AT)]
        if not (readable := [row.data for row in rows if row.problem is None]):
            if rows:  # nothing to tell the format by: these rows are reported, no more are read
                for row in rows:
                    report.rows += 1
                    report.add_bad(Bad(f"{first[0].origin}{row.number}", "unreadable", row.problem or "", None))
            return
        chosen = self.chosen(dataset, readable, self.learns)
        report.format, report.kind = chosen.name, kind_for(self.learns, chosen.format.kind)
        report.why = chosen.why + separated(dataset)
        check_kind(report.kind, self.learns, self.stage, dataset.spelling, self.formats)
        config = self.config
        work = partial(self._encode, chosen)
        yield from in_order(work, self._chunks(dataset), config.preprocessing_num_workers)

    def _encode(self, chosen: Chosen, chunk: Chunk) -> Packed:
        return self.tokeniser.encode(chosen, chunk.rows(), chunk.origin).packed()

    def _chunks(self, dataset: Dataset) -> Iterator[Chunk]:
        """Rows in the sizes that processes take them, `max_samples` of them at most."""
        size, limit = self.config.preprocessing_batch_size, self.config.row_limit
        return first_rows(chunks(dataset, rows=min(size, limit or size)), limit)

    def check(self, key: str, found: Tokenised) -> None:
        """Enough of the samples train, and they teach the model to stop."""
        lost, kept = found.losses, len(found.samples)
        too_many = self.config.on_bad_record == "error" and lost.no_target > _MOST_WITHOUT_TARGET * (
            lost.no_target + kept
        )
        if not kept or too_many:
            self._refuse(key, found)
        chats = any(source.kind in ("conversation", "preference", "labelled") for source in found.sources)
        if chats and not self.config.train_on_prompt and not found.ends:
            template = self.config.template
            name = f'template "{template}"' if template else "the tokenizer's chat template"
            lacking = listed(missing_tokens(self.tokenizer), 8)
            fix = f"add {lacking} with new_special_tokens, or choose" if lacking else "choose"
            other = "alpaca" if self.media is None else "llava"
            raise DataError(
                f"template: {name} trains no end-of-turn token: no trained turn ends in one of the tokenizer's special "
                f"tokens (its eos is {self.tokenizer.eos_token!r}); {fix} a template that writes one this tokenizer "
                f"has, such as `template: {other}`, or put it inside the template's generation block"
            )

    def _refuse(self, key: str, found: Tokenised) -> None:
        lost, kept, config = found.losses, len(found.samples), self.config
        if not kept and not lost.no_target and lost.too_long:
            uncut = config.cutoff_policy == "truncate"  # pairs, prompts and what shows pictures are never cut
            fix = ", as such samples are never cut" if uncut else ", or set cutoff_policy: truncate"
            raise DataError(
                f"{key}: all {lost.too_long:,} samples are longer than cutoff_len={config.cutoff_len}; raise it{fix}"
            )
        where = listed(lost.no_target_origins, SHOWN)
        causes = f"cutoff_len={config.cutoff_len} cut {lost.truncated:,} samples"
        skip = ", or set `on_bad_record: skip` to go on without them" if kept else ""
        raise DataError(
            f"{key}: {lost.no_target:,} of {lost.no_target + kept:,} samples have no token to train on (first: "
            f"{where}); {causes}. Raise cutoff_len, leave long ones out (cutoff_policy: drop), or check that the "
            f"template marks the assistant's turns{skip}"
        )


def media_files(config: DataConfig, base_dir: Path, dataset: Dataset) -> MediaFiles:
    """Where the media of a data set's rows are."""
    own = dataset.files[0].parent if dataset.files else base_dir
    return MediaFiles(folder=media_folder(config, base_dir) or own, fetches=config.media_from_network)


def media_folder(config: DataConfig, base_dir: Path) -> Path | None:
    """The folder of all media, where the recipe names one; None: that of each data set."""
    return None if config.media_dir is None else (base_dir / Path(config.media_dir).expanduser()).resolve()


def check_bad_rows(config: DataConfig, report: SourceReport) -> None:
    """DataError if a data set has more rows that cannot be used than the recipe lets pass."""
    bad = report.bad.total()
    if not bad:
        return
    first, *rest = report.bad_lines()
    lines = "\n".join([f"{report.name}: cannot use {first}", *rest])
    if config.on_bad_record == "error" or bad == report.rows:
        raise DataError(f"{lines}\nMend them" + (", or set `on_bad_record: skip`" if bad < report.rows else ""))
    most = config.max_bad_records
    allowed = max(_ALWAYS_SKIPPED, int(most * report.rows)) if most < 1 else int(most)
    if bad > allowed:
        raise DataError(
            f"{lines}\nThat is more than max_bad_records={most} lets `on_bad_record: skip` leave out ({allowed:,}); "
            "mend them, or raise max_bad_records"
        )


def one_kind(key: str, reports: Sequence[SourceReport]) -> str:
    """What the samples of all data sets are; DataError if some are pairs, say, and some are not."""
    kinds = {LIKE_CONVERSATIONS.get(report.kind, report.kind): report for report in reports if report.kind}
    if len(kinds) > 1:
        said = ", ".join(f"{report.name} holds {report.kind} rows" for report in kinds.values())
        raise DataError(f"{key}: {said}; one run learns from one kind, name only those")
    return next(iter(kinds), "conversation")


def account(report: SourceReport, piece: Packed) -> None:
    """Count what became of some rows of a data set."""
    report.rows += piece.read
    report.samples += len(piece.rows)
    for bad in piece.bad:
        report.add_bad(bad)


def unique(names: Sequence[str]) -> list[str]:
    """Each name once; those that come again get a number."""
    found: list[str] = []
    for name in names:
        again = sum(other == name or other.startswith(f"{name}#") for other in found)
        found.append(f"{name}#{again + 1}" if again else name)
    return found


def pick(samples: TokenSamples, counts: Sequence[int | None], seed: int) -> TokenSamples:
    """As many rows of each data set as `counts` says: drawn without repeats, or in whole passes and a rest."""
    if all(count is None for count in counts):
        return samples
    sets = samples.sets if samples.sets is not None else np.zeros(len(samples), np.int32)
    chosen = []
    for number, count in enumerate(counts):
        (own,) = np.nonzero(sets == number)
        if count is None or not len(own):
            chosen.append(own)
            continue
        passes, rest = drawn(np.unique(samples.rows[own]), count, seed, number)
        chosen += [own] * passes + [own[np.isin(samples.rows[own], rest)]]
    return samples.select(np.concatenate(chosen))


def drawn(rows: np.ndarray, count: int, seed: int, number: int) -> tuple[int, np.ndarray]:
    """How `count` rows are taken of data set `number`: so many whole passes, and these rows once more."""
    passes, rest = divmod(count, len(rows))
    # The words after the seed keep this draw apart from the held-out rows and from the order of any epoch.
    return passes, np.random.default_rng([seed, 2**31 + 1, number]).choice(rows, rest, replace=False)
