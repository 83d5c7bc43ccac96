"""The models that a server offers: one of a command line, its base, and further adapters over the same base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmtune.contract.errors import DataError, PlanError, listed
from llmtune.contract.generation import GenerateConfig, ServedModel
from llmtune.contract.records import SwitchesOff
from llmtune.data.render import Renderer
from llmtune.data.tool_calls import CallFormat, call_format
from llmtune.inference.chat import generate_config
from llmtune.inference.prompts import prompt_writer
from llmtune.inference.reopen import fill, on_disk, open_plan, recipe_of, saved_at
from llmtune.model.edits import named_tensors
from llmtune.model.generate import has_template, require_head, stop_tokens, vocabulary_of
from llmtune.planning.prompts import writer_of
from llmtune.serving.ahead import AheadProcessor, ReadAhead

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmtune.media.processor import MediaProcessor
    from llmtune.planning.model_plan import ModelPlan
    from llmtune.recipe.recipe import Recipe

BASE = "base"
"""The name of a run's base, which answers with the adapter switched off."""


@dataclass(frozen=True, kw_only=True)
class ModelOffer:
    """A model with all that turns requests for it into tokens, and its tokens into text."""

    served: ServedModel
    tokenizer: PreTrainedTokenizerBase
    model_config: Any
    config: GenerateConfig
    """How answers are drawn where a request does not say."""
    renderer: Renderer | None
    """None where there is no chat template: text is continued, and there are no conversations."""
    calls: CallFormat | None
    stop: frozenset[int]
    media: MediaProcessor | None
    """What reads media that conversations show; None where they are text."""
    reader: str
    """What errors call who reads them."""
    ahead: ReadAhead | None
    """Where an engine finds what requests show, read by threads that have a renderer of their own."""
    own_renderer: Callable[[int], Renderer]
    """Makes one, which leaves all that it reads in `ahead`; of videos it decodes so many pixels at most."""

    @property
    def name(self) -> str:
        return self.served.name

    @property
    def words(self) -> int:
        """How many tokens the model can say."""
        return vocabulary_of(self.model_config)


def offers(
    path: str, name: str | None, adapters: Mapping[str, str], keys: Mapping[str, Any], generation: Mapping[str, Any]
) -> tuple[Recipe, list[ModelOffer]]:
    """The recipe of what is at `path`, and the models that a server of it offers: itself, its base where an adapter can
    be switched off, and `adapters`. No weights are read. `keys` go before the recipe's, `generation` before its keys of
    generation."""
    recipe, plan = recipe_of(path, **keys), open_plan(path, **keys)
    config = generate_config(recipe, generation)
    if config.num_beams > 1:
        raise PlanError(f"num_beams: found {config.num_beams}, allowed is 1: requests are answered token by token")
    name, loaded = name or _name(path), cache(partial(_load, plan, path))
    found = [_offer(recipe, plan, config, on_disk(plan, path, name, loaded))]
    switches = [part.built for part in plan.parts.at("peft_config") if isinstance(part.built, SwitchesOff)]
    if len(switches) == 1:
        around = partial(switches[0].disabled, plan.module)
        base = replace(found[0].served, name=BASE, adapter=None, load=lambda: (loaded()[0], around))
        found.append(_offer(recipe, plan, config, base))
    for other, folder in adapters.items():
        its_keys = {key: value for key, value in keys.items() if not key.startswith("peft_config")}
        its_recipe, its_plan = recipe_of(folder, **its_keys), open_plan(folder, **its_keys)
        its = partial(_load_over, its_plan, folder, other, lambda: (loaded()[0], plan))
        config = generate_config(its_recipe, generation)
        found.append(_offer(its_recipe, its_plan, config, on_disk(its_plan, folder, other, its)))
    names = [each.name for each in found]
    if twice := sorted({each for each in names if names.count(each) > 1}):
        raise PlanError(f"adapters: {listed(twice)} would name several models; choose other names, or model_name=NAME")
    return recipe, found


def _name(path: str) -> str:
    saved = saved_at(path)
    file = Path(path)
    if saved is not None:
        return saved.run.name
    return file.stem if file.suffix in (".yaml", ".yml", ".json", ".gguf") else file.name


def _offer(recipe: Recipe, plan: ModelPlan, config: GenerateConfig, served: ServedModel) -> ModelOffer:
    require_head(plan.module)
    data, tokenizer = recipe.data, plan.tokenizer
    renderer = ahead = None
    if has_template(tokenizer, data.template_variables):
        renderer = prompt_writer(recipe, plan, default_system=config.default_system).renderer
    media, reader = _media(None if renderer is None else renderer.media, served.name)
    if media is not None:  # tokenizers have settings, and the engine has a thread of its own
        ahead = ReadAhead(replace(media, tokenizer=deepcopy(tokenizer)))
        served = replace(served, media=ahead)

    def own_renderer(most_decoded: int) -> Renderer:
        assert media is not None and ahead is not None
        own = AheadProcessor.of(media, ahead, most_decoded)
        return writer_of(recipe, own.tokenizer, own, default_system=config.default_system).renderer

    return ModelOffer(
        served=served, tokenizer=tokenizer, model_config=plan.module.config, config=config, renderer=renderer,
        media=media, reader=reader, ahead=ahead, own_renderer=own_renderer,
        calls=None if renderer is None else call_format(renderer, data.tool_format),
        stop=frozenset(stop_tokens(plan.module, tokenizer, data.template_variables)),
    )  # fmt: skip


def _media(media: MediaProcessor | None, name: str) -> tuple[MediaProcessor | None, str]:
    """What reads media for a model, and what errors call the model: with the reason where its processor is not to be
    had, so that text alone is served."""
    try:
        return media if media is not None and media.reads else None, name
    except DataError as error:
        return None, f"{name} ({error})"


def _load(plan: ModelPlan, path: str) -> tuple[Any, Callable[[], AbstractContextManager[Any]]]:
    fill(plan, path)
    return plan.module, nullcontext


def _load_over(
    plan: ModelPlan, path: str, name: str, base: Callable[[], tuple[Any, ModelPlan]]
) -> tuple[Any, Callable[[], AbstractContextManager[Any]]]:
    """The model of an adapter, whose frozen weights are then those of the base that is in memory already.

    Raises PlanError unless they are the same numbers.
    """
    module, its_plan = base()
    fill(plan, path)
    own, held = _base_names(plan), _base_names(its_plan)
    tensors, theirs = named_tensors(plan.module), named_tensors(module)
    pairs = [(own[name], tensors[own[name]], theirs[held[name]]) for name in own if name in held]
    if set(own) != set(held) or not all(
        one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other) for _, one, other in pairs
    ):
        raise PlanError(
            f"adapters: {name} ({path}) does not stand on the weights of {its_plan.keys.model}; models of one server "
            "share their base, so serve it with a command of its own"
        )
    for present, _, tensor in pairs:
        owner, _, leaf = present.rpartition(".")
        setattr(plan.module.get_submodule(owner), leaf, tensor)
    return plan.module, nullcontext


def _base_names(plan: ModelPlan) -> dict[str, str]:
    """The present name of each tensor that a model has from its base, by its name there."""
    ruled = {
        f"{original} {target}": present
        for original, placed in plan.ledger.rules.items()
        for target, present in placed.where.items()
    }
    return {**plan.ledger.direct, **ruled}


def named(found: Sequence[ModelOffer], name: str) -> ModelOffer | None:
    """The offer of a name."""
    return next((each for each in found if each.name == name), None)
