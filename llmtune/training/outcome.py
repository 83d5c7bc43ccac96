"""What a process knows at the end of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmtune.planning.plan import Plan
    from llmtune.training.objective import Objective


@dataclass(frozen=True)
class Outcome:
    """The end of a run, as one process knows it."""

    plan: Plan
    status: str
    """`done`, or `interrupted` (saved; run the same command again)."""
    objective: Objective
    answers: list[tuple[str, str, str]] = field(default_factory=list)
    """(question, answer before, answer after) of the recipe's `sample_prompts`."""
