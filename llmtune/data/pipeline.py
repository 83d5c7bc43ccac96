"""From a recipe's data keys to token samples: read, convert, render, mask, cut, split off the evaluation set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from llmtune.data.config import DataConfig, Source, sources
from llmtune.data.formats import FORMATS, detect
from llmtune.data.read import read_rows
from llmtune.data.render import Encoded, Renderer
from llmtune.data.report import SHOWN, DataReport, Losses, PartReport, SourceReport
from llmtune.data.template import choose_template
from llmtune.data.tokens import TokenSamples
from llmtune.errors import DataError, did_you_mean, listed
from llmtune.examples import BadRow, Conversation

LOOKED_AT = 100
"""Rows of a data set that its format is detected from."""
_BATCH_ROWS = 512  # conversations tokenised in one call: enough to keep all cores busy
_MOST_WITHOUT_TARGET = 0.01
"""Share of samples that may lack trained tokens before it is an error."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Data ready for training."""

    train: TokenSamples
    evaluation: TokenSamples | None
    report: DataReport

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what is trained on: tokens, masks and bounds."""
        return self.train.digest or self.train.hashed()


@dataclass(kw_only=True)
class _Collected:
    """Samples of `dataset` or `eval_dataset` while they come in."""

    pairs: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    losses: Losses = field(default_factory=Losses)
    ends: Counter[int] = field(default_factory=Counter)

    def samples(self) -> TokenSamples:
        return TokenSamples.from_lists(self.pairs, self.rows, self.origins)


def prepare(config: DataConfig, tokenizer: Any, *, seed: int, base_dir: Path | str | None = None) -> Prepared:
    """Read, render and tokenise what `config` names.

    The tokenizer gets the recipe's template, so that saving it and chatting use the one that was trained. Relative
    paths count from `base_dir`, else from the current folder.

    Raises:
        DataError: something cannot be read or used; all bad rows of a data set are counted in one message.
    """
    folder = Path(base_dir) if base_dir is not None else Path.cwd()
    if not (train_sources := sources(config.dataset)):
        raise DataError("dataset: not given; name a file, a hub:owner/name, or llmtune:quickstart")
    choose_template(config.template, tokenizer, folder)
    renderer = Renderer(
        tokenizer,
        template_kwargs=config.template_kwargs,
        default_system=config.default_system,
        train_on_prompt=config.train_on_prompt,
        mask_history=config.mask_history,
    )
    found = _Collected()
    reports = [_collect(config, source, folder, renderer, found) for source in train_sources]
    _check(config, tokenizer, found)
    train, evaluation, losses = found.samples(), None, found.losses
    if eval_sources := sources(config.eval_dataset, "eval_dataset"):
        apart = _Collected()
        reports += [_collect(config, source, folder, renderer, apart) for source in eval_sources]
        _check(config, tokenizer, apart)
        evaluation, losses = apart.samples(), losses + apart.losses
    elif config.val_size:
        train, evaluation = hold_out(train, config.val_size, seed)
    report = DataReport(
        sources=reports,
        losses=losses,
        cutoff_len=config.cutoff_len,
        train=PartReport.of(train),
        evaluation=PartReport.of(evaluation) if evaluation is not None else None,
        end_of_turn=tuple(tokenizer.convert_ids_to_tokens(token) for token, _ in found.ends.most_common()),
        notes=_notes(tokenizer),
    )
    return Prepared(train=train, evaluation=evaluation, report=report)


def _collect(config: DataConfig, source: Source, folder: Path, renderer: Renderer, into: _Collected) -> SourceReport:
    report = SourceReport(name=source.path)
    conversations = _conversations(config, source, folder, report)
    while part := list(islice(conversations, _BATCH_ROWS)):
        for (origin, _), result in zip(part, renderer.encode([each for _, each in part]), strict=True):
            if isinstance(result, BadRow):
                report.add_bad(origin, result.reason, result.detail)
                continue
            into.origins.append(origin)
            into.losses.split_rows += len(result) > 1
            for encoded in result:
                _keep(config, encoded, origin, into)
    if report.bad and (config.on_bad_record == "error" or report.bad.total() == report.rows):
        advice = "Mend them" + (", or set `on_bad_record: skip`" if report.bad.total() < report.rows else "")
        first, *rest = report.bad_lines()
        raise DataError("\n".join([f"{source.path}: cannot use {first}", *rest, advice]))
    return report


def _conversations(
    config: DataConfig, source: Source, folder: Path, report: SourceReport
) -> Iterator[tuple[str, Conversation]]:
    rows = islice(read_rows(source, folder), config.row_limit)
    first = list(islice(rows, LOOKED_AT))
    if not first:
        raise DataError(f"{source.path}: 0 records; the file is empty")
    name = source.format or config.data_format
    if name != "auto" and name not in FORMATS:
        raise DataError(f'{source.path}: no format "{name}".{did_you_mean(name, FORMATS)} Known: {listed(FORMATS)}')
    if readable := [row.data for row in first if row.problem is None]:
        chosen, report.why = detect(readable, source.path) if name == "auto" else (FORMATS[name], "as named")
        report.format = chosen.name
    else:
        chosen, rows = None, iter(())  # nothing to tell the format by: these rows are reported, no more are read
    for row in chain(first, rows):
        report.rows += 1
        try:
            if row.problem is not None or chosen is None:
                raise BadRow("unreadable", row.problem or "")
            yield row.origin, chosen.read(row.data)
        except BadRow as bad:
            report.add_bad(row.origin, bad.reason, bad.detail)


def _keep(config: DataConfig, encoded: Encoded, origin: str, into: _Collected) -> None:
    """Cut a sample to length and take it, unless nothing of it trains."""
    ids, mask = encoded.ids[: config.cutoff_len], encoded.mask[: config.cutoff_len]
    into.losses.truncated += len(encoded.ids) > len(ids)
    into.losses.tokens_cut += len(encoded.ids) - len(ids)
    into.ends.update(encoded.end_ids)
    if not mask[1:].any():
        into.losses.no_target += 1
        if len(into.losses.no_target_origins) < SHOWN:
            into.losses.no_target_origins.append(origin)
        return
    into.pairs.append((ids, mask))
    into.rows.append(len(into.origins) - 1)


def _check(config: DataConfig, tokenizer: Any, found: _Collected) -> None:
    missing, kept = found.losses.no_target, len(found.pairs)
    too_many = config.on_bad_record == "error" and missing > _MOST_WITHOUT_TARGET * (missing + kept)
    if kept and not too_many:
        _check_ends(config, tokenizer, found)
        return
    where = listed(found.losses.no_target_origins, SHOWN)
    causes = f"cutoff_len={config.cutoff_len} cut {found.losses.truncated:,} samples"
    skip = ", or set `on_bad_record: skip` to go on without them" if kept else ""
    raise DataError(
        f"dataset: {missing:,} of {missing + kept:,} samples have no token to train on (first: {where}); {causes}. "
        f"Raise cutoff_len, or check that the template marks the assistant's turns{skip}"
    )


def _check_ends(config: DataConfig, tokenizer: Any, found: _Collected) -> None:
    """A model that never sees the end of a turn never stops talking."""
    if config.train_on_prompt or found.ends:
        return
    name = f'template "{config.template}"' if config.template else "the tokenizer's chat template"
    raise DataError(
        f"template: {name} trains no end-of-turn token: no trained turn ends in one of the tokenizer's special tokens "
        f"(its eos is {tokenizer.eos_token!r}). Choose a template that writes one this tokenizer has, such as "
        "`template: alpaca`, or put it inside the template's generation block"
    )


def hold_out(samples: TokenSamples, size: int | float, seed: int) -> tuple[TokenSamples, TokenSamples]:
    """Split off whole rows for evaluation, the same ones for the same seed; `size` is a share below 1 or a count."""
    rows = np.unique(samples.rows)
    count = max(1, round(size * len(rows))) if size < 1 else int(size)
    if count >= len(rows):
        raise DataError(f"val_size: found {size}, allowed is less than the {len(rows):,} rows there are to train on")
    # The second word keeps this draw apart from the order of any epoch.
    held = np.random.default_rng([seed, 2**31]).choice(rows, count, replace=False)
    chosen = np.isin(samples.rows, held)
    return samples.select(np.nonzero(~chosen)[0]), samples.select(np.nonzero(chosen)[0])


def _notes(tokenizer: Any) -> tuple[str, ...]:
    templates = tokenizer.chat_template
    text = templates if isinstance(templates, str) else "".join(templates.values())
    dated = "the chat template writes today's date: other days give other tokens; fix it in template_kwargs"
    return (dated,) if "strftime_now" in text else ()
