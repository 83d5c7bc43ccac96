"""Activation checkpointing where the recipe leaves it open: only as far as memory asks for it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from llmtune.planning.devices import device_of_rank, size_text
from llmtune.planning.memory_formulas import estimate_memory
from llmtune.planning.micro_batch import largest

if TYPE_CHECKING:
    from llmtune.distributed.activation_checkpointing import Level
    from llmtune.planning.plan import Plan

SAFE = 0.8
"""Share of a device that a step may take by the formulas, which are up to a fifth off."""


def with_checkpointing(plan: Plan) -> Plan:
    """The plan with its level of activation checkpointing, the recipe's or the least that fits, and why."""
    train = plan.recipe.train
    if train.checkpointing != "auto":
        return _at(plan, train.checkpointing, "")
    batch, room = largest(plan), device_of_rank(plan.target, plan.device, plan.ranks).usable
    # Compiled layers cannot be computed again in part.
    levels: tuple[Level, ...] = ("none", "full") if train.torch_compile else ("none", "selective", "full")
    for level in levels:
        peak = estimate_memory(plan, batch, level).at_peak.total
        if peak <= SAFE * room:
            break
    return _at(plan, level, f"a step takes about {size_text(peak)} of {size_text(room)}")


def _at(plan: Plan, level: Level, why: str) -> Plan:
    return replace(plan, model=replace(plan.model, checkpointing=level, checkpointing_why=why))
