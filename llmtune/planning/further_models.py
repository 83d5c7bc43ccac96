"""The further models of a stage and of rewards: frozen, and planned like the one that trains, from the run's recipe and
keys of theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.contract.errors import LlmtuneError, PlanError, blaming, listed, raise_all
from llmtune.contract.extension_points import POINTS
from llmtune.contract.records import SwitchesOff
from llmtune.contract.stages import ModelSpec, further_models
from llmtune.planning.edit import STRUCTURE_POINTS, plan_model, read_pretrained
from llmtune.planning.objections import packing_obstacle
from llmtune.recipe.blocks import read_blocks
from llmtune.recipe.parts import BuiltPlugin, Parts, collect, find_parts

if TYPE_CHECKING:
    from llmtune.data.tokens import TokenSamples
    from llmtune.planning.model_plan import ModelPlan
    from llmtune.recipe.recipe import Recipe
    from llmtune.recipe.registry import Registry


def plan_further(
    recipe: Recipe, registry: Registry, parts: Parts, trained: ModelPlan, samples: TokenSamples
) -> dict[str, ModelPlan]:
    """Plans of those that have weights of their own, which are asked about `samples`. Raises all that is wrong, each
    error under the model's name."""
    plans: dict[str, ModelPlan] = {}
    problems: list[LlmtuneError] = []
    for prefix, part in askers(parts):
        for name, spec in further_models(part.built).items():
            if not spec.keys and switched_off(parts, trained):
                continue
            wrong: list[LlmtuneError] = []
            with collect(wrong):
                other_start = bool(trained.ledger.files or trained.ledger.weight_rules)
                own = with_keys(recipe, spec.keys, adapted=other_start and not spec.keys)
                plans[prefix + name] = _plan(own, spec, part, registry, trained)
                require_apart(plans[prefix + name], flat=trained.end_to_end or recipe.data.isolates)
                if plans[prefix + name].media is not None or not prefix:  # a reward that reads none is given the text
                    require_media(plans[prefix + name], trained, samples, alike=not prefix)
            problems += [type(error)(_of_model(name, spec, part, f"{error}")) for error in wrong]
    raise_all(problems)
    return plans


def _of_model(name: str, spec: ModelSpec, part: BuiltPlugin, said: str) -> str:
    """An error under the key that the user wrote, where it is about which model this is."""
    about = said.removeprefix("model: ")
    return f"{part.label}: {spec.key}: {about}" if about != said else f"the model {name} of {part.label}: {said}"


def askers(parts: Parts) -> Iterator[tuple[str, BuiltPlugin]]:
    """The plugins that may ask further models, each with what stands before their names in `Plan.further`."""
    yield "", parts.one("stage_config")
    for number, part in enumerate(parts.at("reward_config")):
        yield f"reward_config[{number}] ", part


def model_names(parts: Parts) -> list[str]:
    """The names of all further models, as `Plan.further` has them."""
    return [prefix + name for prefix, part in askers(parts) for name in further_models(part.built)]


def switched_off(parts: Parts, trained: ModelPlan) -> bool:
    """Whether the trained model was what it is with its adapters off: not where they came from files."""
    return not trained.ledger.files and any(isinstance(part.built, SwitchesOff) for part in parts.at("peft_config"))


def with_keys(recipe: Recipe, keys: Mapping[str, Any], adapted: bool) -> Recipe:
    """The recipe of a frozen model, with the run's own peft_config only where it is to be `adapted`.

    Raises PlanError for an unknown key.
    """
    blocks, wrong = read_blocks({point: keys[point] for point in POINTS if point in keys}, recipe.places)
    raise_all(wrong)
    known = {field.name for field in fields(recipe.model)}
    if odd := sorted(set(keys) - known - set(POINTS)):
        raise PlanError(f"has the keys {listed(odd)}; allowed are those of models and extension points")
    kept = {
        point: block
        for point, block in recipe.blocks.items()
        if point not in keys and (adapted or point != "peft_config")
    }
    # Another model has weights of its own, whatever the trained one starts from.
    own: dict[str, Any] = {"train_from_scratch": False} if "model" in keys else {}
    model = replace(recipe.model, **own, **{key: value for key, value in keys.items() if key in known})
    return replace(recipe, model=model, blocks={**kept, **blocks})


def require_apart(plan: ModelPlan, flat: bool) -> None:
    """PlanError for a model that would read rows which are laid end to end as one, where the trained one does not."""
    if flat and (reason := packing_obstacle(plan.module, plan.attention)):
        fix = "set packing: false, and leave packed_attention out of kernel_config"
        raise PlanError(f"packing: {type(plan.module).__name__} {reason}; {fix}")


def require_media(plan: ModelPlan, trained: ModelPlan, samples: TokenSamples, alike: bool) -> None:
    """PlanError for a model that does not read what the samples show, or not `alike` the trained one, whose tokens and
    tensors it is given."""
    if not (kinds := samples.media_kinds):
        return
    if lacking := [kind for kind in kinds if plan.media is None or kind not in plan.media.reads]:
        raise PlanError(f"model: {plan.keys.model} reads no {listed(lacking)}, which the data show; name one that does")
    assert plan.media is not None and trained.media is not None
    if not alike or plan.media.facts() == trained.media.facts():
        return
    shown = next(each for index in range(len(samples)) for each in samples.shown(index) if each.media)
    own, other = (media.read([shown]).made for media in (plan.media, trained.media))
    if own.keys() != other.keys() or not all(np.array_equal(own[name], other[name]) for name in own):
        raise PlanError(
            f"model: {plan.keys.model} reads {shown.media[0].path} otherwise than the trained model does, whose tokens "
            "and tensors it is given; name a model with the same processor"
        )


def _plan(recipe: Recipe, spec: ModelSpec, asker: BuiltPlugin, registry: Registry, trained: ModelPlan) -> ModelPlan:
    problems: list[LlmtuneError] = []
    parts = find_parts(recipe, registry, problems, STRUCTURE_POINTS)
    raise_all(problems)
    pretrained = read_pretrained(recipe, parts, trained.ranks, described=False, templated=False)
    kinds = pretrained.config.architectures or ["no class of transformers"]
    if spec.amend is not None:
        with blaming(asker.full_label, "amend"):
            amendment = spec.amend(pretrained.config, pretrained.tokenizer)
        model_class = amendment.model_class or pretrained.keys.model_class
        pretrained = replace(pretrained, keys=replace(pretrained.keys, model_class=model_class))
    here, there = len(pretrained.tokenizer), len(trained.tokenizer)
    if pretrained.tokenizer.get_vocab() != trained.tokenizer.get_vocab():
        raise PlanError(
            f"model: {recipe.model.model} has another vocabulary ({here:,} tokens) than the trained model ({there:,}), "
            "so that the two read different texts; name a model of the same family"
        )
    made = plan_model(recipe, parts, pretrained, trained.precision, trained.ranks, trained.device, "infer")
    made = replace(made, finished=True)
    if made.keys.model_class == "cls" and "ForSequenceClassification" not in kinds[0] and not made.head_elsewhere:
        raise PlanError(
            f"model: {recipe.model.model} has no trained head of a sequence classifier ({kinds[0]}), and no adapter "
            "brings one; name a model that stage rm has trained"
        )
    return made
