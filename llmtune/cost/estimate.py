"""The cost of a plan as people and programs read it: figures, advice where it does not fit, text, table, JSON."""

from __future__ import annotations

from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from llmtune.cost.advice import Advice, advise, suggestions
from llmtune.cost.figures import Figures
from llmtune.cost.text import detail_text, quick_text, remedy_lines, table_html
from llmtune.planning.devices import device_of_rank
from llmtune.planning.micro_batch import largest
from llmtune.recipe.registry import Registry

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan

REMEDIES = 5
"""Changes that are named to somebody whose run has ended for want of memory."""


class Cost(Figures):
    """What an optimiser step costs on one rank, and what to change where it does not fit."""

    @cached_property
    def advice(self) -> Advice | None:
        """What to change, where it does not fit."""
        return None if self.fits else advise(self)

    def remedies(self) -> list[str]:
        """What a step takes and what would help, in lines, for a run whose memory is exhausted."""
        # Tracing several ranks needs a process group of its own, and the run has one.
        found = islice(suggestions(self, Registry()), REMEDIES) if self.plan.ranks.size == 1 else ()
        return remedy_lines(self, tuple(found))

    def as_dict(self) -> dict[str, Any]:
        """All figures as plain values: bytes, FLOPs a token, seconds a step."""
        return super().as_dict() | {"advice": self.advice.as_dict() if self.advice else None}

    @property
    def quick_text(self) -> str:
        """What is known at once."""
        return quick_text(self)

    @property
    def detail_text(self) -> str:
        """What takes seconds: the traced figures, FLOPs, the verdict."""
        return detail_text(self, self.advice)

    def __repr__(self) -> str:
        return f"{self.quick_text}\n{self.detail_text}"

    def _repr_html_(self) -> str:
        return table_html(self, self.advice)


def estimate(plan: Plan) -> Cost:
    """The cost of a plan."""
    device = device_of_rank(plan.target, plan.device, plan.ranks)
    return Cost(plan=plan, shape=largest(plan), device=device)
