"""A conversation with a trained model, in Python or in a loop in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import LlmtuneError, RecipeError, did_you_mean, raise_all
from llmtune.contract.schema import decode, field_types
from llmtune.inference.reopen import open_model, recipe_of
from llmtune.model.generate import require_head
from llmtune.model.generation import ChatSession, ContextFull, GenerateConfig, has_template
from llmtune.recipe.keys import top_level_keys
from llmtune.recipe.parts import find_parts
from llmtune.recipe.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtune.recipe.parts import Parts
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
    require_head(model)
    variables = recipe.data.template_variables
    completes = not has_template(tokenizer, variables)
    engine = parts_of(recipe, ("engine_config",)).one("engine_config").built
    return ChatSession(model, tokenizer, variables, config, completes=completes, generate=engine.generate)


def open_chat(model: str | Path, /, **keys: Any) -> ChatSession:
    """A conversation with a run, a checkpoint, a model, an adapter of PEFT or what a recipe file names.

    `keys` are generation parameters (`temperature=0.2`) and keys of a recipe. Raises subclasses of LlmtuneError.
    """
    names = field_types(GenerateConfig).keys()
    others = {key: value for key, value in keys.items() if key not in names}
    for key in others:
        if key.partition(".")[0] not in top_level_keys() and (near := did_you_mean(key, names)):
            raise RecipeError(f"{key}: no such key.{near}")
    recipe = recipe_of(model, **others)
    config = generate_config(recipe, {key: value for key, value in keys.items() if key in names})
    return conversation_for(recipe, *open_model(model, **others), config)


def parts_of(recipe: Recipe, points: Sequence[str]) -> Parts:
    """The recipe's plugins of some extension points. Raises all problems of theirs."""
    problems: list[LlmtuneError] = []
    parts = find_parts(recipe, Registry(), problems, points)
    raise_all(problems)
    return parts


NO_TEMPLATE = "The tokenizer has no chat template, so text is continued as it is; to chat, name one: template=chatml"
HELP = "/clear forgets the conversation, /exit leaves, /help shows this. Ctrl-C stops an answer, Ctrl-D leaves."


def chat_loop(
    conversation: ChatSession,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] | None = None,
    *,
    guides: bool = True,
) -> None:
    """Talk in the terminal until /exit or Ctrl-D. Ctrl-C stops the answer that is being written.

    `read` takes a prompt and returns a line, `write` takes text; None prints. Unless it `guides`, as where lines come
    from a pipe, answers are all that is written.
    """
    write = write or partial(print, end="", flush=True)
    if guides:
        write(f"{NO_TEMPLATE}\n{HELP}\n" if conversation.completes else f"{HELP}\n")
    while True:
        try:
            text = read("\nYou: " if guides else "").strip()
        except EOFError:
            write("\n" if guides else "")
            return
        except KeyboardInterrupt:
            write(f"\n{HELP}\n")
            continue
        if text == "/exit":
            return
        if text == "/clear":
            conversation.clear()
            write("The conversation is forgotten.\n")
        elif text.startswith("/"):
            write(f"{HELP}\n")
        elif text:
            _write_answer(conversation, text, write)


def _write_answer(conversation: ChatSession, text: str, write: Callable[[str], None]) -> None:
    pieces = conversation.stream(text)
    try:
        for piece in pieces:
            write(piece)
        write("\n")
    except KeyboardInterrupt:
        write(" [stopped]\n")
    except ContextFull as error:
        write(f"{error}\n")
    finally:
        pieces.close()
