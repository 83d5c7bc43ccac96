"""What a reward model thinks of answers: of conversations in Python, or of all rows of a data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmtune.contract.errors import PlanError
from llmtune.data import prepare
from llmtune.data.batch_loader import evaluation_batches
from llmtune.distributed.ranks import Ranks
from llmtune.inference.reopen import open_model, recipe_of
from llmtune.model.content import for_template
from llmtune.planning.data_plan import access_of
from llmtune.recipe.parts import known_formats

if TYPE_CHECKING:
    from llmtune.contract.stages import Batch

Messages = Sequence[Mapping[str, Any]]
ROWS_AT_ONCE = 8


def reward_of(model: Any, tokenizer: Any, messages: Messages, variables: Mapping[str, Any]) -> float:
    """The reward of a conversation that ends with the answer in question. Raises PlanError where the model gives none.

    `variables` are the chat template's, as in training.
    """
    require_rewards(model)
    turns = for_template(tokenizer, messages, variables)
    ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True, **variables)["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=ids.to(model.device)).logits[0, 0])


def require_rewards(model: Any) -> None:
    """PlanError unless the model ends in a head with one output."""
    if getattr(model.config, "num_labels", None) != 1 or "ForSequenceClassification" not in type(model).__name__:
        raise PlanError(
            f"{type(model).__name__} is no reward model, which is trained with stage_config rm and ends in one number"
        )


def rewards_of_rows(path: str | Path, dataset: Any, **overrides: Any) -> Iterator[dict[str, Any]]:
    """Each row of `dataset` with its reward, or with that of both its answers: `row` (`file:3`), and `reward`, or
    `chosen` and `rejected`.

    The rows are rendered as the run of `path` rendered its own. Raises PlanError where the model gives no rewards, and
    DataError for rows that cannot be used.
    """
    recipe = recipe_of(path, **overrides)
    model, tokenizer = open_model(path, **overrides)
    require_rewards(model)
    data = replace(
        recipe.data, dataset=dataset, eval_dataset=None, val_size=0, streaming=False, max_samples=None,
        tokenized_path=None, cutoff_policy="drop",
    )  # fmt: skip
    samples = prepare(
        data, tokenizer, seed=0, base_dir=Path.cwd(), formats=known_formats(recipe),
        learns=("preference", "conversation"), stage="a reward", access=access_of(recipe),
    ).train  # fmt: skip
    batches = evaluation_batches(
        samples, per_device=ROWS_AT_ONCE, ranks=Ranks(), flat=False, pad_id=tokenizer.pad_token_id, device=model.device
    )
    found = {number: values for batch in batches for number, values in _of_samples(model, batch, samples.width)}
    names = ("chosen", "rejected") if samples.width == 2 else ("reward",)
    for number in sorted(found):
        yield {"row": samples.origin(number), **dict(zip(names, found[number], strict=True))}


def _of_samples(model: Any, batch: Batch, width: int) -> Iterator[tuple[int, list[float]]]:
    with torch.no_grad():
        rewards_S = model(**batch.model_inputs()).logits[:, 0].float()
    for index, number in enumerate(batch.sample_ids):
        yield number, rewards_S[index * width : (index + 1) * width].tolist()
