"""What a plan has decided for the machine where the recipe leaves it open: number types, and activation checkpointing.
What was decided once holds for all ranks, and for the run when it is continued."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan
    from llmtune.recipe.recipe import Recipe


def decided(plan: Plan) -> dict[str, Any]:
    """The recipe keys that name what this plan uses, whoever chose it."""
    return {**plan.model.precision.keys, "activation_checkpointing": plan.model.checkpointing}


def as_decided(recipe: Recipe, before: Mapping[str, Any]) -> Recipe:
    """The recipe with what was `decided` before in the place of what it leaves open. What it shows stays as given."""
    train, keys = recipe.train, {}
    if train.bf16 is None and not train.fp16 and not train.pure_bf16:
        keys |= {name: before[name] for name in ("bf16", "fp16", "pure_bf16") if name in before}
    if train.checkpointing == "auto" and "activation_checkpointing" in before:
        keys["activation_checkpointing"] = before["activation_checkpointing"]
    return replace(recipe, train=replace(train, **keys))
