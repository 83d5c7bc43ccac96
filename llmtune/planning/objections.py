"""What speaks against a recipe before it runs (plugins, packing, new tokens), each objection in a sentence."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import LlmtuneError, PlanError, blaming, counted, did_you_mean, listed
from llmtune.contract.evaluation import MeasuresAnswers, MeasuresBatches
from llmtune.contract.generation import takes_media
from llmtune.contract.optimizers import ChecksGroups, Remarks, UpdatesInBackward
from llmtune.contract.records import Checks, FollowsEvaluations, TrainsWhole
from llmtune.contract.rewards import ReadsRows
from llmtune.contract.stages import Measures, RollsOut, precomputing
from llmtune.model.parameter_groups import model_groups
from llmtune.model.positions import counting_modules
from llmtune.recipe.parts import reward_names

if TYPE_CHECKING:
    from llmtune.contract.records import RunContext
    from llmtune.contract.stages import Stage
    from llmtune.data.config import DataConfig
    from llmtune.data.questions import Question
    from llmtune.data.tokens import TokenSamples
    from llmtune.distributed.ranks import Ranks
    from llmtune.model.edits import Ledger
    from llmtune.model.vocabulary import Vocabulary
    from llmtune.planning.model_plan import ModelPlan
    from llmtune.recipe.parts import BuiltPlugin, Parts
    from llmtune.recipe.train_config import TrainConfig

NOUNS = {"preference": "preferences", "labelled": "labelled answers", "prompt": "prompts"}
"""Kinds of samples whose sequences mean something only as a whole."""


def plugin_objections(part: BuiltPlugin, context: RunContext, module: Any) -> list[LlmtuneError]:
    """What a plugin has to say against this recipe, as errors that carry its extension point."""
    if not isinstance(part.built, Checks):
        return []
    with blaming(part.full_label, "check"):
        return [PlanError(f"{part.point}: {sentence}") for sentence in part.built.check(context, module)]


def optimizer_objections(
    part: BuiltPlugin, train: TrainConfig, model: ModelPlan, stage: BuiltPlugin
) -> list[LlmtuneError]:
    """What speaks against an optimiser and the parameters that train, or against its updates in the backward pass."""
    sentences: list[str] = []
    if isinstance(part.built, UpdatesInBackward) and part.built.layerwise:
        sentences += layerwise_objections(train, stage)
    if isinstance(part.built, ChecksGroups):
        with blaming(part.full_label, "check_groups"):
            sentences += part.built.check_groups(model_groups(model.module, model.ledger, 1.0))
    asked = plugin_objections(part, model.context, model.module)
    return [*asked, *(PlanError(f"{part.point}: {sentence}") for sentence in sentences)]


def layerwise_objections(train: TrainConfig, stage: BuiltPlugin) -> Iterator[str]:
    """What needs all gradients of a step at once, where each is freed as soon as it was used."""
    begin = "layerwise: found true, which frees each gradient during the backward pass"
    if train.gradient_accumulation_steps > 1:
        yield (
            f"{begin}, beside gradient_accumulation_steps {train.gradient_accumulation_steps}, which sums gradients of "
            "several; set gradient_accumulation_steps: 1 and a larger per_device_train_batch_size"
        )
    if isinstance(stage.built, RollsOut) and stage.built.splits > 1:
        yield (
            f"{begin}, beside {stage.label}, which sums the gradients of {stage.built.splits} micro-batches of "
            "answers; set layerwise: false"
        )
    if train.max_grad_norm:
        yield (
            f"{begin}, beside max_grad_norm {train.max_grad_norm:g}, which needs the norm of all gradients before the "
            "first update; set max_grad_norm: 0"
        )
    if train.fp16:
        yield f"{begin}, beside fp16, whose loss scaling looks at all gradients before an update; use bf16"


def metric_objections(
    train: TrainConfig,
    stage: Stage,
    sets: Sequence[str],
    evaluators: Sequence[BuiltPlugin] = (),
    rewards: Sequence[BuiltPlugin] = (),
) -> Iterator[str]:
    """A metric to compare evaluations by that none will report, or that two report. `sets` are the data sets that are
    evaluated apart.

    Where the stage does not say what it reports, only a slip in the name of a loss is known to be one.
    """
    metric, compares = train.metric_for_best_model, train.load_best_model_at_end or train.early_stopping_patience
    names = ["loss", *(stage.metrics if isinstance(stage, Measures) else ())]
    names += [f"rewards/{name}" for name in reward_names(rewards)]
    for part in evaluators:
        if twice := [name for name in part.built.metrics if name in names]:
            yield f"eval_config: {part.plugin.name} reports {twice[0]}, and so does another part of the recipe"
        names += part.built.metrics
    known = [f"eval_{part}{name}" for part in ("", *(f"{one}_" for one in sets)) for name in names]
    near = did_you_mean(metric, known)
    if metric not in known and (near or (compares and isinstance(stage, Measures))):
        yield f'metric_for_best_model: found "{metric}", allowed is one of {listed(known)}.{near}'


def label_objections(parts: Parts, questions: Sequence[Question], only_answers: bool = False) -> Iterator[str]:
    """Evaluators that compare answers, of rows that have none; and those that look at rows, where there are
    `only_answers`."""
    for part in parts.at("eval_config"):
        if only_answers and not isinstance(part.built, MeasuresAnswers):
            yield (
                f"eval_config: {part.plugin.name} measures evaluations during training, and nothing of answers; "
                "remove it"
            )
        needs = isinstance(part.built, MeasuresAnswers) and part.built.needs_labels
        if needs and all(question.label is None for question in questions):
            yield (
                f"eval_config: {part.plugin.name} compares answers with those of the rows, and none of the "
                f"{counted(len(questions), 'row')} has one; give rows with answers, or remove it"
            )


def evaluator_notes(parts: Parts, train: TrainConfig) -> Iterator[str]:
    """Evaluators of a run that evaluates nothing and predicts nothing."""
    if train.eval_strategy == "no" and not train.do_predict:
        for part in parts.at("eval_config"):
            name = part.plugin.name
            yield f"eval_config: {name} measures nothing, as nothing is evaluated; set val_size or eval_dataset"


def schedule_objections(train: TrainConfig, part: BuiltPlugin) -> Iterator[str]:
    """A schedule that follows evaluations where there are none."""
    if isinstance(part.built, FollowsEvaluations) and train.eval_strategy == "no":
        yield (
            f"lr_scheduler_config: {part.plugin.name} follows evaluations, and the recipe has none; set eval_strategy "
            "to steps or epoch with val_size or eval_dataset, or choose another schedule"
        )


def schedule_notes(part: BuiltPlugin, steps: int, warmup_steps: int) -> Iterator[str]:
    """A word on steps in which the schedule learns nothing, and on warm-up that never ends."""
    if warmup_steps >= steps:
        yield (
            f"warmup_steps: the rate rises for {counted(warmup_steps, 'step')} and the run has {steps:,}, so that "
            "learning_rate is never reached"
        )
    elif not isinstance(part.built, FollowsEvaluations):
        with blaming(part.full_label, f"factor(..., {steps}, {warmup_steps})"):
            learning = steps
            while learning > warmup_steps and part.built.factor(learning - 1, steps, warmup_steps) <= 0:
                learning -= 1
        if learning < steps:
            yield (
                f"lr_scheduler_config: the learning rate of {part.plugin.name} is 0 from step {learning + 1:,} to "
                f"{steps:,}, which learn nothing"
            )


def remarks(parts: Parts, model: ModelPlan, steps: int, warmup_steps: int) -> Iterator[str]:
    """What optimiser and schedule tell of the parameters that train and of the steps, besides objections."""
    for part in (*parts.at("optim_config"), *parts.at("lr_scheduler_config")):
        if isinstance(part.built, Remarks):
            with blaming(part.full_label, "remarks"):
                said = [*part.built.remarks(model_groups(model.module, model.ledger, 1.0), steps, warmup_steps)]
            yield from (f"{part.point}.{sentence}" for sentence in said)


def batch_objections(kind: str, data: DataConfig, ranks: Ranks, counts_samples: bool = False) -> Iterator[str]:
    """What keeps samples of this kind, which the stage counts as such or as tokens, from being packed or split as the
    recipe says."""
    noun = NOUNS.get(kind) or ("samples that the stage counts" if counts_samples else None)
    if noun is None:
        return
    if data.packing and kind == "prompt":
        yield "packing: found true, but the data are prompts, which are answered one by one; set packing: false"
    elif data.packing and not data.neat_packing:
        yield f"neat_packing: found false, but the data are {noun}, which must not see each other; set it true"
    if ranks.dims.context > 1:
        yield (
            f"dist_config: cp_size is {ranks.dims.context}, but the loss of {noun} needs whole answers, and a rank "
            "has pieces; set cp_size: 1"
        )


def media_objections(samples: TokenSamples, data: DataConfig, parts: Parts) -> Iterator[str]:
    """What keeps samples that show pictures, video or sound from being answered or packed as the recipe says."""
    if not samples.media_kinds:
        return
    shown = f"the data show {' and '.join(samples.media_kinds)}"
    engine = parts.one("engine_config")
    if samples.kind == "prompt" and not takes_media(engine.built):
        yield f"engine_config: {engine.plugin.name} answers prompts of text only, and {shown}; leave engine_config out"
    if data.packing and not data.neat_packing:
        yield f"neat_packing: found false, but {shown}, which rows would be cut through; set it true"


ROWS_LOOKED_AT = 20_000
"""Rows of a data set whose columns are read before training; of a larger one they are evenly spaced."""


def reward_objections(parts: Parts, samples: Sequence[TokenSamples | None]) -> Iterator[str]:
    """A stage that learns from rewards and has none, rewards that no stage asks for, and rows that lack what a reward
    reads of them."""
    stage, rewards = parts.one("stage_config"), parts.at("reward_config")
    if isinstance(stage.built, RollsOut) and not rewards:
        yield (
            f"reward_config: not given, and {stage.label} learns from what answers are worth; name at least one "
            "(`llmtune plugins` lists them)"
        )
    elif rewards and not isinstance(stage.built, RollsOut):
        named = listed([part.plugin.name for part in rewards])
        yield f"reward_config: found {named}, but {stage.label} lets the model answer nothing; remove it"
        return
    for part in parts.at("eval_config") if isinstance(stage.built, RollsOut) else ():
        if isinstance(part.built, MeasuresBatches):
            yield (
                f"eval_config: {part.plugin.name} compares the model with the tokens of rows, and {stage.label} "
                "has none but those that the model has just said; remove it"
            )
    for part in (part for part in rewards if isinstance(part.built, ReadsRows)):
        for held in (held for held in samples if held is not None):
            for index in range(0, len(held), max(1, len(held) // ROWS_LOOKED_AT)):
                with blaming(part.full_label, "row_objection"):
                    objection = part.built.row_objection(held.columns_of(index))
                if objection:
                    yield f"{part.label}: {held.origin(index)} {objection}"
                    break


def streaming_objections(stage: BuiltPlugin, data: DataConfig) -> Iterator[str]:
    """What a stage has to see of all samples before training, where they are read during it."""
    if data.streaming and precomputing(stage.built):
        yield (
            f"streaming: found true, but {stage.label} asks its further models about all samples before training; set "
            "streaming: false, or let the stage ask them in each step"
        )


def packing_obstacle(module: Any, attention: str) -> str | None:
    """Why a model cannot keep packed documents apart, as far as its structure and the name of its attention tell before
    it has weights."""
    taken = inspect.signature(module.base_model.forward).parameters
    if "position_ids" not in taken:
        return "takes no position ids, which tell documents apart"
    if "cross_attention_mask" in taken:
        return "shows pictures to whole rows by cross attention, to the documents beside theirs, too"
    # Newer recurrent layers restart at document bounds where this package is installed; `check_isolation` asks them.
    if module._is_stateful and find_spec("fla") is None:
        return "has recurrent layers, which carry what they read into the next document"
    sections = (getattr(module.config.get_text_config(), "rope_parameters", None) or {}).get("mrope_section", ())
    if len(sections) > 3 or (sections and not counting_modules(module)):  # HunYuan's four hold no bounds in any case
        count = {3: "three", 4: "four"}.get(len(sections), len(sections))
        return f"has positions in {count} dimensions, in which the bounds of documents are lost"
    if attention.startswith("flash_attention"):  # is told the bounds
        return None
    if not module._supports_sdpa and not module._supports_attention_backend:
        return "has attention of its own, which knows no document bounds"
    return None


def vocabulary_objection(
    vocabulary: Vocabulary, ledger: Ledger, module: Any, trainable: tuple[str, ...] | None, parts: Parts
) -> str | None:
    """What keeps the rows of new tokens from learning; None where they learn.

    A row learns where its tensor trains, or where a trained copy in its module does the work (`modules_to_save`).
    `trainable`: None for a model that is only used.
    """
    if packed := [module for name, module in vocabulary.places.items() if name in ledger.rules]:
        return f"new_special_tokens: {packed[0]} is stored quantised, so that it takes no new rows; remove quant_config"
    if trainable is None:
        return None
    tensors = dict(module.named_parameters(remove_duplicate=False))
    trained = {name: tensors[name] for name in trainable}

    def learns(name: str, module: str) -> bool:
        row = tensors[ledger.direct[name]]
        copies = (copy for other, copy in trained.items() if other.startswith(f"{module}."))
        return any(one is row for one in trained.values()) or any(copy.shape == row.shape for copy in copies)

    frozen = [module for name, module in vocabulary.places.items() if not learns(name, module)]
    if not frozen:
        return None
    modules = ",".join(dict.fromkeys(module.rpartition(".")[2] for module in frozen))
    peft = parts.at("peft_config")
    keys = [f"{part.point}.{part.built.whole_modules_key}" for part in peft if isinstance(part.built, TrainsWhole)]
    fix = f"add {modules} to {keys[0]}" if keys else "choose a peft_config that trains them, or none"
    names = ", ".join(part.plugin.name for part in peft)
    return (
        f"new_special_tokens: peft_config {names} leaves {modules} frozen, so that the rows of new tokens would never "
        f"learn; {fix}"
    )
