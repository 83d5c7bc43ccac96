"""The cost of a plan: instant figures, traced figures, FLOPs, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from llmtune.cost.memory import Estimate
from llmtune.cost.shape import Shape, largest

if TYPE_CHECKING:
    from llmtune.planning import Plan


@dataclass(kw_only=True)
class Cost:
    plan: Plan
    shape: Shape
    untraced: str = ""

    @cached_property
    def quick(self) -> Estimate:
        from llmtune.cost.closed import closed_form

        return closed_form(self.plan, self.shape)

    @cached_property
    def traced(self) -> Estimate | None:
        from llmtune.cost.trace import trace

        return trace(self.plan, self.shape)


def estimate(plan: Plan) -> Cost:
    return Cost(plan=plan, shape=largest(plan))
