"""Decide everything before a weight is read or a device touched: of a run, or of a model that is only opened."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import LlmtuneError, PlanError, blaming, raise_all
from llmtune.contract.evaluation import MeasuresAnswers, MeasuresModel
from llmtune.contract.generation import GenerateConfig
from llmtune.contract.stages import RollsOut
from llmtune.data.streaming.stream import unstreamable
from llmtune.distributed.mesh import arrange
from llmtune.model.generate import require_head
from llmtune.model.precision import Precision, choose_precision
from llmtune.model.sizes import sizes_of
from llmtune.planning.checkpointing import with_checkpointing
from llmtune.planning.data_plan import plan_data, prepare_for, questions_of
from llmtune.planning.edit import STRUCTURE_POINTS, plan_model, read_pretrained
from llmtune.planning.engine import asks_engine, engine_objections
from llmtune.planning.further_models import plan_further
from llmtune.planning.model_plan import Mode, ModelPlan
from llmtune.planning.objections import (
    batch_objections,
    evaluator_notes,
    label_objections,
    media_objections,
    metric_objections,
    optimizer_objections,
    plugin_objections,
    remarks,
    reward_objections,
    schedule_notes,
    schedule_objections,
    streaming_objections,
)
from llmtune.planning.plan import Plan
from llmtune.planning.prompts import sample_prompt_objections
from llmtune.recipe.parts import Parts, collect, find_parts, formats_of
from llmtune.terminal import doing

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from llmtune.contract.stages import Stage
    from llmtune.data import Prepared, TokenSamples
    from llmtune.data.questions import Question
    from llmtune.distributed.ranks import Ranks
    from llmtune.planning.devices import Device
    from llmtune.planning.edit import Pretrained
    from llmtune.recipe.recipe import Recipe
    from llmtune.recipe.registry import Registry


def make_plan(
    recipe: Recipe,
    registry: Registry,
    ranks: Ranks,
    device: torch.device,
    target: Device | None = None,
    writes: bool = False,
) -> Plan:
    """Resolve `recipe` for training in `ranks` processes on `device`. Raises all problems found, at once.

    `target` describes a device that this machine may not have: such a plan needs no weights, and is not for training.
    """
    problems: list[LlmtuneError] = []
    parts = find_parts(recipe, registry, problems)
    ranks = arranged(ranks, parts, problems)
    doing.info("Reading the model's configuration and tokenizer")
    precision, pretrained = foundations(recipe, parts, ranks, device, problems, target=target, templated=False)
    train = recipe.train
    obstacles = unstreamable(
        recipe.data, train.max_steps, eval_strategy=train.eval_strategy, save_strategy=train.save_strategy
    )
    for stage in parts.at("stage_config"):
        obstacles += [PlanError(sentence) for sentence in streaming_objections(stage, recipe.data)]
    problems += obstacles
    prepared: Prepared | None = None
    if obstacles or not (parts.at("data_config") and parts.at("stage_config")):
        raise_all(problems)  # one of the problems is why
    recipe, narrowed = answerable(recipe, parts.one("stage_config").built, pretrained.config)
    doing.info("Reading and tokenising the data")
    with collect(problems):
        prepared = prepare_for(recipe, parts, registry, pretrained.tokenizer, writes=writes, media=pretrained.media)
    raise_all(problems)
    assert prepared is not None and precision is not None
    model: ModelPlan | None = None
    doing.info("Building the model's structure, without weights")
    with collect(problems):
        model = plan_model(recipe, parts, pretrained, precision, ranks, device, "train")
    problems += [PlanError(sentence) for sentence in sample_objections(recipe, parts, ranks, prepared)]
    problems += [
        PlanError(sentence) for sentence in sample_prompt_objections(recipe, pretrained.tokenizer, pretrained.media)
    ]
    questions: list[Question] = []
    if model is not None and prepared.evaluation is not None:
        with collect(problems):
            questions = evaluated(recipe, parts, registry, model, prepared.evaluation)
    for part in (part for point in _ASKED for part in parts.at(point)) if model is not None else ():
        problems += plugin_objections(part, model.context, model.module)
    for part in parts.at("optim_config") if model is not None else ():
        problems += optimizer_objections(part, recipe.train, model, parts.one("stage_config"))
    if model is not None and asks_engine(recipe.train, parts):
        found = [*engine_objections(recipe.train, parts, model)]
        problems += [PlanError(sentence) for sentence in found]
        problems += [] if found else plugin_objections(parts.one("engine_config"), model.context, model.module)
    raise_all(problems)
    assert model is not None
    further = plan_further(recipe, registry, parts, model, prepared.train)
    flat = model.end_to_end or recipe.data.isolates
    data = plan_data(recipe, prepared, ranks, pretrained.tokenizer, flat, parts.one("stage_config").built, model.media)
    data = replace(data, questions=questions)
    notes = (*parts.notes, *narrowed, *beyond_positions(prepared.train.longest, pretrained.config))
    plan = Plan(recipe=recipe, parts=parts, model=model, data=data, further=further, notes=notes, target=target)
    notes = (
        *schedule_notes(parts.one("lr_scheduler_config"), plan.steps, plan.warmup_steps),
        *remarks(parts, model, plan.steps, plan.warmup_steps),
        *evaluator_notes(parts, recipe.train),
    )
    return with_checkpointing(plan.noted(*notes))


_ASKED = ("init_config", "lr_scheduler_config", "logger_config", "reward_config")
"""Points whose plugins are asked what they have against a recipe once its model is planned."""


def sample_objections(recipe: Recipe, parts: Parts, ranks: Ranks, prepared: Prepared) -> Iterator[str]:
    """What speaks against the recipe and these samples together."""
    samples, held = prepared.train, prepared.evaluation
    if recipe.train.eval_strategy != "no" and held is not None:
        sets = held.set_names if recipe.data.eval_on_each_dataset else ()
        stage, evaluators = parts.one("stage_config").built, parts.at("eval_config")
        yield from metric_objections(recipe.train, stage, sets, evaluators, parts.at("reward_config"))
    for part in parts.at("lr_scheduler_config"):
        yield from schedule_objections(recipe.train, part)
    yield from batch_objections(samples.kind, recipe.data, ranks, samples.counts_samples)
    yield from media_objections(samples, recipe.data, parts)
    yield from reward_objections(parts, (samples, held))


def evaluated(
    recipe: Recipe, parts: Parts, registry: Registry, model: ModelPlan, evaluation: TokenSamples
) -> list[Question]:
    """What the model is asked of the rows that are evaluated on; nothing where the recipe asks for no answers. Raises
    what the evaluators have against the recipe."""
    problems: list[LlmtuneError] = []
    evaluators = parts.at("eval_config") if recipe.train.eval_strategy != "no" or recipe.train.do_predict else []
    for part in evaluators:
        problems += plugin_objections(part, model.context, model.module)
    questions: list[Question] = []
    if any(isinstance(part.built, MeasuresModel) for part in evaluators):
        with collect(problems):
            require_head(model.module)
    if recipe.train.do_predict or any(isinstance(part.built, MeasuresAnswers) for part in evaluators):
        with collect(problems):
            require_head(model.module)
            formats, config = formats_of(parts, registry), GenerateConfig(**vars(recipe.generation))
            questions = questions_of(recipe, formats, model, config, evaluation)
            problems += [PlanError(sentence) for sentence in label_objections(parts, questions)]
    raise_all(problems)
    return questions


def answerable(recipe: Recipe, stage: Stage, config: Any) -> tuple[Recipe, list[str]]:
    """The recipe with a `cutoff_len` that leaves room for an answer to every prompt, where the stage lets the model
    answer; and a note where it had another."""
    positions, cutoff = sizes_of(config).positions, recipe.data.cutoff_len
    if not isinstance(stage, RollsOut) or not positions or cutoff < positions:
        return recipe, []
    note = (
        f"cutoff_len: {cutoff:,} -> {positions - 1:,}, as the model was made for {positions:,} positions and a longer "
        "prompt would have no answer; one that leaves less than the stage's most tokens has a shorter one"
    )
    return replace(recipe, data=replace(recipe.data, cutoff_len=positions - 1)), [note]


def beyond_positions(longest: int, config: Any) -> Iterator[str]:
    """A word on samples that are longer than the model was made for."""
    positions = sizes_of(config).positions
    if positions and longest > positions:
        yield (
            f"cutoff_len: the longest sample has {longest:,} tokens, more than the {positions:,} positions that the "
            f"model was made for; set rope_scaling, or cutoff_len: {positions}"
        )


def make_model_plan(
    recipe: Recipe, registry: Registry, ranks: Ranks, device: torch.device, mode: Mode,
    dtype: torch.dtype | None = None, target: Device | None = None,
) -> ModelPlan:  # fmt: skip
    """Resolve the model of `recipe`, without data. Raises all problems found, at once.

    `dtype` overrides the type the model is held and computed in, for using a model that was trained in another.
    """
    problems: list[LlmtuneError] = []
    parts = find_parts(recipe, registry, problems, STRUCTURE_POINTS)
    ranks = arranged(ranks, parts, problems) if mode == "build" or ranks.size > 1 else ranks
    given = Precision(dtype, dtype, autocast=False) if dtype else None
    precision, pretrained = foundations(
        recipe, parts, ranks, device, problems, target=target, templated=True, precision=given
    )
    raise_all(problems)
    assert precision is not None
    return plan_model(recipe, parts, pretrained, precision, ranks, device, mode)


def arranged(ranks: Ranks, parts: Parts, problems: list[LlmtuneError]) -> Ranks:
    """The ranks, arranged as the recipe's `dist_config` wants it."""
    for part in parts.at("dist_config"):
        with collect(problems), blaming(part.full_label, "layout"):
            ranks = arrange(ranks, part.built, part.label)
    return ranks


def foundations(
    recipe: Recipe, parts: Parts, ranks: Ranks, device: torch.device, problems: list[LlmtuneError], *,
    target: Device | None, templated: bool, precision: Precision | None = None,
) -> tuple[Precision | None, Pretrained]:  # fmt: skip
    """The number types, `precision` where it is given, and what the model's files say. Raises all problems so far where
    the files cannot be read, as nothing more can be found then."""
    if not parts.at("hub_config"):
        raise_all(problems)  # one of them is why
    model_problems: list[LlmtuneError] = []
    pretrained: Pretrained | None = None
    with collect(model_problems):
        pretrained = read_pretrained(recipe, parts, ranks, described=target is not None, templated=templated)
    if pretrained is None:
        raise_all([*problems, *model_problems])
    assert pretrained is not None
    with collect(problems):
        train, sizes, capable = recipe.train, sizes_of(pretrained.config), target.bf16 if target else None
        precision = precision or choose_precision(device, train.bf16, train.fp16, train.pure_bf16, sizes, capable)
    return precision, pretrained
