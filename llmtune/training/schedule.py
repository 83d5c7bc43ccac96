"""The learning rate of each step as a share of the recipe's: warm-up, which is the core's, then the plugin's curve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmtune.contract.errors import blaming
from llmtune.contract.records import FollowsEvaluations

if TYPE_CHECKING:
    from llmtune.recipe.parts import BuiltPlugin


@dataclass(frozen=True)
class WarmedSchedule:
    """A schedule with its warm-up, whose errors carry the plugin's name."""

    part: BuiltPlugin
    warmup_type: Literal["linear", "cosine", "constant"] = "linear"
    start: float = 0.0
    """The share at which warm-up begins."""

    def factor(self, step: int, total_steps: int, warmup_steps: int) -> float:
        """Multiplier of the learning rate for the 0-based `step`."""
        if step < warmup_steps:
            return self.start + (1.0 - self.start) * risen(self.warmup_type, step / warmup_steps)
        with blaming(self.part.full_label, f"factor({step}, {total_steps}, {warmup_steps})"):
            return self.part.built.factor(step, total_steps, warmup_steps)

    def evaluated(self, value: float, greater_is_better: bool) -> None:
        """Tell a schedule that wants to know the metric of an evaluation."""
        if isinstance(self.part.built, FollowsEvaluations):
            with blaming(self.part.full_label, "evaluated"):
                self.part.built.evaluated(value, greater_is_better)

    def state(self) -> dict[str, Any] | None:
        """What a schedule that follows evaluations has to know of those before; None for all others."""
        return dict(self.part.built.state()) if isinstance(self.part.built, FollowsEvaluations) else None

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what `state` gave."""
        if state is not None and isinstance(self.part.built, FollowsEvaluations):
            self.part.built.restore(state)


def risen(warmup_type: str, done: float) -> float:
    """How far warm-up has risen, from 0 to 1, when a share of its steps is `done`."""
    match warmup_type:
        case "linear":
            return done
        case "cosine":
            return 0.5 * (1.0 - math.cos(math.pi * done))
    return 0.0
