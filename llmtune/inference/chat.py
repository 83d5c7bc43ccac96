"""A conversation with a trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import DataError, LlmtuneError, RecipeError, raise_all
from llmtune.contract.generation import ReadsFiles, asking
from llmtune.contract.records import SwitchesOff
from llmtune.contract.schema import decode, field_types
from llmtune.data.prompts import with_shown
from llmtune.inference.prompts import prompt_writer
from llmtune.inference.reopen import filled_for, open_plan, recipe_of
from llmtune.inference.tools import OfferedTools, read_tools
from llmtune.model.generate import require_head
from llmtune.model.generation import ChatSession, GenerateConfig, has_template
from llmtune.recipe.keys import require_no_slip
from llmtune.recipe.parts import find_parts
from llmtune.recipe.registry import Registry

if TYPE_CHECKING:
    from llmtune.contract.examples import Message
    from llmtune.planning.model_plan import ModelPlan
    from llmtune.recipe.parts import BuiltPlugin, Parts
    from llmtune.recipe.recipe import Recipe


def generate_config(recipe: Recipe, given: Mapping[str, Any]) -> GenerateConfig:
    """Generation parameters as `given`, else the recipe's. Raises RecipeError for what is wrong."""
    own = {**vars(recipe.generation), "default_system": recipe.data.default_system}
    config, problems = decode(GenerateConfig, {**own, **given})
    raise_all([RecipeError(f"{problem.key}: {problem.message}") for problem in problems])
    return config


def conversation_for(
    recipe: Recipe, plan: ModelPlan, config: GenerateConfig, engine: BuiltPlugin | None = None
) -> ChatSession:
    """A conversation as the recipe's samples were rendered in training; plain text is continued where the tokenizer has
    no chat template. `engine` answers; None is the recipe's."""
    require_head(plan.module)
    engine = engine or parts_of(recipe, ("engine_config",)).one("engine_config")
    variables, writer = recipe.data.template_variables, prompt_writer(recipe, plan)
    completes = not has_template(plan.tokenizer, variables)
    return ChatSession(
        plan.module, plan.tokenizer, variables, config, completes=completes,
        generate=asking(engine.built, engine.full_label, writer.media), write=writer.asked,
        offer=None if completes else partial(OfferedTools.of, writer),
    )  # fmt: skip


def asked(conversation: ChatSession, text: str | Sequence[Mapping[str, Any]], **files: Sequence[Any]) -> str:
    """The answer to a text, or to messages, which begin another conversation; with `files` that it shows, by kind."""
    if isinstance(text, str):
        return conversation.ask(with_shown(text, **files))
    messages: list[Message] = [dict(each) for each in text] or [{}]
    *before, last = messages
    if last.get("role") != "user" or "content" not in last:
        raise DataError("the messages end with no question, needed is a last one of the role user, and its content")
    if isinstance(last["content"], str):
        last["content"] = with_shown(last["content"], **files)
    elif any(files.values()):
        raise DataError("files are given beside messages whose last one has parts; name them as parts of it")
    conversation.messages = before
    return conversation.ask(last["content"])


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
    conversation = conversation_for(recipe, plan, config, engine)
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
