"""Names of the contract before they took the field's terms. Plugins made for them work unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from llmtune.contract.examples import UnpairedPreference as Labelled
from llmtune.contract.records import ModelEdit, RunContext
from llmtune.contract.records import ParallelDims as Layout

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Change", "Labelled", "Layout", "Situation"]


class Situation(RunContext):
    """The former `RunContext`, whose `capabilities` were called `words`."""

    def __init__(self, *, words: frozenset[str] = frozenset(), **facts: Any) -> None:
        super().__init__(**{"capabilities": words, **facts})


class Change(ModelEdit):
    """The former `ModelEdit`, whose `after_load` was called `settle`, and `tp_follow` `follow`."""

    def __init__(
        self,
        *,
        settle: Sequence[Callable[[nn.Module], None]] = (),
        follow: Mapping[str, Literal["inputs", "outputs"]] | None = None,
        **claims: Any,
    ) -> None:
        super().__init__(**{"after_load": settle, "tp_follow": follow or {}, **claims})
