"""Whether data and batches fit together: asked of a plan, answered in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan
    from llmtune.recipe.recipe import Recipe

NOUNS = {"preference": "preferences", "labelled": "labelled answers", "prompt": "prompts"}
"""Kinds of samples whose sequences mean something only as a whole."""


def misfits(plan: Plan) -> Iterator[str]:
    """What speaks against these batches of these data."""
    assert plan.data is not None
    kind, data, size = plan.data.train.kind, plan.recipe.data, plan.ranks.layout.context
    if (noun := NOUNS.get(kind)) is None:
        return
    if data.packing and kind == "prompt":
        yield "packing: found true, but the data are prompts, which are answered one by one; set packing: false"
    elif data.packing and not data.neat_packing:
        yield f"neat_packing: found false, but the data are {noun}, which must not see each other; set it true"
    if size > 1:
        yield (
            f"dist_config: cp_size is {size}, but the loss of {noun} needs whole answers, and a rank has pieces; "
            "set cp_size: 1"
        )


def unstreamable(recipe: Recipe) -> Iterator[str]:
    """What of a recipe does not go with data of unknown size."""
    if not recipe.data.streaming:
        return
    if not recipe.train.max_steps:
        yield "max_steps: not given, but streaming does not know how many rows an epoch has; set max_steps"
    if recipe.train.eval_strategy == "epoch":
        yield "eval_strategy: found epoch, whose end streaming does not know; set eval_strategy: steps and eval_steps"
