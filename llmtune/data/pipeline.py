"""From a recipe's data keys to token samples: find, read, convert, render, mask, cut, keep, split off the evaluation
set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmtune.contract.errors import DataError, listed
from llmtune.contract.stages import LEARNS
from llmtune.data.config import DataConfig, sources
from llmtune.data.formats import Formats
from llmtune.data.formats.builtin import builtin_formats
from llmtune.data.making import Making
from llmtune.data.reading import HubAccess
from llmtune.data.report import DataReport, PartReport
from llmtune.data.streaming.stream import Stream, open_stream
from llmtune.data.template import choose_template, missing_tokens
from llmtune.data.tokens import TokenSamples
from llmtune.media.processor import MediaProcessor


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Data ready for training."""

    train: TokenSamples
    evaluation: TokenSamples | None
    report: DataReport
    stream: Stream | None = None
    """Where the data are streamed: all of them, of which `train` has only the first rows."""

    def counting(self, unit: Literal["tokens", "samples"]) -> Prepared:
        """The same data, whose batches weigh as many tokens or samples as they have."""
        held = self.evaluation and replace(self.evaluation, counts=unit)
        return replace(self, train=replace(self.train, counts=unit), evaluation=held)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what is trained on: tokens, masks and bounds; of a stream, what tells it from another."""
        if self.stream is not None:
            return self.stream.digest
        return self.train.digest or self.train.hashed()


def prepare(
    config: DataConfig,
    tokenizer: Any,
    *,
    seed: int,
    base_dir: Path | str | None = None,
    formats: Formats | None = None,
    learns: Sequence[str] = LEARNS,
    stage: str = "the stage",
    writes: bool = True,
    access: HubAccess | None = None,
    media: MediaProcessor | None = None,
) -> Prepared:
    """Read, render and tokenise what `config` names, or take it from the cache.

    The tokenizer gets the recipe's template, so that saving it and chatting use the one that was trained. Relative
    paths count from `base_dir`, else from the current folder. `learns` are the kinds of rows that `stage` can use.
    Data sets of the hub are fetched with `access`; rows may show what `media` reads. Unless it `writes`, the folder
    `tokenized_path` is read and never written to, and the cache is used instead.

    Raises:
        DataError: something cannot be read or used; all bad rows of a data set are counted in one message.
    """
    folder = Path(base_dir) if base_dir is not None else Path.cwd()
    if config.dataset is None and config.tokenized_path is None:
        raise DataError("dataset: not given; name a file, a hub:owner/name, or llmtune:quickstart")
    if config.template is not None:
        choose_template(config.template, tokenizer, folder)
    make = Making(
        config, tokenizer, folder, formats or builtin_formats(), tuple(learns), stage, seed, writes, access, media
    )  # fmt: skip
    if config.streaming:
        opened = open_stream(make, seed)
        return Prepared(train=opened.first, evaluation=opened.evaluation, report=opened.report, stream=opened.stream)
    found = make.tokenised("dataset", sources(config.dataset))
    train, evaluation, losses = found.samples, None, found.losses
    parts = [found]
    if eval_sources := sources(config.eval_dataset, "eval_dataset"):
        apart = make.tokenised("eval_dataset", eval_sources)
        evaluation, losses = apart.samples, losses + apart.losses
        parts.append(apart)
    elif config.val_size:
        train, evaluation = hold_out(train, config.val_size, seed)
    report = DataReport(
        sources=[source for part in parts for source in part.sources],
        losses=losses,
        cutoff_len=config.cutoff_len,
        train=PartReport.of(train),
        evaluation=PartReport.of(evaluation) if evaluation is not None else None,
        end_of_turn=tuple(tokenizer.convert_ids_to_tokens(token) for token, _ in found.ends.most_common()),
        notes=_notes(tokenizer),
        bad_rows=tuple(part.bad_rows for part in parts if part.bad_rows.exists()),
    )
    return Prepared(train=train, evaluation=evaluation, report=report)


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
    found = []
    if "strftime_now" in str(tokenizer.chat_template):
        found.append("the chat template writes today's date: other days give other tokens; fix it in template_kwargs")
    if lacking := missing_tokens(tokenizer):
        added = f"add them with `new_special_tokens: {', '.join(lacking)}`"
        what = f"the template spells {listed(lacking, 8)}, which this tokenizer reads as plain text"
        found.append(f"{what}; {added} unless that is meant")
    return tuple(found)
