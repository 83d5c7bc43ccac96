"""`llmtune convert`, and what is said where another trainer's file is taken for a recipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from llmtune.cli.arguments import add_command
from llmtune.contract.errors import LlmtuneError, RecipeError
from llmtune.terminal import say

if TYPE_CHECKING:
    from llmtune.recipe.recipe import Recipe


def add_commands(commands: Any) -> None:
    """Add what makes recipes of other trainers' files."""
    convert = add_command(
        commands,
        "convert",
        _convert,
        "Write a file of LLaMA-Factory, Axolotl, torchtune or TRL as a recipe",
        "Each decision is a comment; keys without a counterpart are listed with the reason and what to use instead. A "
        "file for chat, export or prediction becomes the command to type.",
    )
    convert.add_argument(
        "file", metavar="FILE", help="a YAML or JSON file, a script with the command, or the command in quotes"
    )
    convert.add_argument("-o", "--output", metavar="RECIPE", help="write the recipe here instead of printing it")
    convert.add_argument("--strict", action="store_true", help="fail where a key has no counterpart, and write nothing")


def _convert(options: Any) -> None:
    from llmtune.conversion.convert import convert

    made = convert(options.file, options.output, strict=options.strict)
    if options.output is None:
        print(made.text if made.verb == "train" else made.command)
    for key, why in made.lost.items():
        say(f"not taken over: {key}: {why}", sys.stderr)
    for each in made.check:
        say(f"to look at: {each}", sys.stderr)
    if options.output is not None:
        counts = f"{len(made.came)} taken, {len(made.idle)} need nothing, "
        say(
            f"Wrote {options.output}, from {made.trainer}'s keys: {counts}{len(made.lost)} not taken over. "
            f"Next: {made.command}"
        )


def read_recipe(options: Any) -> Recipe:
    """The recipe that a command names. Another trainer's file is answered with its conversion, not with each key."""
    from llmtune.recipe.recipe import load_recipe

    try:
        return load_recipe(options.recipe, options.overrides)
    except LlmtuneError as error:
        from llmtune.conversion.convert import offer

        if said := offer(options.recipe):
            raise RecipeError(said) from error
        raise
