"""What writes prompts as a recipe says, and what speaks against its sample prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmtune.contract.errors import DataError
from llmtune.data.making import media_folder
from llmtune.data.prompts import PromptWriter, in_line
from llmtune.media.files import MediaFiles
from llmtune.model.generate import has_template

if TYPE_CHECKING:
    from llmtune.media.processor import MediaProcessor
    from llmtune.recipe.recipe import Recipe


def writer_of(
    recipe: Recipe, tokenizer: Any, media: MediaProcessor | None, files: MediaFiles | None = None,
    default_system: str | None = None,
) -> PromptWriter:  # fmt: skip
    """What writes conversations as the recipe's rows are written. `files` are those that messages may show; None: those
    of its sample prompts, whose paths count from `media_dir`, else from the recipe's folder."""
    folder = media_folder(recipe.data, recipe.base_dir) or recipe.base_dir
    own = MediaFiles(folder=folder, reach="anywhere", fetches=recipe.data.media_from_network)
    return PromptWriter(
        name=recipe.model.model, config=recipe.data, base_dir=recipe.base_dir, tokenizer=tokenizer, media=media,
        files=files or own, default_system=default_system,
    )  # fmt: skip


def sample_prompt_objections(recipe: Recipe, tokenizer: Any, media: MediaProcessor | None) -> Iterator[str]:
    """Sample prompts that show what is not there, or what the model does not see."""
    writer = writer_of(recipe, tokenizer, media)
    templated = has_template(tokenizer, recipe.data.template_variables)
    for question in recipe.train.sample_prompts:
        content = in_line(question)
        if not templated and content is not question:
            yield "sample_prompts: one shows a file, and the tokenizer has no chat template to place it; set template"
        elif templated and (media is not None or content is not question):
            try:
                writer.asked([{"role": "user", "content": content}])
            except DataError as error:
                yield f"sample_prompts: {error}"
