"""What writes the prompts of a model that is used, as those of the rows that it was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtune.data.prompts import PromptWriter, files_of_user
from llmtune.planning.prompts import writer_of

if TYPE_CHECKING:
    from llmtune.media.files import MediaFiles
    from llmtune.planning.model_plan import ModelPlan
    from llmtune.recipe.recipe import Recipe


def prompt_writer(
    recipe: Recipe, plan: ModelPlan, files: MediaFiles | None = None, default_system: str | None = None
) -> PromptWriter:
    """What writes conversations with a model that is opened. `files` are those that messages may show; None: every one
    that the person who runs llmtune can read."""
    files = files or files_of_user(recipe.data)
    return writer_of(recipe, plan.tokenizer, plan.media, files, default_system)
