"""What a reward model thinks of answers: of conversations in Python, or of all rows of a data set."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmtune.contract.errors import DataError, PlanError
from llmtune.contract.examples import BadRow
from llmtune.data import prepare
from llmtune.data.batch_loader import evaluation_batches
from llmtune.data.report import counts_text
from llmtune.distributed.ranks import Ranks
from llmtune.inference.reopen import fill, open_plan, recipe_of
from llmtune.planning.data_plan import access_of
from llmtune.recipe.parts import formats_to_read

if TYPE_CHECKING:
    from llmtune.contract.stages import Batch
    from llmtune.data.prompts import PromptWriter

Messages = Sequence[Mapping[str, Any]]
ROWS_AT_ONCE = 8


def reward_of(model: Any, writer: PromptWriter, messages: Messages, **files: Sequence[Any]) -> float:
    """The reward of a conversation that ends with the answer in question; `files` are what it shows, by their kind.

    It is read as a row of the run's data is. Raises PlanError where the model gives none, and DataError for a
    conversation that cannot be read.
    """
    require_rewards(model)
    try:
        conversation = writer.read([dict(each) for each in messages], files=files)
        if not conversation.messages or conversation.messages[-1]["role"] != "assistant":
            raise DataError("the messages end with no answer, needed is a last one of the role assistant")
        (found,) = writer.renderer.encode([conversation])
        if isinstance(found, BadRow):
            raise found
        row = found[-1]  # there is one for each answer where the template drops the thoughts before
        ids = row.ids.tolist()
        given = {"input_ids": torch.tensor([ids])}
        if row.shown is not None:
            assert writer.media is not None
            given |= writer.media.prompt_tensors([row.shown], [ids], len(ids))
    except BadRow as bad:
        raise DataError(bad.detail) from bad
    with torch.no_grad():
        return float(model(**{name: each.to(model.device) for name, each in given.items()}).logits[0, 0])


def require_rewards(model: Any) -> None:
    """PlanError unless the model ends in a head with one output."""
    if getattr(model.config, "num_labels", None) != 1 or "ForSequenceClassification" not in type(model).__name__:
        raise PlanError(
            f"{type(model).__name__} is no reward model, which is trained with stage_config rm and ends in one number"
        )


def rewards_of_rows(path: str | Path, dataset: Any, **overrides: Any) -> Iterator[dict[str, Any]]:
    """Each row of `dataset` with its reward, or with that of both its answers: `row` (`file:3`), and `reward`, or
    `chosen` and `rejected`.

    An answer that is labelled is scored as a conversation is. The rows are rendered as the run of `path` rendered its
    own. Raises PlanError where the model gives no rewards, and DataError for rows that cannot be used.
    """
    recipe, plan = recipe_of(path, **overrides), open_plan(path, **overrides)
    require_rewards(plan.module)
    fill(plan, path)
    model, tokenizer, media = plan.module, plan.tokenizer, plan.media
    data = replace(
        recipe.data, dataset=dataset, eval_dataset=None, val_size=0, streaming=False, max_samples=None,
        tokenized_path=None, cutoff_policy="error", mask_history=True, train_on_prompt=False,
    )  # fmt: skip
    prepared = prepare(
        data, tokenizer, seed=0, base_dir=Path.cwd(), formats=formats_to_read(recipe),
        learns=("preference", "conversation", "labelled"), stage="a reward", access=access_of(recipe), media=media,
    )  # fmt: skip
    samples = replace(prepared.train, labels=None)  # of labelled rows the answers are what is scored
    if dropped := prepared.report.dropped:
        print(f"llmtune: rows without a reward: {counts_text(dropped)}", file=sys.stderr)
    batches = evaluation_batches(
        samples, per_device=ROWS_AT_ONCE, ranks=Ranks(), flat=False, pad_id=tokenizer.pad_token_id, device=model.device,
        media=media,
    )  # fmt: skip
    found = {number: values for batch in batches for number, values in _of_samples(model, batch, samples.width)}
    names = ("chosen", "rejected") if samples.width == 2 else ("reward",)
    for number in sorted(found):
        yield {"row": samples.origin(number), **dict(zip(names, found[number], strict=True))}


def _of_samples(model: Any, batch: Batch, width: int) -> Iterator[tuple[int, list[float]]]:
    with torch.no_grad():
        rewards_S = model(**batch.model_inputs()).logits[:, 0].float()
    for index, number in enumerate(batch.sample_ids):
        yield number, rewards_S[index * width : (index + 1) * width].tolist()
