"""A conversation with a trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import LlmtuneError, RecipeError, raise_all
from llmtune.contract.generation import ReadsFiles
from llmtune.contract.records import SwitchesOff
from llmtune.contract.schema import decode, field_types
from llmtune.inference.reopen import filled_for, open_plan, recipe_of
from llmtune.inference.tools import OfferedTools, read_tools
from llmtune.model.generate import require_head
from llmtune.model.generation import ChatSession, GenerateConfig, has_template
from llmtune.recipe.keys import require_no_slip
from llmtune.recipe.parts import find_parts
from llmtune.recipe.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe.parts import BuiltPlugin, Parts
    from llmtune.recipe.recipe import Recipe


def generate_config(recipe: Recipe, given: Mapping[str, Any]) -> GenerateConfig:
    """Generation parameters as `given`, else the recipe's. Raises RecipeError for what is wrong."""
    own = {**vars(recipe.generation), "default_system": recipe.data.default_system}
    config, problems = decode(GenerateConfig, {**own, **given})
    raise_all([RecipeError(f"{problem.key}: {problem.message}") for problem in problems])
    return config


def conversation_for(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GenerateConfig
) -> ChatSession:
    """A conversation as the recipe's samples were rendered in training; plain text is continued where the tokenizer has
    no chat template."""
    return _conversation(recipe, model, tokenizer, config, parts_of(recipe, ("engine_config",)).one("engine_config"))


def _conversation(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GenerateConfig,
    engine: BuiltPlugin,
) -> ChatSession:  # fmt: skip
    require_head(model)
    variables = recipe.data.template_variables
    completes = not has_template(tokenizer, variables)
    offer = None if completes else partial(OfferedTools.of, tokenizer, recipe)
    generate = engine.built.generate
    return ChatSession(model, tokenizer, variables, config, completes=completes, generate=generate, offer=offer)


def open_chat(model: str | Path, /, **keys: Any) -> ChatSession:
    """A conversation with a run, a checkpoint, a model, an adapter of PEFT or what a recipe file names.

    `keys` are generation parameters (`temperature=0.2`), `system`, `seed`, `tools` (a list of functions, or a JSON file
    of one) and keys of a recipe. Raises subclasses of LlmtuneError.
    """
    tools = read_tools(keys.pop("tools")) if "tools" in keys else None
    if "system" in keys:
        keys["default_system"] = keys.pop("system")
    names = field_types(GenerateConfig).keys()
    others = {key: value for key, value in keys.items() if key not in names}
    require_no_slip(others, names)
    recipe = recipe_of(model, **others)
    config = generate_config(recipe, {key: value for key, value in keys.items() if key in names})
    plan = open_plan(model, **others)
    require_head(plan.module)
    engine = parts_of(recipe, ("engine_config",)).one("engine_config")
    filled_for(plan, model, engine)
    conversation = _conversation(recipe, plan.module, plan.tokenizer, config, engine)
    if tools is not None:
        if conversation.offer is None:
            raise RecipeError("tools: the tokenizer has no chat template, which writes them; name one: template=chatml")
        conversation.tools = conversation.offer(tools)
    conversation.seed = keys.get("seed")
    switches = [part.built for part in plan.parts.at("peft_config") if isinstance(part.built, SwitchesOff)]
    if len(switches) == 1:
        reads = isinstance(engine.built, ReadsFiles)
        conversation.base = engine.built.without_adapter if reads else partial(switches[0].disabled, plan.module)
    return conversation


def parts_of(recipe: Recipe, points: Sequence[str]) -> Parts:
    """The recipe's plugins of some extension points. Raises all problems of theirs."""
    problems: list[LlmtuneError] = []
    parts = find_parts(recipe, Registry(), problems, points)
    raise_all(problems)
    return parts
