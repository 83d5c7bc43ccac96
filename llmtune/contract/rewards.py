"""The contract of rewards: what an answer is worth, for stages that learn from answers of the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

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


@runtime_checkable
class ReadsRows(Protocol):
    """Optional on a reward that needs columns of the prompts' rows, such as the right answer."""

    def row_objection(self, columns: Mapping[str, Any]) -> str | None:
        """What the columns of a row lack, as a sentence that goes on after its place (`has no column 'answer'; ...`);
        None where they have all. Asked of rows before training."""
        ...


def numbered(names: Sequence[str]) -> list[str]:
    """The names of a recipe's rewards, in its order; one that comes again gets its place as a number."""
    return [name if list(names).index(name) == at else f"{name}#{at + 1}" for at, name in enumerate(names)]
