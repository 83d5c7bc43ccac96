"""What a process knows at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmtune.contract.loggers import RunStatus
    from llmtune.planning.plan import Plan
    from llmtune.training.objective import Objective


@dataclass(frozen=True)
class Outcome:
    """The end of a run, as one process knows it."""

    plan: Plan
    status: RunStatus
    """`done`, or `interrupted` (saved; run the same command again)."""
    objective: Objective
    answers: list[tuple[str, str, str]] = field(default_factory=list)
    """(question, answer before, answer after) of the recipe's `sample_prompts`."""
    result: Mapping[str, Any] = field(default_factory=dict)
    """What run.json says of the files in `model/`; on rank 0 of a run that is done."""
    seconds: float = 0.0
    """Time of this process, from the start of planning to the end."""
    peak_memory_bytes: int = 0
    """The most memory that a rank has taken: on its GPU, or of this machine's on a CPU."""
    planned_memory_bytes: int = 0
    """What the plan expected the tensors of a rank to take at most, by formulas."""
