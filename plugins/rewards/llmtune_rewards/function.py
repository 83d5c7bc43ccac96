"""A reward that a Python function gives."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from llmtune import Completion, StageContext

if TYPE_CHECKING:
    from . import FunctionConfig


class FunctionReward:
    """Calls `function(completions)`, which returns a number for each, or None."""

    def __init__(self, config: FunctionConfig) -> None:
        module, _, name = config.function.partition(":")
        self.function = getattr(import_module(module), name)

    def score(self, completions: Sequence[Completion], context: StageContext) -> Sequence[float | None]:
        """What the function says of each answer."""
        return self.function(completions)
