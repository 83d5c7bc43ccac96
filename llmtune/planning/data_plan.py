"""All that is decided of a run's data: the tokens, and which of them make up which step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import PlanError, counted, listed
from llmtune.contract.stages import Counts, RollsOut, learns_of
from llmtune.data import prepare
from llmtune.data.batch_loader import BatchLoader
from llmtune.data.config import sources
from llmtune.data.making import Making
from llmtune.data.media_loader import MediaLoader
from llmtune.data.mixing import counts, mixed
from llmtune.data.questions import KINDS, QuestionReader
from llmtune.data.reading import HubAccess
from llmtune.data.stream_loader import StreamLoader
from llmtune.model.generate import limit_of
from llmtune.recipe.parts import Parts, formats_of, hub_of

if TYPE_CHECKING:
    from llmtune.contract.generation import GenerateConfig
    from llmtune.contract.stages import Stage
    from llmtune.data import Formats, Prepared, TokenSamples
    from llmtune.data.questions import Question
    from llmtune.data.units import Units
    from llmtune.distributed.ranks import Ranks
    from llmtune.media.processor import MediaProcessor
    from llmtune.planning.model_plan import ModelPlan
    from llmtune.recipe.recipe import Recipe
    from llmtune.recipe.registry import Registry


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """The data of a run and their order."""

    prepared: Prepared
    """The tokens to train and to evaluate on, and what became of the rows that they come from."""
    batches: BatchLoader
    """The loader that gives each step its micro-batches."""
    questions: Sequence[Question] = ()
    """What the model answers of the rows that are evaluated on, where the recipe asks for predictions."""
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens, masks and bounds that the run trains on; named in every checkpoint."""
        return self.prepared.digest

    def with_rows(self, rows: int, micro_steps: int) -> DataPlan:
        """The same data in steps of `rows` rows, each rank's share of them in `micro_steps` micro-batches."""
        return replace(self, batches=self.batches.with_rows(rows, micro_steps))


def prepare_for(
    recipe: Recipe, parts: Parts, registry: Registry, tokenizer: Any, learns: Sequence[str] | None = None,
    writes: bool = False, media: MediaProcessor | None = None,
) -> Prepared:  # fmt: skip
    """The recipe's data as tokens, if they are of the kinds `learns`; None: of those that its stage learns from.
    Only a run `writes` to the folder that the recipe keeps tokens in."""
    stage = parts.one("stage_config")
    made = prepare(
        recipe.data, tokenizer, seed=recipe.train.seed, base_dir=recipe.base_dir, formats=formats_of(parts, registry),
        learns=learns or learns_of(stage.built), stage=stage.plugin.name, writes=writes, access=access_of(recipe),
        media=media,
    )  # fmt: skip
    return made.counting(stage.built.counts) if isinstance(stage.built, Counts) else made


def questions_of(
    recipe: Recipe, formats: Formats, model: ModelPlan, config: GenerateConfig, evaluated: TokenSamples | None = None
) -> list[Question]:
    """What the model is asked of the rows that the recipe evaluates on, of which `evaluated` are the samples; without
    these, of all rows of `dataset`."""
    data, entries = recipe.data, sources(recipe.data.dataset)
    if evaluated is not None:
        entries = sources(data.eval_dataset, "eval_dataset") or entries
    make = Making(
        data, model.tokenizer, recipe.base_dir, formats, KINDS, "a prediction", recipe.train.seed,
        access=access_of(recipe), media=model.media,
    )  # fmt: skip
    limit = limit_of(model.module.config, config)
    reader = QuestionReader(
        make=make, most_tokens=limit - 1 if limit else None, skip_special_tokens=config.skip_special_tokens
    )
    only = None if evaluated is None else {evaluated.origin(index) for index in range(len(evaluated))}
    return reader.read(entries, only)


def access_of(recipe: Recipe) -> HubAccess:
    """How the recipe's data sets are fetched from the hub."""
    cache = recipe.model.cache_dir
    return HubAccess(cache_dir=None if cache is None else str(cache), token=recipe.model.token, hub=hub_of(recipe))


def plan_data(
    recipe: Recipe, prepared: Prepared, ranks: Ranks, tokenizer: Any, flat: bool, stage: Stage,
    media: MediaProcessor | None = None,
) -> DataPlan:  # fmt: skip
    """Order `prepared` into steps of `stage`; `flat` lays documents end to end instead of padding rows. `media` reads
    what rows show."""
    train, data = recipe.train, recipe.data
    media = None if prepared.train.kind == "prompt" else media  # which are read when they are answered
    reads = stage.reads if isinstance(stage, RollsOut) else 1
    micro_steps = train.gradient_accumulation_steps * reads
    # Any id will do: padding is masked by position and never a target.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    _check_others(prepared, train.per_device_train_batch_size * micro_steps * ranks.batch_ranks)
    if prepared.stream is not None:
        batches = StreamLoader.over(
            prepared.stream, prepared.train, per_device=train.per_device_train_batch_size,
            micro_steps=micro_steps, ranks=ranks, flat=flat, pad_id=pad, reads=reads, media=media,
        )  # fmt: skip
        return DataPlan(prepared=prepared, batches=batches, notes=_without_bare(batches.units, "the first "))
    samples = mixed(prepared.train, data, train.seed)
    notes = [f"an epoch is mixed from {listed(found)}" for found in [counts(samples, prepared.train)] if found]
    more = {"workers": data.preprocessing_num_workers} if media is not None and samples.media_kinds else {}
    batches = (MediaLoader if more else BatchLoader).make(
        samples, data, per_device=train.per_device_train_batch_size, micro_steps=micro_steps,
        ranks=ranks, seed=train.seed, flat=flat, pad_id=pad, reads=reads, media=media, **more,
    )  # fmt: skip
    notes += _without_bare(batches.units)
    units, rows = len(batches.units), batches.order.batch
    if units < reads:
        raise PlanError(
            f"stage_config: its updates learn from {reads} parts of a step, and the data are "
            f"{counted(units, batches.units.kind)}; let it have fewer parts, or more data"
        )
    if units < rows:
        notes.append(
            f"the data are {counted(units, batches.units.kind)}, fewer than the {rows} of a step: "
            "every step learns from all of them, and an epoch is one step. Lower gradient_accumulation_steps or "
            "per_device_train_batch_size for more steps an epoch"
        )
        batches = batches.with_rows(rows, micro_steps)
        if batches.micro_steps < micro_steps:
            wanted, micros = micro_steps // reads, batches.micro_steps // reads
            notes.append(f"gradient_accumulation_steps: {wanted:,} -> {micros}, as the others would have no row")
    return DataPlan(prepared=prepared, batches=batches, notes=tuple(notes))


def _check_others(prepared: Prepared, rows: int) -> None:
    """PlanError for labelled answers that cannot be compared with another one's; steps have `rows` rows."""
    if prepared.train.labels is None:
        return
    begin = "stage_config: each labelled answer is compared with that to another prompt, and"
    if prepared.stream is not None and rows == 1:  # as a stream knows no rows but those of the step
        raise PlanError(
            f"{begin} a step of this stream has one; set per_device_train_batch_size or gradient_accumulation_steps "
            "to 2 or more, or streaming: false"
        )
    given = (("the data", "dataset", prepared.train), ("the rows to evaluate on", "eval_dataset", prepared.evaluation))
    for noun, key, samples in given:
        if samples is not None and len(samples) == 1:
            raise PlanError(f"{begin} {noun} are a single one; give at least 2 rows ({key})")


def _without_bare(units: Units, first: str = "") -> tuple[str, ...]:
    """What to say of packed rows that are left out."""
    if not units.bare:
        return ()
    return (
        f"neat_packing: {units.bare:,} of {first}{len(units) + units.bare:,} rows are left out, as no token in them "
        "trains: their samples have prompts longer than a row. Raise cutoff_len, or set neat_packing: true",
    )
