"""The contract of rewards: what an answer is worth, for stages that learn from answers of the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from llmtune.contract.generation import Completion
    from llmtune.contract.stages import StageContext


class Reward(Protocol):
    """What answers are worth."""

    def score(self, completions: Sequence[Completion], context: StageContext) -> Sequence[float | None]:
        """A finite number for each answer, None where there is nothing to say of it.

        It depends on the answer alone, whatever answers stand beside it. All ranks call it equally often, each for
        answers of its own or for none; `context.with_model` asks the models that the reward `UsesModels`. What it
        raises ends the run before the update.
        """
        ...
