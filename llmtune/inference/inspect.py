"""A recipe's data as training would have them, made by the tokenizer alone: `preview`, `stats` and `check_data`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import DataError, LlmtuneError, RecipeError, raise_all
from llmtune.contract.examples import KINDS
from llmtune.terminal import quiet_imports

if TYPE_CHECKING:
    from llmtune.data import DataReport, Prepared
    from llmtune.data.check import DataCheck
    from llmtune.data.media_stats import MediaStats
    from llmtune.data.preview import Preview
    from llmtune.data.report import Bad
    from llmtune.data.stats import DataStats, Rows
    from llmtune.data.tokens import TokenSamples
    from llmtune.recipe.recipe import Recipe

STREAMED_ROWS = 1000
"""Rows of each data set that are looked at where training would stream them."""
_WHOLE = 2**31 - 1
"""A `cutoff_len` that cuts nothing."""


def check_data(
    source: str | Path | Mapping[str, Any],
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    dataset_dir: str | Path | None = None,
    limit: int | None = None,
    keep: int | None = 20,
    workers: int | None = None,
    on_bad: Callable[[Bad], object] | None = None,
    **recipe_keys: Any,
) -> DataCheck:
    """Read and convert every row of a data set; with `model="..."`, render it with that model's template, too.

    `source` is spelt like an entry of `dataset`, further keywords are keys of a recipe (`template`, `cutoff_len`).
    The first `limit` rows are read, the first `keep` bad ones are kept; None: all. `on_bad` is told of each bad one.
    Raises DataError where a file cannot be read or no format fits.
    """
    from llmtune.data.check import check
    from llmtune.data.config import sources
    from llmtune.recipe.parts import known_formats
    from llmtune.recipe.recipe import load_recipe

    entry = dict(source) if isinstance(source, Mapping) else {"path": str(source)}
    entry |= {key: value for key, value in {"format": format, "columns": columns}.items() if value is not None}
    how: dict[str, Any] = {"dataset_dir": dataset_dir, "limit": limit, "keep": keep, "workers": workers}
    if recipe_keys:
        (found,) = check_recipe(load_recipe({"dataset": [entry], **recipe_keys}), on_bad=on_bad, **how)
        return found
    (only,) = sources((entry,))
    return check(only, Path.cwd(), formats=known_formats(), on_bad=on_bad, **how)


def check_recipe(
    recipe: Recipe, *, format: str | None = None, dataset_dir: str | Path | None = None, **how: Any
) -> Iterator[DataCheck]:
    """Check all data sets of a recipe, one after the other; `how` is what `check` takes. Raises DataError where it
    names none."""
    from llmtune.data.check import check
    from llmtune.data.config import sources

    data = recipe.data
    if not (entries := [*sources(data.dataset), *sources(data.eval_dataset, "eval_dataset")]):
        raise DataError("dataset: the recipe names none; name one, or check a file")
    folder, facts = dataset_dir or data.dataset_dir, render_facts(recipe)
    for entry in entries:
        entry = replace(entry, format=format) if format else entry
        yield check(entry, recipe.base_dir, dataset_dir=folder, **how, **facts)


def render_facts(recipe: Recipe) -> dict[str, Any]:
    """What `check` needs to render rows as a run of `recipe` would: keywords of it. Where the model cannot be had, the
    error stands in for the tokeniser."""
    quiet_imports()
    from llmtune.data.making import Making
    from llmtune.data.template import choose_template
    from llmtune.media.processor import media_processor
    from llmtune.model.source import load_tokenizer, resolve_model
    from llmtune.planning.data_plan import access_of
    from llmtune.recipe.parts import hub_of, known_formats

    formats, access = known_formats(recipe), access_of(recipe)
    try:
        files = resolve_model(recipe.model, hub_of(recipe), weights=False)
        tokenizer = load_tokenizer(files, recipe.model)
        if recipe.data.template is not None:
            choose_template(recipe.data.template, tokenizer, recipe.base_dir)
    except LlmtuneError as error:
        return {"formats": formats, "access": access, "config": recipe.data, "no_model": error}
    media = media_processor(files.folder, tokenizer, recipe.data, recipe.model.trust_remote_code)
    making = Making(
        recipe.data, tokenizer, recipe.base_dir, formats, KINDS, "", recipe.train.seed, access=access, media=media
    )
    return {"formats": formats, "access": access, "config": recipe.data, "tokeniser": making.tokeniser}


def preview(
    recipe: str | Path | Mapping[str, Any],
    n: int = 3,
    rows: Sequence[int | str] = (),
    packs: bool = False,
    **overrides: Any,
) -> Preview:
    """Samples as the recipe trains on them: the first `n`, or those that come from `rows` (`5`, `chats.jsonl:5`).

    With `packs`, the first `n` packed rows. Print it, or let a notebook show it.
    """
    from llmtune.recipe.recipe import load_recipe

    return preview_of(load_recipe(recipe, overrides), n, rows, packs)


def stats(recipe: str | Path | Mapping[str, Any], **overrides: Any) -> DataStats:
    """Lengths, fill, padding and the cost of cutoffs of a recipe's data. Print it, plot it, or take its numbers."""
    from llmtune.recipe.recipe import load_recipe

    return stats_of(load_recipe(recipe, overrides))


def preview_of(recipe: Recipe, n: int = 3, rows: Sequence[int | str] = (), packs: bool = False) -> Preview:
    """What `preview` gives, of a recipe that is read already."""
    from llmtune.data.preview import make_pack_preview, make_preview
    from llmtune.data.units import make_units

    data, train = recipe.data, recipe.train
    if packs and not data.packing:
        raise RecipeError("packing: found false, but packed rows are to be shown; set packing=true")
    recipe, notes = _unstreamed(recipe)
    prepared, tokenizer = prepare_data(recipe)
    if packs:
        units = make_units(prepared.train, data, train.seed)
        return make_pack_preview(prepared.train, units, tokenizer, count=n)
    parts = [("training", prepared.train)]
    if prepared.evaluation is not None:
        parts.append(("evaluation", prepared.evaluation))
    return make_preview(parts, tokenizer, count=n, rows=rows, notes=[*notes, *prepared.report.notes])


def stats_of(recipe: Recipe) -> DataStats:
    """What `stats` gives, of a recipe that is read already."""
    from llmtune.data.stats import make_stats

    recipe, notes = _unstreamed(recipe)
    data = recipe.data
    try:
        prepared = prepare_data(recipe)[0]
    except DataError as error:  # as of a cutoff_len that leaves nothing to learn: the lengths tell a better one
        if data.dataset is None:
            raise
        notes.append(f"this recipe would not train. {error}")
        whole = _uncut(recipe, None)
        media = _media_stats(recipe, whole)
        return make_stats(whole, None, None, cutoff_len=data.cutoff_len, media=media, notes=notes)
    if data.dataset is None:
        whole = prepared.train
        notes.append("tokenized_path: these lengths are those of the samples kept there, which may have been cut")
    else:
        whole = _uncut(recipe, prepared)
    packed, padded = _fill(recipe, prepared)
    return make_stats(
        whole, prepared.train, prepared.evaluation, cutoff_len=data.cutoff_len, packed=packed, padded=padded,
        media=_media_stats(recipe, whole), notes=[*notes, *_losses(prepared.report, data.cutoff_policy)],
    )  # fmt: skip


def _uncut(recipe: Recipe, prepared: Prepared | None) -> TokenSamples:
    """All samples in their full lengths; those that were prepared where nothing of them was cut."""
    import numpy as np

    changes: dict[str, Any] = {"val_size": 0}
    lost = prepared.report.losses if prepared else None
    # A long text goes on in the next sample, of the same row.
    parts = [part for part in (prepared.train, prepared.evaluation) if part is not None] if prepared else []
    several = any(len(np.unique(part.rows)) < len(part) for part in parts)
    refused = any(each.bad["too long"] for each in prepared.report.sources) if prepared else False
    if lost is None or lost.truncated or lost.too_long or several or refused:
        changes |= {"cutoff_len": _WHOLE, "cutoff_policy": "truncate", "tokenized_path": None}
    return prepare_data(replace(recipe, data=replace(recipe.data, **changes)))[0].train


def _media_stats(recipe: Recipe, samples: TokenSamples) -> MediaStats | None:
    """What samples show, by the processor of the recipe's model; None where they are text alone."""
    if not samples.media_kinds:
        return None
    from llmtune.data.media_stats import count_media
    from llmtune.media.processor import media_processor
    from llmtune.model.source import load_tokenizer, resolve_model
    from llmtune.recipe.parts import hub_of

    files = resolve_model(recipe.model, hub_of(recipe), weights=False)
    tokenizer = load_tokenizer(files, recipe.model)
    media = media_processor(files.folder, tokenizer, recipe.data, recipe.model.trust_remote_code)
    return None if media is None else count_media(samples, media)


def _losses(report: DataReport, policy: str) -> Iterator[str]:
    lost = report.losses
    if policy == "truncate" and any(each.kind == "text" for each in report.sources):
        yield "plain text beyond a cutoff is not lost: it goes on in the next sample"
    if lost.no_target:
        yield f"{lost.no_target:,} samples are left out, as none of their tokens trains"
    if cut := lost.cut_text:
        yield f"cutoff_len {report.cutoff_len:,} with cutoff_policy {policy}: {cut}"
    for each in report.sources:
        if each.bad:
            yield f"{each.name}: {each.bad.total():,} of {each.rows:,} rows cannot be used and are left out"


def prepare_data(recipe: Recipe) -> tuple[Prepared, Any]:
    """Samples and tokenizer as a run of `recipe` has them, without its model."""
    quiet_imports()
    from llmtune.media.processor import media_processor
    from llmtune.model.source import load_tokenizer, resolve_model
    from llmtune.planning.data_plan import prepare_for
    from llmtune.recipe.parts import clashes, find_parts, hub_of
    from llmtune.recipe.registry import Registry

    problems: list[LlmtuneError] = []
    registry = Registry()
    parts = find_parts(recipe, registry, problems, ("stage_config", "data_config"))
    unmet = {str(clash) for clash in clashes(parts.all)}  # what these two need of parts that data do not
    raise_all([problem for problem in problems if str(problem) not in unmet])
    files = resolve_model(recipe.model, hub_of(recipe), weights=False)
    tokenizer = load_tokenizer(files, recipe.model)
    media = media_processor(files.folder, tokenizer, recipe.data, recipe.model.trust_remote_code)
    # What the stage does not learn from can be looked at, too.
    return prepare_for(recipe, parts, registry, tokenizer, KINDS, media=media), tokenizer


def _unstreamed(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Data that would be streamed are looked at by their first rows."""
    data = recipe.data
    if not data.streaming:
        return recipe, []
    limit = min(STREAMED_ROWS, data.row_limit or STREAMED_ROWS)
    told = f"streaming: the first {limit:,} rows of each data set were looked at"
    return replace(recipe, data=replace(data, streaming=False, max_samples=limit)), [told]


def _fill(recipe: Recipe, prepared: Prepared) -> tuple[Rows | None, Rows]:
    """How an epoch fills packed rows, and padded ones, on one rank."""
    from llmtune.data.batch_loader import row_lengths
    from llmtune.data.mixing import mixed
    from llmtune.data.order import Order, padding_share
    from llmtune.data.stats import Rows
    from llmtune.data.units import make_units, whole

    data, train = recipe.data, recipe.train
    samples = mixed(prepared.train, data, train.seed)
    packed = None
    if samples.kind != "prompt":
        units = make_units(samples, replace(data, packing=True), train.seed)
        packed = Rows(rows=len(units), fill=units.fill)
    units = whole(samples.lengths)
    lengths = row_lengths(samples, units)
    micros = train.gradient_accumulation_steps
    batch = train.per_device_train_batch_size * micros
    grouped = lengths if data.group_by_length else None
    order = Order(len(units), batch, train.seed, not data.disable_shuffling, grouped)
    fill = 1 - padding_share(lengths, order, micros)
    return packed, Rows(rows=len(units), fill=fill, micro_batch=train.per_device_train_batch_size)
