"""A plan and what a step of it costs, as `llmtune.plan` gives them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from llmtune.cost.estimate import Cost, estimate
from llmtune.planning.plan import Plan


@dataclass(frozen=True, kw_only=True, repr=False)
class PricedPlan(Plan):
    """A plan that knows its cost."""

    @cached_property
    def cost(self) -> Cost:
        """Memory, FLOPs and time of a step on the plan's device; traced without weights, which takes seconds."""
        return estimate(self)

    def _repr_html_(self) -> str:
        return super()._repr_html_() + self.cost._repr_html_()
